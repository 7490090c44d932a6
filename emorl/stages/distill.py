"""Distill stage: the ensemble at chosen weights becomes one ordinary adapter (`emorl distill experiment.yaml --prefer …`), or
one adapter for the whole front, which reads the weights in its prompt (`--front`).

On-policy distillation (GKD, arXiv 2306.13649) by TRL's trainer. It departs from multi-teacher distillation (MOPD, arXiv
2606.30406), which sends each prompt to one teacher: here the teacher is the weighted ensemble. The run directory holds the
adapter `policy`, `result.json` with what it keeps of the ensemble's gain over the soup of the same weights, and the scored
answers of all three on the test prompts in `systems`. Under `torchrun` every process performs this stage.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError, nearest
from emorl.config.distill import BASE, SOUP
from emorl.config.experiment import Experiment
from emorl.runs.console import Console
from emorl.runs.layout import CHECKPOINTS, MANIFEST, POLICY, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import DistillationResult, SearchResult, TradeOff, as_json, read_result
from emorl.runs.run import Cost, Run, differences, read_cost, read_json, write_json, written_whole
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.search import check_mode
from emorl.stages.stage import Stage, identity, is_main_process, perform
from emorl.stages.train import TRAINING

if TYPE_CHECKING:
    import pandas as pd

    from emorl.policies.preference_line import PreferenceLine
    from emorl.training.questions import Questions

SYSTEMS = "systems"
_OBEYS = 0.5  # correlation
_TARGET, _OUTCOME = "target.json", "distilled.json"


def check(experiment: Experiment) -> None:
    """Refuses an ensemble that cannot be a teacher, weights that are none, and settings that TRL or PEFT would refuse."""
    check_mode(experiment)
    if experiment.ensemble.aggregate != "hidden_states":
        raise UserError("ensemble.aggregate: an average of parameters is one adapter already: write it with `emorl fuse`")
    _check_names(experiment)
    trade_offs(experiment)
    from emorl.policies.base import is_encoder_decoder

    if is_encoder_decoder(experiment.base):
        raise UserError("distill: TRL distils decoders only, and the base is an encoder-decoder; use `emorl fuse`")
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    from emorl.policies.generation import check_generation

    check_generation(experiment.generation)
    from emorl.training.distillation import BLOCK, distillation_config
    from emorl.training.lora import lora_config
    from emorl.training.rehearsal import rehearse

    lora_config(experiment.train, experiment.base)
    config = experiment.distill
    rehearse(
        distillation_config(config.trainer, experiment.base, experiment.generation, experiment.seed, Path(CHECKPOINTS)), BLOCK
    )


def _check_names(experiment: Experiment) -> None:
    config, policies = experiment.distill, mixed_policies(experiment)
    for name in config.weights:
        if name not in policies:
            raise UserError(f"distill.weights: no policy is called {name!r}; {nearest(name, policies)}")
    starts = [SOUP, BASE, *experiment.policy_names]
    if config.start not in starts:
        raise UserError(
            f"distill.start: expected {SOUP}, {BASE} or a policy, got {config.start!r}; {nearest(config.start, starts)}"
        )


def mixed_policies(experiment: Experiment) -> list[str]:
    """What weights belong to: the policies, and the base where it takes part."""
    return [*experiment.policy_names, *([BASE] if experiment.ensemble.include_base else [])]


def trade_offs(experiment: Experiment) -> list[TradeOff]:
    """The weights that the adapter is made for, and, with `front`, those that are held out.

    Raises:
        UserError: the search that should have found them has not finished.
    """
    config, policies = experiment.distill, mixed_policies(experiment)
    if config.weights:
        total = sum(config.weights.values())
        return [TradeOff("given weights", {name: config.weights.get(name, 0.0) / total for name in policies})]
    search = _search(experiment)
    if config.front:
        return _whole_front(experiment, search)
    if config.prefer:
        from emorl.objectives.preference import choose

        preferred = choose([vars(point) for point in search.front], config.prefer)
        return [TradeOff("preferred", dict(preferred["weights"]))]
    return [TradeOff("best found", dict(search.best.weights))]


def _search(experiment: Experiment) -> SearchResult:
    """The search of this output, or of the one whose policies are used.

    Raises:
        UserError: neither has finished, or it was over other policies.
    """
    others = [experiment.policies] if isinstance(experiment.policies, Path) else []
    places = [place for place in (experiment.output, *others) if Layout(place).has_result("search")]
    if not places:
        looked = " nor in ".join(map(str, (experiment.output, *others)))
        remedy = "" if others else "name one that has as `policies`, "
        raise UserError(
            f"distill: no search has finished in {looked}; run `emorl search` first, {remedy}or give distill.weights"
        )
    search, policies = read_result(SearchResult, Layout(places[0]).search), mixed_policies(experiment)
    if set(search.best.weights) != set(policies):
        raise UserError(
            f"distill: the search in {places[0]} was over {', '.join(search.best.weights)}, not {', '.join(policies)}; run "
            "`emorl search`, or give distill.weights"
        )
    return search


def _whole_front(experiment: Experiment, search: SearchResult) -> list[TradeOff]:
    from emorl.evaluation.pareto import chosen_points
    from emorl.policies.preference_line import PreferenceLine
    from emorl.training.preferences import held_out_preferences

    policies, chosen = mixed_policies(experiment), chosen_points(search.front, experiment.evaluate.front_points)
    line = PreferenceLine(experiment.distill.line, tuple(policies))
    points = list(dict.fromkeys(tuple(line.rounded(point.weights).values()) for point in chosen))
    held_out = held_out_preferences(points, len(policies), experiment.distill.held_out, line.units, experiment.seed)
    vectors = [*((f"front {number}", one, False) for number, one in enumerate(points, 1)),
               *((f"held out {number}", one, True) for number, one in enumerate(held_out, 1))]  # fmt: skip
    return [TradeOff(name, dict(zip(policies, one, strict=True)), is_held_out) for name, one, is_held_out in vectors]


def is_enough(experiment: Experiment, result: DistillationResult) -> bool:
    """Whether it is made for the weights that the search says now."""
    return _target([*result.trade_offs]) == _target(trade_offs(experiment))


def _target(of: Sequence[TradeOff]) -> list[Any]:
    return [[one.name, dict(one.weights), one.held_out] for one in of]


def work(materials: Materials, run: Run, progress: Progress) -> DistillationResult:
    """Distils from the last complete checkpoint on, and compares what came out with the ensemble and its soup."""
    from accelerate import PartialState

    from emorl.policies.preference_line import PreferenceLine

    experiment = materials.experiment
    progress = progress if is_main_process() else Silent()
    materials.layout.trained(experiment.policy_names)
    asked = trade_offs(experiment)
    _begin_anew_for_other_weights(run, asked, progress)
    PartialState().wait_for_everyone()  # all of them see what is left
    config, names = experiment.distill, mixed_policies(experiment)
    room = sum(one.held_out for one in asked)
    if config.front and room < config.held_out:
        progress.warn(f"distill.held_out: beside this front there is room for {room} weights, not {config.held_out}")
    line = PreferenceLine.of(config.line, names, materials.tokenizer) if config.front else None
    outcome = _distilled(materials, run, progress, asked, line)
    result = DistillationResult(
        front=config.front,
        start=config.start,
        trade_offs=asked,
        **outcome,
    )
    return _compared(materials, run, progress, result, line) if run.is_main else result


def _begin_anew_for_other_weights(run: Run, asked: Sequence[TradeOff], progress: Progress) -> None:
    """What was made for weights that a search has left since is made again."""
    file, target = run.path / _TARGET, json.loads(json.dumps(_target(asked)))
    if not run.is_main or (file.exists() and read_json(file) == target):
        return
    if file.exists():
        progress.warn("distill: the search has found other weights since; the adapter is distilled again")
    for name in (_OUTCOME, CHECKPOINTS, POLICY, SYSTEMS):
        place = run.path / name
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    write_json(file, target)


def _distilled(
    materials: Materials, run: Run, progress: Progress, asked: Sequence[TradeOff], line: "PreferenceLine | None"
) -> Mapping[str, Any]:
    """Trains where it has not, and returns how that ended."""
    if (run.path / _OUTCOME).exists() and (run.path / POLICY).exists():
        return read_json(run.path / _OUTCOME)
    from emorl.training.allocator import keep_freed_memory
    from emorl.training.distillation import Lesson, distill, distillation_config
    from emorl.training.lora import lora_config
    from emorl.training.trainers import prompts_per_step

    experiment = materials.experiment
    if run.is_main:
        shutil.rmtree(run.path / SYSTEMS, ignore_errors=True)  # of an adapter that is there no longer
    block, base, generation = experiment.distill.trainer, experiment.base, experiment.generation
    config = distillation_config(block, base, generation, experiment.seed, run.path / CHECKPOINTS)
    if config.use_cpu:
        keep_freed_memory()
    lora = lora_config(experiment.train, base)
    assert lora is not None, "an ensemble is made of adapters"
    questions = _questions(materials, asked, line, config.max_steps * prompts_per_step(config), config.max_completion_length)
    start, with_base = _start_weights(experiment, asked), experiment.ensemble.include_base
    lesson = Lesson(materials.base, materials.policies, *questions, start, with_base, experiment.evaluate.batch)
    outcome = asdict(distill(lesson, lora, config, generation, run, progress, _card(experiment, asked, line)))
    if run.is_main:
        write_json(run.path / _OUTCOME, outcome)
    return outcome


def _start_weights(experiment: Experiment, asked: Sequence[TradeOff]) -> list[float]:
    """Of the policies whose sum the student begins as: the trade-off's, or the mean of those that are trained on."""
    start, names = experiment.distill.start, experiment.policy_names
    if start == SOUP:
        trained = [one.weights for one in asked if not one.held_out]
        return [sum(weights[name] for weights in trained) / len(trained) for name in names]
    return [float(name == start) for name in names]


