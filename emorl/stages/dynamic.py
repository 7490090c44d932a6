"""Dynamic stage: agents that set the weights anew for every span of text, and their rivals (`emorl dynamic experiment.yaml`).

RLAE (arXiv 2506.00439); how it departs from the paper stands in `dynamic/agents/`. It is a run for each step: `dynamic/fixed`
(the best fixed weights), `dynamic/ppo` and `dynamic/mappo` (an agent each, with its artifact in `ensemble/`), and
`dynamic/comparison` (`answers.parquet` has every answer on the test prompts with its weights). Under `accelerate launch` or
`torchrun` every process performs this stage, and they share the texts.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.dynamic import AgentKind
from emorl.config.experiment import Experiment
from emorl.dynamic.models import Models, check_together
from emorl.reporting.dynamic_table import dynamic_table
from emorl.runs.console import Console
from emorl.runs.layout import ANSWERS, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import AgentResult, DynamicResult, FixedResult, as_json, read_result
from emorl.runs.run import Run, open_run, written_whole
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.stage import BASE_KEYS, Stage, identity, is_main_process, perform

if TYPE_CHECKING:
    from emorl.dynamic.setting import Setting

_SETTING = (*BASE_KEYS, "data", "objectives", "policies", "value", "generation", "seed")
_FIXED = (*_SETTING, *(f"dynamic.{key}" for key in ("models", "turns", "vocabulary", "top_k", "fixed_step")))
_COMPARISON = (*_SETTING, "dynamic", "-dynamic.batch", "-dynamic.ppo.updates")  # more updates go on
_AGENT = (*_COMPARISON, "-dynamic.agents", "-dynamic.spans")


def check(experiment: Experiment) -> None:
    """Refuses what would fail after hours: rewards and models that cannot be, a missing extra, runs of other settings."""
    if experiment.value.scalarize == "chebyshev":
        raise UserError("value.scalarize: chebyshev is no reward of a single answer; use mean, weighted or minimum")
    models = models_of(experiment)
    check_together(models)
    for name, keys in (("fixed", _FIXED), *((kind, _AGENT) for kind in experiment.dynamic.agents)):
        name = f"dynamic/{name}"
        open_run(Layout(experiment.output).stage(name), name, identity(experiment, keys), is_main=False)
    from emorl.dynamic.processes import this_process

    this_process()  # the first one made decides how processes meet
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    from emorl.dynamic.engines.engine import decoding_of
    from emorl.dynamic.engines.loading import check_places

    check_places(models)
    decoding_of(experiment.generation, experiment.seed)
    from emorl.dynamic.agents.text_encoder import check_encoder
    from emorl.dynamic.agents.training import load_ppo

    load_ppo()
    if experiment.dynamic.agent.encoder is not None:
        check_encoder(experiment.dynamic.agent.encoder)


def models_of(experiment: Experiment) -> Models:
    """The models of `dynamic.models`; without any, the trained policies.

    Raises:
        UserError: policies that are not trained yet.
    """
    config, places = experiment.dynamic, experiment.dynamic.models
    if not places:
        folders = Layout(experiment.output, experiment.policies).trained(experiment.policy_names)
        places = {name: str(folder) for name, folder in folders.items()}
    data = experiment.data
    return Models(places, experiment.base, config.vocabulary, config.top_k, data.system_prompt, data.chat_template_kwargs)


def is_enough(experiment: Experiment, result: AgentResult | DynamicResult) -> bool:
    """Whether agents have learnt from as many updates as are asked for."""
    return result.updates >= experiment.dynamic.ppo.updates


def work(materials: Materials, run: Run, progress: Progress) -> DynamicResult:
    """The steps that are missing, each in a run of its own, and the comparison."""
    import torch

    from emorl.dynamic.agents.training import train_agent, trained_agent
    from emorl.dynamic.rivals import answers_table, best_fixed, compare, systems_of

    experiment, setting = materials.experiment, _setting(materials)
    names, objectives = setting.engine.names, list(experiment.objectives)

    def step(stage: Stage[Any]) -> Any:
        return perform(stage, experiment, progress, materials)

    def agent_stage(kind: AgentKind) -> Stage[AgentResult]:
        def train(materials: Materials, run: Run, progress: Progress) -> AgentResult:
            return train_agent(setting, kind, weights, run.path, progress)

        return Stage(f"dynamic/{kind}", AgentResult, _checked, _AGENT, train, is_enough)

    fixed = step(Stage("dynamic/fixed", FixedResult, _checked, _FIXED, lambda *_: best_fixed(setting, progress))).best
    weights = [fixed.weights[name] for name in names]
    kinds, layout = experiment.dynamic.agents, materials.layout
    results: dict[str, AgentResult] = {kind: step(agent_stage(kind)) for kind in kinds}
    best = max(results, key=lambda kind: results[kind].validation)
    agents = {kind: trained_agent(setting, kind, layout.stage(f"dynamic/{kind}")) for kind in kinds}
    records = compare(setting, weights, agents, best, progress)
    if run.is_main:
        with written_whole(run.path / ANSWERS) as temporary:
            answers_table(records, objectives).to_parquet(temporary, index=False)
    return DynamicResult(
        systems_of(records, names, objectives),
        best,
        fixed,
        objectives,
        prompts=len(setting.splits.test),
        updates=min(result.updates for result in results.values()),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
    )


def _checked(experiment: Experiment) -> None:
    """Of the steps: `check` has looked at all of them."""


def _setting(materials: Materials) -> "Setting":
    from emorl.dynamic.answer_value import AnswerValue
    from emorl.dynamic.engines.engine import decoding_of
    from emorl.dynamic.engines.loading import load_engine
    from emorl.dynamic.setting import Setting
    from emorl.objectives.scalarize import Value

    experiment, models = materials.experiment, models_of(materials.experiment)
    splits = materials.splits_as(models.share_base and materials.is_conversational)  # whole models render prompts by themselves
    value = AnswerValue(materials.objectives, Value.of(experiment.value, list(experiment.objectives)))
    decoding = decoding_of(experiment.generation, experiment.seed, experiment.data.after)
    engine = load_engine(models, materials.base if models.share_base else None)
    return Setting(engine, models, splits, value, decoding, experiment.dynamic, experiment.seed)


STAGE = Stage("dynamic/comparison", DynamicResult, check, _COMPARISON, work, is_enough)


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> DynamicResult:
    return perform(STAGE, experiment, progress if is_main_process() else Silent(), materials)


def read_dynamic(output: Path) -> DynamicResult:
    """The finished comparison in an experiment's output."""
    return read_result(DynamicResult, Layout(output).stage(STAGE.name))


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "objectives", "seed", "generation", "value", "dynamic", "policies")


def command(options: argparse.Namespace) -> None:
    experiment = load(options)
    perform("dynamic", experiment, Console())
    if is_main_process():
        print_dynamic(experiment.output, options.json)


def print_dynamic(output: Path, in_json: bool) -> None:
    """The finished comparison as a table, or as JSON."""
    result = read_dynamic(output)
    print(json.dumps(as_json(result), indent=2) if in_json else dynamic_table(result))
