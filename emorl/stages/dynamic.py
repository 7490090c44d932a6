"""The dynamic ensemble against its rivals, on test prompts that neither training nor the choice of weights has seen.

Rivals: each model alone, equal weights, the best fixed weights, a router that gives each prompt one model, and the oracle which
knows afterwards which single model was best for each prompt: a bound of routers, not of weights that change within a text.
Every system writes in the same batches with the same engine; seconds include reading the prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.data import load_prompts
from emorl.dynamic.agents.agent import Agent, Kind
from emorl.dynamic.agents.observation import Controller, FixedWeights
from emorl.dynamic.ensemble import (
    AGENT_FILE,
    ENSEMBLE,
    DynamicEnsemble,
    check_models,
    decoding_of,
    is_conversational,
    load_engine,
    model_references,
)
from emorl.dynamic.fixed_weights import best_of, values_of_fixed, weight_grid
from emorl.dynamic.judging import Judge
from emorl.dynamic.processes import shared_out, this_process
from emorl.dynamic.rollout import Rollout
from emorl.dynamic.router import features_of, fit_router
from emorl.dynamic.training import Setting, agent_directory, check_training, train_agent, training_identity
from emorl.objectives.loading import check_objectives
from emorl.policies.conversation import prompt_text
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import Run, only_process, open_run, read_json, write_json, written_whole

_ROUTED = 512  # training prompts a router learns from, at most
_RESAMPLES = 4000
_STAGE = "dynamic comparison"


@dataclass(frozen=True)
class System:
    """One line of the comparison: its mean value on the test prompts with the standard error over prompts, its gain on the
    best fixed weights with a 95 % interval of paired resamples, tokens per second, and the controller's share of the time."""

    name: str
    span: int | str | None
    value: float
    error: float
    gain: float
    gain_low: float
    gain_high: float
    scores: dict[str, float]
    mean_weights: dict[str, float]
    tokens: int
    tokens_per_second: float
    controller_share: float


def run_dynamic(experiment: Experiment, progress: Progress | None = None) -> Path:
    """Best fixed weights, one controller for each of `dynamic.agents`, and their comparison; returns the run directory.

    It holds `fixed.json`, a directory for each agent, `answers.parquet` (every answer on the test prompts with its weights) and
    `result.json`. What is finished is skipped, an interrupted training goes on. Under `accelerate launch` or `torchrun` every
    process calls this, and they share the texts.

    Raises:
        UserError: settings that cannot be, models that cannot be loaded, a run directory of another experiment.
    """
    is_main = this_process().is_main_process
    progress = (progress if is_main else None) or Silent()
    check_objectives(experiment.objectives)
    judge, models = Judge.load(experiment), model_references(experiment)
    path, identity = experiment.output / "dynamic", _identity(experiment, models)
    if _is_compared(experiment, identity):
        progress.say(f"dynamic: finished before, in {path}")
        return path
    check_models(experiment, models)
    check_training(experiment, models)
    decoding_of(experiment.generation, experiment.seed)
    splits = load_prompts(experiment.data, experiment.seed, is_conversational(experiment, models))
    _check_fixed(experiment, models)
    config = experiment.dynamic
    engine = load_engine(models, experiment.base, vocabulary=config.vocabulary, top_k=config.top_k)
    setting = Setting(experiment, engine, models, splits, judge)
    fixed = _fixed(setting, path, progress)
    for kind in experiment.dynamic.agents:
        train_agent(setting, kind, fixed["weights"], progress)
    if not is_main:
        _compare(setting, fixed, None, progress)
        return path
    with only_process(path / "comparison"):
        _compare(setting, fixed, open_run(path / "comparison", _STAGE, identity), progress)
    return path


def read_dynamic(output: Path) -> dict[str, Any]:
    """What a finished comparison wrote to `result.json`."""
    return read_json(output / "dynamic" / "comparison" / "result.json")


def _identity(experiment: Experiment, models: dict[str, str]) -> dict[str, Any]:
    config = experiment.dynamic
    return {**training_identity(experiment, models), "agents": list(config.agents), "spans": list(config.spans)}


def _is_compared(experiment: Experiment, identity: Mapping[str, Any]) -> bool:
    """Whether this very comparison is finished, of agents with as many updates as are asked for."""
    path = experiment.output / "dynamic" / "comparison"
    if not (path / "run.json").exists() or not open_run(path, _STAGE, identity).finished:
        return False
    return read_dynamic(experiment.output)["updates"] >= experiment.dynamic.ppo.updates


