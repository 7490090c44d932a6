"""Training of a controller (RLAE, arXiv 2506.00439): PPO or MAPPO on texts that its ensemble writes, rewarded at their end.

Departures from the paper's released code: see `ppo.py` and `agent.py`. Rewards are any objectives, as one value; by default
less what the best fixed weights earn on the same prompt, so that only what moving the weights is worth gets reinforced. Kept is
the agent with the best validation, not the last.
"""

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.config.yaml import as_mapping
from emorl.data import Splits
from emorl.dynamic.agents.agent import Agent, Kind
from emorl.dynamic.agents.text_encoder import check_encoder
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.ensemble import ENSEMBLE, DynamicEnsemble, decoding_of, references_of
from emorl.dynamic.fixed_weights import values_by_task, values_of_fixed
from emorl.dynamic.judging import Judge
from emorl.dynamic.processes import shared_out, this_process
from emorl.dynamic.rollout import Decisions, Sampler, write
from emorl.runs.progress import Bar, Progress
from emorl.runs.run import Run, only_process, open_run, read_json, write_json, written_whole

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Setting:
    """What all stages of a dynamic ensemble work on."""

    experiment: Experiment
    engine: Engine
    models: dict[str, str]
    splits: Splits
    judge: Judge

    @property
    def decoding(self) -> Decoding:
        return decoding_of(self.experiment.generation, self.experiment.seed)

    def ensemble(self, agent: Agent) -> DynamicEnsemble:
        """The models under a controller, as this experiment writes."""
        config = self.experiment.dynamic
        references = references_of(self.models, self.experiment)
        return DynamicEnsemble(self.engine, agent, self.decoding, span=config.span, turns=config.turns, references=references)

    def new_agent(self, kind: Kind) -> Agent:
        """As it is before it learns anything."""
        config = self.experiment.dynamic
        return Agent(
            kind,
            len(self.models),
            self.engine.state_width,
            config.agent,
            config.ppo.first_deviation,
            self.experiment.seed,
        ).to(self.engine.device)


def agent_directory(experiment: Experiment, kind: Kind) -> Path:
    """Of an agent's training run."""
    return experiment.output / "dynamic" / kind


def training_identity(experiment: Experiment, models: dict[str, str]) -> dict[str, Any]:
    """Settings that a trained controller depends on."""
    whole = as_mapping(experiment)
    dynamic = {k: v for k, v in whole["dynamic"].items() if k not in ("agents", "spans", "models")}
    dynamic["ppo"] = {k: v for k, v in whole["dynamic"]["ppo"].items() if k != "updates"}  # more of them go on
    value = whole["value"]
    kept = {key: whole[key] for key in ("base", "data", "objectives", "generation", "seed")}
    return {**kept, "value": value, "dynamic": dynamic, "models": models}


def check_training(experiment: Experiment, models: dict[str, str]) -> None:
    """Refuses what would fail after hours: a missing extra, an encoder that is not there, a run of other settings.

    Raises:
        UserError: one of these.
    """
    _ppo()
    if experiment.dynamic.agent.encoder is not None:
        check_encoder(experiment.dynamic.agent.encoder)
    for kind in experiment.dynamic.agents:
        path = agent_directory(experiment, kind)
        if (path / "run.json").exists():
            open_run(path, f"dynamic {kind}", training_identity(experiment, models))


def _ppo() -> Any:
    try:
        return importlib.import_module("emorl.dynamic.agents.ppo")  # needs the extra `rl`
    except ModuleNotFoundError as error:
        raise UserError(f"training a controller needs {error.name}: pip install 'emorl[rl]'") from None


def train_agent(setting: Setting, kind: Kind, fixed: Sequence[float], progress: Progress) -> Path:
    """Trains one controller, or goes on with it; returns its run directory, with the artifact in `ensemble/`, one line per
    update in `log.jsonl`, and `result.json`.

    Args:
        fixed: the best fixed weights, whose values are the baseline.
    """
    path = agent_directory(setting.experiment, kind)
    if not this_process().is_main_process:
        _Training(setting, kind, fixed, None).run(progress)
        return path
    with only_process(path):
        run = open_run(path, f"dynamic {kind}", training_identity(setting.experiment, setting.models))
        _Training(setting, kind, fixed, run).run(progress)
    return path