def _questions(
    materials: Materials, asked: Sequence[TradeOff], line: "PreferenceLine | None", count: int, new_tokens: int | None
) -> "tuple[Questions, Questions]":
    """What is trained on, `count` rows, and what is validated on: every validation prompt once."""
    from emorl.policies.base import config_of
    from emorl.policies.prompts import check_prompts
    from emorl.training.preferences import drawn_preferences
    from emorl.training.questions import asked_with, repeated

    experiment, splits = materials.experiment, materials.splits
    names, seed = mixed_policies(experiment), experiment.seed
    trained = [[one.weights[name] for name in names] for one in asked if not one.held_out]
    avoided = [[one.weights[name] for name in names] for one in asked if one.held_out]
    prompts, validation = repeated(list(splits.train["prompt"]), count, seed), list(splits.validation["prompt"])
    if line is None:
        rows = [trained * len(part) for part in (prompts, validation)]
    else:
        drawn = drawn_preferences(trained, avoided, len(names), count + len(validation), line.units, seed)
        rows = [drawn[:count], drawn[count:]]
    training, held_out = (
        asked_with(part, weights, names, line) for part, weights in zip((prompts, validation), rows, strict=True)
    )
    for part in (training, held_out):
        check_prompts(materials.tokenizer, config_of(experiment.base), part.student, new_tokens)
    return training, held_out