def _fixed_settings(experiment: Experiment, models: dict[str, str]) -> dict[str, Any]:
    config = experiment.dynamic
    how = {"turns": config.turns, "vocabulary": config.vocabulary, "top_k": config.top_k, "fixed_step": config.fixed_step}
    return json.loads(json.dumps({**training_identity(experiment, models), "dynamic": how}))


def _check_fixed(experiment: Experiment, models: dict[str, str]) -> None:
    """Fixed weights of other settings are refused."""
    file = experiment.output / "dynamic" / "fixed.json"
    if file.exists() and read_json(file)["settings"] != _fixed_settings(experiment, models):
        raise UserError(f"{file} is of a run with other settings; give another `output`, or move {file.parent} away")


def _fixed(setting: Setting, path: Path, progress: Progress) -> dict[str, Any]:
    """The best weights of the grid by the validation prompts; remembered in `fixed.json`."""
    config, file = setting.experiment.dynamic, path / "fixed.json"
    is_known = file.exists()
    this_process().wait_for_everyone()
    if is_known:
        return read_json(file)
    grid, batch = weight_grid(len(setting.models), config.fixed_step), setting.experiment.evaluate.batch
    progress.say(f"dynamic: {len(grid)} fixed weights on {len(setting.splits.validation)} validation prompts")
    values = values_of_fixed(
        setting.engine, setting.judge, setting.splits.validation, grid, setting.decoding, config.turns, batch
    )
    weights, value = best_of(grid, values)
    progress.say(f"dynamic: best fixed weights {_said(setting, weights)}, value {value:.3f}")
    every = [{"weights": one, "value": float(mean)} for one, mean in zip(grid.tolist(), values.mean(1), strict=True)]
    settings = _fixed_settings(setting.experiment, setting.models)
    content = {"weights": weights, "value": value, "tried": every, "settings": settings}
    if this_process().is_main_process:
        write_json(file, content)
    return content


def _compare(setting: Setting, fixed: dict[str, Any], run: Run | None, progress: Progress) -> None:
    """Every process writes its part of the texts; the one with a run writes the result."""
    config, names = setting.experiment.dynamic, list(setting.models)
    agents: dict[Kind, Agent] = {kind: _agent(setting, kind) for kind in config.agents}
    controllers: list[tuple[str, Controller, int | Literal["turn"]]] = [
        *((f"{name} alone", FixedWeights(row), "turn") for name, row in zip(names, torch.eye(len(names)), strict=True)),
        ("equal weights", FixedWeights(torch.full((len(names),), 1 / len(names))), "turn"),
        ("best fixed weights", FixedWeights(torch.tensor(fixed["weights"])), "turn"),
        ("router per prompt", _router(setting), "turn"),
        *((f"RLAE-{kind.upper()}", agent, config.span) for kind, agent in agents.items()),
    ]
    best: Kind = max(
        agents, key=lambda kind: read_json(agent_directory(setting.experiment, kind) / "result.json")["validation"]
    )
    others = [span for span in config.spans if span != config.span]
    controllers += [(f"RLAE-{best.upper()}", agents[best], span) for span in others]
    data = setting.splits.test
    rollouts, values, scores = [], [], []
    with progress.bar("compare", len(controllers)) as bar:
        for name, controller, span in controllers:
            found = _written(setting, controller, span)
            rollouts.append(found)
            own = setting.judge.scores(data, found.answers)
            scores.append(own)
            values.append(_by_prompt(setting.judge.values(own), found, len(data)))
            bar.advance(1, f"{name} {values[-1].mean():.3f}")
    reference = values[[name for name, _, _ in controllers].index("best fixed weights")]
    systems = [
        _system(setting, name, span if controller in agents.values() else None, found, value, reference, own)
        for (name, controller, span), found, value, own in zip(controllers, rollouts, values, scores, strict=True)
    ]
    if run is None:
        return
    systems.insert(len(names) + 3, _oracle(np.max(values[: len(names)], 0), reference))
    _write(setting, run, systems, controllers, rollouts, scores, fixed, best)