class _Training:
    """One controller's training; every process of a distributed run has one, and they stay alike."""

    def __init__(self, setting: Setting, kind: Kind, fixed: Sequence[float], run: Run | None) -> None:
        self._setting, self._kind, self._run = setting, kind, run
        self._path = agent_directory(setting.experiment, kind)
        self._config = setting.experiment.dynamic.ppo
        self._fixed = torch.tensor(fixed)
        self._agent = setting.new_agent(kind)
        self._learner = _ppo().Learner(self._agent, self._config, setting.experiment.seed)
        self._baseline: dict[int, float] = {}  # training prompt -> what the fixed weights earn
        self._updates = 0
        self._log: list[dict[str, float]] = []
        self._best: tuple[float, dict[str, torch.Tensor], int] | None = None

    def run(self, progress: Progress) -> None:
        """All updates that are missing, and the result."""
        is_finished = _is_finished(self._path, self._config.updates)
        this_process().wait_for_everyone()
        if is_finished:
            progress.say(f"dynamic: {self._kind} trained before, in {self._path}")
            return
        if (self._path / _CHECKPOINT).exists():
            self._load()
            progress.say(f"dynamic: {self._kind} goes on behind update {self._updates}")
        else:
            self._validate()
        with progress.bar(f"train {self._kind}", self._config.updates, done=self._updates) as bar:
            while self._updates < self._config.updates:
                self._update(bar)
                if self._updates % self._config.checkpoint == 0 or self._updates == self._config.updates:
                    self._validate()
        self._finish(progress)

    def _update(self, bar: Bar) -> None:
        seed, data = self._setting.experiment.seed, self._setting.splits.train
        generator = np.random.default_rng([seed, self._updates])
        count = min(self._config.prompts, len(data))
        rows = np.repeat(generator.choice(len(data), count, replace=False), self._config.samples).tolist()
        noise = generator.integers(2**31, size=len(rows)).tolist()
        self._add_baselines(rows)
        parts = shared_out(list(zip(range(len(rows)), rows, noise, strict=True)), self._play)
        decisions = _joined([part for part, _ in parts])
        values = {key: value for _, found in parts for key, value in found.items()}
        figures = self._learner.learn(decisions, self._rewards(values, rows))
        self._updates += 1
        line = {
            "update": self._updates,
            "value": float(np.mean(list(values.values()))),
            **({"fixed": float(np.mean([self._baseline[row] for row in rows]))} if self._baseline else {}),
            **figures,
            "deviation": float(self._agent.log_deviation.detach().exp().mean()),
            "largest_weight": float(self._agent.weights(decisions.data["action"]).amax(-1).mean()),
        }
        self._log.append(line)
        bar.advance(1, f"value {line['value']:.3f}" + (f" (fixed {line['fixed']:.3f})" if "fixed" in line else ""))

    def _play(self, tasks: Sequence[tuple[int, int, int]]) -> tuple[Decisions, dict[tuple[int, int], float]]:
        """Decisions and values, by (place in the update, turn), of texts for some training prompts under sampled actions."""
        batch = self._setting.experiment.evaluate.batch
        parts = [self._play_batch(tasks[start : start + batch]) for start in range(0, len(tasks), batch)]
        return _joined([part for part, _ in parts]), {key: value for _, found in parts for key, value in found.items()}

    def _play_batch(self, tasks: Sequence[tuple[int, int, int]]) -> tuple[Decisions, dict[tuple[int, int], float]]:
        data, config = self._setting.splits.train, self._setting.experiment.dynamic
        prompts = [data["prompt"][row] for _, row, _ in tasks]
        sampler = Sampler(self._agent, [noise for _, _, noise in tasks])
        found = write(
            self._setting.engine,
            prompts,
            sampler,
            self._setting.decoding,
            span=config.span,
            turns=config.turns,
            seeds=[noise for _, _, noise in tasks],
        )
        of_rows = [replace(answer, row=tasks[answer.row][1]) for answer in found.answers]
        values = self._setting.judge.values(self._setting.judge.scores(data, of_rows)).tolist()
        places = torch.tensor([place for place, _, _ in tasks])
        decisions = found.decisions
        assert decisions is not None, "every text has a first span"
        decisions = replace(decisions, rows=places[decisions.rows])
        by_answer = {(tasks[answer.row][0], answer.turn): value for answer, value in zip(found.answers, values, strict=True)}
        return decisions, by_answer

    def _add_baselines(self, rows: Sequence[int]) -> None:
        """What the fixed weights earn on the prompts that are new; each is answered once in the whole training."""
        missing = sorted({row for row in rows if row not in self._baseline})
        if self._config.baseline != "fixed" or not missing:
            return
        setting = self._setting
        some = setting.splits.train.select(missing)
        turns, batch = setting.experiment.dynamic.turns, setting.experiment.evaluate.batch
        values = values_of_fixed(setting.engine, setting.judge, some, self._fixed[None], setting.decoding, turns, batch)
        self._baseline |= dict(zip(missing, values[0].tolist(), strict=True))

    def _rewards(self, values: dict[tuple[int, int], float], rows: Sequence[int]) -> dict[tuple[int, int], float]:
        if self._config.baseline == "fixed":
            return {(place, turn): value - self._baseline[rows[place]] for (place, turn), value in values.items()}
        if self._config.baseline == "none":
            return values
        of_prompt: dict[tuple[int, int], list[float]] = {}
        for (place, turn), value in values.items():
            of_prompt.setdefault((rows[place], turn), []).append(value)
        return {(place, turn): v - float(np.mean(of_prompt[rows[place], turn])) for (place, turn), v in values.items()}

    def _validate(self) -> None:
        """Keeps the agent if it is the best on the validation prompts, and writes a checkpoint."""
        value = float(np.mean(controlled_values(self._setting, self._agent)))
        if self._log:
            self._log[-1]["validation"] = value
        state = {name: tensor.clone() for name, tensor in self._agent.trained_state().items()}
        if self._best is None or value > self._best[0]:
            self._best = (value, state, self._updates)
        if self._run is None:
            return
        content = {
            "learner": self._learner.state(),
            "updates": self._updates,
            "baseline": self._baseline,
            "best": {"value": self._best[0], "agent": self._best[1], "update": self._best[2]},
            "log": self._log,
        }
        with written_whole(self._path / _CHECKPOINT) as temporary:
            torch.save(content, temporary)
        with written_whole(self._path / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self._log))

    def _load(self) -> None:
        content = torch.load(self._path / _CHECKPOINT, weights_only=True)
        self._learner.load_state(content["learner"])
        self._updates, self._baseline, self._log = content["updates"], content["baseline"], content["log"]
        self._best = (content["best"]["value"], content["best"]["agent"], content["best"]["update"])

    def _finish(self, progress: Progress) -> None:
        assert self._best is not None, "the start is validated"
        self._agent.load_trained(self._best[1])
        if self._run is not None:
            shutil.rmtree(self._path / ENSEMBLE, ignore_errors=True)  # of fewer updates, or of a process killed here
            self._setting.ensemble(self._agent).save_pretrained(self._path / ENSEMBLE)
            value, _, kept = self._best
            write_json(self._path / "result.json", {"validation": value, "update": kept, "updates": self._updates})
            self._run.finish()
            progress.say(f"dynamic: {self._kind} has {value:.3f} on validation, of update {kept}")
        this_process().wait_for_everyone()


def controlled_values(setting: Setting, agent: Agent) -> list[float]:
    """Value of each validation prompt under the agent's mean actions; shared by processes."""
    data, ensemble = setting.splits.validation, setting.ensemble(agent)

    def work(rows: Sequence[int]) -> list[float]:
        found = ensemble.rollout(
            [data["prompt"][row] for row in rows], seeds=list(rows), batch=setting.experiment.evaluate.batch
        )
        return values_by_task(setting.judge, data, found.answers, rows)

    return [value for part in shared_out(range(len(data)), work) for value in part]


def _joined(parts: Sequence[Decisions]) -> Decisions:
    return Decisions(
        {key: torch.cat([part.data[key] for part in parts]) for key in parts[0].data},
        torch.cat([part.rows for part in parts]),
        torch.cat([part.turns for part in parts]),
    )


def _is_finished(path: Path, updates: int) -> bool:
    manifest = path / "run.json"
    return (
        manifest.exists()
        and bool(read_json(manifest).get("finished"))
        and read_json(path / "result.json")["updates"] >= updates
    )