def _card(experiment: Experiment, asked: Sequence[TradeOff], line: "PreferenceLine | None") -> dict[str, Any]:
    """What the policy says of itself; one that reads a line also the front that a preference chooses from."""
    card: dict[str, Any] = {"objective": "all", "method": "distillation"}
    if line is None:
        return {**card, "weights": dict(asked[0].weights)}
    search = _search(experiment)
    points = [asdict(point) for point in search.front]
    return {**card, **line.card(), "front": points, "weights": dict(search.best.weights)}


def _compared(
    materials: Materials, run: Run, progress: Progress, result: DistillationResult, line: "PreferenceLine | None"
) -> DistillationResult:
    """The result with what ensemble, soup and adapter do on the test prompts."""
    from emorl.objectives.scalarize import importance_of
    from emorl.training.retained import follows, hypervolumes, retentions, summarized

    experiment = materials.experiment
    objectives = list(experiment.objectives)
    shares = importance_of(objectives, experiment.distill.prefer or experiment.value.preferences)
    importance = dict(zip(objectives, map(float, shares), strict=True))
    tables = _tables(materials, run, progress, result.trade_offs, line)
    found = [summarized(one, tables[one.name], importance) for one in result.trade_offs]
    result = replace(result, trade_offs=found)
    if not result.front:
        return replace(result, kept=retentions(tables[found[0].name], importance, experiment.seed))
    volumes, reference = hypervolumes(found, objectives)
    return replace(result, hypervolume=volumes, reference_point=reference, follows=follows(found, objectives))