def _written(setting: Setting, controller: Controller, span: int | Literal["turn"]) -> Rollout:
    """Answers to the test prompts, shared by processes, which work at the same time."""
    config, prompts = setting.experiment.dynamic, list(setting.splits.test["prompt"])
    ensemble = DynamicEnsemble(setting.engine, controller, setting.decoding, span=span, turns=config.turns)

    def work(rows: Sequence[int]) -> tuple[Sequence[int], Rollout]:
        return rows, ensemble.rollout([prompts[row] for row in rows], seeds=rows, batch=setting.experiment.evaluate.batch)

    parts = shared_out(range(len(prompts)), work)
    answers = [replace(answer, row=rows[answer.row]) for rows, part in parts for answer in part.answers]
    seconds, of_controller = (max(getattr(part, name) for _, part in parts) for name in ("seconds", "controller_seconds"))
    return Rollout(answers, None, seconds, of_controller)


def _agent(setting: Setting, kind: Kind) -> Agent:
    agent = setting.new_agent(kind)
    agent.load_trained(load_file(agent_directory(setting.experiment, kind) / ENSEMBLE / AGENT_FILE))
    return agent.eval()


def _router(setting: Setting) -> Controller:
    """Learnt from what every single model earns on training prompts."""
    some = setting.splits.train.select(range(min(_ROUTED, len(setting.splits.train))))
    batch, turns = setting.experiment.evaluate.batch, setting.experiment.dynamic.turns
    corners = torch.eye(len(setting.models))
    values = values_of_fixed(setting.engine, setting.judge, some, corners, setting.decoding, turns, batch)  # (K, P)
    agent = setting.new_agent("ppo")
    features = features_of(agent, setting.engine, list(some["prompt"]), setting.decoding, turns, batch)
    return fit_router(agent, features, values.T)


def _by_prompt(values: NDArray[np.float64], found: Rollout, prompts: int) -> NDArray[np.float64]:
    """Mean (P,) of values of answers over the turns of each prompt."""
    rows = np.array([answer.row for answer in found.answers])
    return np.bincount(rows, values, minlength=prompts) / np.bincount(rows, minlength=prompts)


def _system(
    setting: Setting,
    name: str,
    span: int | str | None,
    found: Rollout,
    values: NDArray[np.float64],
    reference: NDArray[np.float64],
    scores: NDArray[np.float64],
) -> System:
    weights = np.array([row for answer in found.answers for row in answer.weights]).mean(0)
    gain, low, high = paired_gain(values, reference)
    return System(
        name,
        span,
        float(values.mean()),
        float(values.std(ddof=1) / len(values) ** 0.5),
        gain,
        low,
        high,
        dict(zip(setting.experiment.objectives, scores.mean(0).tolist(), strict=True)),
        dict(zip(setting.models, weights.tolist(), strict=True)),
        found.tokens,
        found.tokens / found.seconds,
        found.controller_seconds / found.seconds,
    )


def _oracle(values: NDArray[np.float64], reference: NDArray[np.float64]) -> System:
    gain, low, high = paired_gain(values, reference)
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    return System("oracle router", None, float(values.mean()), error, gain, low, high, {}, {}, 0, 0.0, 0.0)


def paired_gain(values: NDArray[np.float64], reference: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean gain (of P prompts) on a reference, and its 95 % interval by resampling prompts."""
    gains = values - reference
    drawn = np.random.default_rng(seed).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.quantile(gains[drawn].mean(1), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def _write(
    setting: Setting,
    run: Run,
    systems: Sequence[System],
    controllers: Sequence[tuple[str, Controller, int | str]],
    rollouts: Sequence[Rollout],
    scores: Sequence[NDArray[np.float64]],
    fixed: dict[str, Any],
    best: str,
) -> None:
    rows = []
    for (name, _, span), found, own in zip(controllers, rollouts, scores, strict=True):
        for answer, score in zip(found.answers, own.tolist(), strict=True):
            said = {"system": name, "span": str(span), "prompt_index": answer.row, "turn": answer.turn}
            said |= {"prompt": prompt_text(answer.prompt), "completion": answer.text, "tokens": answer.tokens}
            rows.append({**said, **dict(zip(setting.experiment.objectives, score, strict=True)), "weights": answer.weights})
    with written_whole(run.path / "answers.parquet") as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)
    result = {
        "systems": [asdict(system) for system in systems],
        "best": best,
        "fixed": {"weights": dict(zip(setting.models, fixed["weights"], strict=True)), "validation": fixed["value"]},
        "objectives": list(setting.experiment.objectives),
        "prompts": len(setting.splits.test),
        "updates": setting.experiment.dynamic.ppo.updates,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }
    write_json(run.path / "result.json", result)
    run.finish()


def _said(setting: Setting, weights: Sequence[float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in zip(setting.models, weights, strict=True))