def _tables(
    materials: Materials, run: Run, progress: Progress, asked: Sequence[TradeOff], line: "PreferenceLine | None"
) -> "dict[str, dict[str, pd.DataFrame]]":
    """Trade-off -> system -> scored answers; what an interrupted run has scored is read."""
    import pandas as pd

    from emorl.evaluation.retention import SYSTEMS as NAMES
    from emorl.evaluation.scoring import cost_of
    from emorl.objectives.loading import outside_range

    experiment, tables, models = materials.experiment, {}, None
    files = {
        one.name: {system: table_of(run.path, one, system, experiment.evaluate.samples) for system in NAMES} for one in asked
    }
    missing = [one for one in asked if not all(file.exists() for file in files[one.name].values())]
    objectives, run = materials.objectives, replace(run, cost=read_cost(run.path))
    with progress.bar("test", len(asked), done=len(asked) - len(missing)) as bar:
        for one in missing:
            start, models = time.perf_counter(), models or _models(materials, run, line)
            found = models.tables(
                one.weights, materials.splits.test, objectives, experiment.generation,
                samples=experiment.evaluate.samples, batch=experiment.evaluate.batch, seed=experiment.seed,
            )  # fmt: skip
            for system, table in found.items():
                with written_whole(files[one.name][system]) as temporary:
                    table.to_parquet(temporary, index=False)
            cost = sum((cost_of(table, len(objectives), 0.0) for table in found.values()), Cost())
            run = run.add_cost(replace(cost, seconds=time.perf_counter() - start))
            bar.advance(1, one.name)
    for line_of in outside_range(objectives):
        progress.warn(line_of)
    for one in asked:
        tables[one.name] = {system: pd.read_parquet(file) for system, file in files[one.name].items()}
    return tables


def table_of(folder: Path, one: TradeOff, system: str, samples: int) -> Path:
    """Where a system's scored answers at a trade-off lie in the stage's folder."""
    from emorl.evaluation.systems import table_file

    return folder / SYSTEMS / table_file(f"{one.name} {system}", one.weights, samples)


def _models(materials: Materials, run: Run, line: "PreferenceLine | None") -> Any:
    from emorl.aggregation.ensemble import HiddenStateEnsemble
    from emorl.policies.adapters import read_adapter
    from emorl.training.retained import Compared

    adapter = {"distilled": read_adapter(run.path / POLICY)}
    ensemble, soup = materials.mixture("hidden_states"), materials.mixture("parameters")
    distilled = HiddenStateEnsemble(materials.base.model, adapter, [1.0])
    return Compared(ensemble, soup, distilled, materials.base.tokenizer, line)  # type: ignore[arg-type]


_SCORED_BY = (*TRAINING, "objectives", "policies", "value", "ensemble")
_DEPENDS_ON = (*_SCORED_BY, "distill", "evaluate.samples", "evaluate.front_points")
STAGE = Stage("distill", DistillationResult, check, _DEPENDS_ON, work, is_enough, leaves=[POLICY])


def comparable_result(experiment: Experiment) -> DistillationResult | None:
    """What was distilled here, where its answers are those that the experiment asks for now: to the same prompts, decoded and
    scored alike. None where there is none."""
    layout = Layout(experiment.output)
    if not layout.has_result("distill"):
        return None
    kept, asked = read_json(layout.distillation / MANIFEST)["config"], identity(experiment, _SCORED_BY)
    has_samples = kept["evaluate"]["samples"] == experiment.evaluate.samples
    same = has_samples and not differences({key: kept.get(key) for key in asked}, json.loads(json.dumps(asked)))
    return read_result(DistillationResult, layout.distillation) if same else None


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> DistillationResult:
    return perform(STAGE, experiment, progress, materials)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "objectives", "generation", "distill", "ensemble", "policies")
    numbers = "NAME=NUMBER,…"
    parser.add_argument(
        "--prefer", default="", metavar=numbers, help="distil the front's point that suits these objectives best"
    )
    parser.add_argument("--weights", default="", metavar=numbers, help="instead: weights by policy")
    parser.add_argument(
        "--front", action="store_true", help="instead: one adapter for all weights, which reads them in its prompt"
    )


def command(options: argparse.Namespace) -> None:
    from emorl.objectives.preference import parse_numbers

    chosen = {key: parse_numbers(f"--{key}", getattr(options, key)) for key in ("prefer", "weights")}
    given = [f"distill.{key}={json.dumps(numbers)}" for key, numbers in chosen.items() if numbers]
    experiment = load(options, [*given, *(["distill.front=true"] if options.front else [])])
    result = performed(experiment, Console(), Materials(experiment))
    if not is_main_process():
        return
    if options.json:
        shown = {key: value for key, value in as_json(result).items() if key != "log"}
        print(json.dumps({**shown, "policy": str(Layout(experiment.output).distillation / POLICY)}, indent=2))
        return
    from emorl.reporting.distillation_table import distillation_table

    print(distillation_table(result))
    if result.follows and not max(result.follows.values()) > _OBEYS:
        Console().warn("distill: the adapter hardly heeds its weights; take more steps, or {words} in distill.line")
    Console().say(f"distill: the adapter is in {Layout(experiment.output).distillation / POLICY}")
