"""Training of an agent (RLAE, arXiv 2506.00439): PPO or MAPPO on texts that its ensemble writes, rewarded at their end.

Departures from the paper's released code: see `ppo.py` and `agent.py`. Rewards are any objectives, as one value; by default
less what the best fixed weights earn on the same prompt, so that only what moving the weights is worth gets reinforced. Kept is
the agent with the best validation, not the last.
"""

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from emorl.config import UserError
from emorl.config.dynamic import AgentKind
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.answer_value import mean_by_row
from emorl.dynamic.ensemble import AGENT_FILE
from emorl.dynamic.processes import shared_out, this_process
from emorl.dynamic.rivals import values_of_fixed
from emorl.dynamic.rollout import Decisions, Sampler, write
from emorl.dynamic.setting import Setting
from emorl.runs.layout import ENSEMBLE
from emorl.runs.progress import Bar, Progress
from emorl.runs.results import AgentResult
from emorl.runs.run import written_whole

_CHECKPOINT = "checkpoint.pt"
_Values = dict[tuple[int, int], float]  # (place in the update, turn) -> what an answer is worth


def load_ppo() -> Any:
    """The module `ppo`, which needs the extra `rl`: a UserError where that is not installed."""
    try:
        return importlib.import_module("emorl.dynamic.agents.ppo")
    except ModuleNotFoundError as error:
        raise UserError(f"training an agent needs {error.name}: pip install 'emorl[rl]'") from None


def train_agent(setting: Setting, kind: AgentKind, fixed: Sequence[float], folder: Path, progress: Progress) -> AgentResult:
    """Trains one agent, or goes on with it, in every process of a distributed run; the main one writes to the folder: the
    artifact in `ensemble/`, one line per update in `log.jsonl`, checkpoints.

    Args:
        fixed: the best fixed weights, whose values are the baseline.
    """
    return _Training(setting, kind, fixed, folder).run(progress)


def trained_agent(setting: Setting, kind: AgentKind, folder: Path) -> SpanAgent:
    """The agent whose training ended in a folder."""
    agent = setting.new_agent(kind)
    agent.load_trained(load_file(folder / ENSEMBLE / AGENT_FILE))
    return agent.eval()


class _Training:
    """One agent's training; every process of a distributed run has one, and they stay alike."""

    def __init__(self, setting: Setting, kind: AgentKind, fixed: Sequence[float], folder: Path) -> None:
        self._setting, self._kind, self._folder = setting, kind, folder
        self._config = setting.config.ppo
        self._fixed = torch.tensor(fixed)
        self._agent = setting.new_agent(kind)
        self._learner = load_ppo().Learner(self._agent, self._config, setting.seed)
        self._baseline: dict[int, float] = {}  # training prompt -> what the fixed weights earn
        self._updates = 0
        self._log: list[dict[str, float]] = []
        self._best: tuple[float, dict[str, torch.Tensor], int] | None = None

    def run(self, progress: Progress) -> AgentResult:
        """All updates that are missing, and the result."""
        is_interrupted = (self._folder / _CHECKPOINT).exists()
        this_process().wait_for_everyone()  # before one of them writes it
        if is_interrupted:
            self._load()
            progress.say(f"dynamic: {self._kind} goes on behind update {self._updates}")
        else:
            self._validate()
        with progress.bar(f"train {self._kind}", self._config.updates, done=self._updates) as bar:
            while self._updates < self._config.updates:
                self._update(bar)
                if self._updates % self._config.checkpoint == 0 or self._updates == self._config.updates:
                    self._validate()
        return self._finish(progress)

    def _update(self, bar: Bar) -> None:
        data = self._setting.splits.train
        generator = np.random.default_rng([self._setting.seed, self._updates])
        count = min(self._config.prompts, len(data))
        rows = np.repeat(generator.choice(len(data), count, replace=False), self._config.samples).tolist()
        noise = generator.integers(2**31, size=len(rows)).tolist()
        self._add_baselines(rows)
        parts = shared_out(list(zip(range(len(rows)), rows, noise, strict=True)), self._play)
        decisions = _joined([part for part, _ in parts])
        values = {key: value for _, of_part in parts for key, value in of_part.items()}
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

    def _play(self, tasks: Sequence[tuple[int, int, int]]) -> tuple[Decisions, _Values]:
        """Decisions and values of texts for some training prompts under sampled actions: (place, row, noise) of each."""
        batch = self._setting.config.batch
        parts = [self._play_batch(tasks[start : start + batch]) for start in range(0, len(tasks), batch)]
        return _joined([part for part, _ in parts]), {key: value for _, of_part in parts for key, value in of_part.items()}

    def _play_batch(self, tasks: Sequence[tuple[int, int, int]]) -> tuple[Decisions, _Values]:
        setting, data = self._setting, self._setting.splits.train
        places, rows, noise = zip(*tasks, strict=True)
        rollout = write(
            setting.engine,
            [data["prompt"][row] for row in rows],
            Sampler(self._agent, noise),
            setting.decoding,
            span=setting.config.span,
            turns=setting.config.turns,
            seeds=noise,
        )
        values = setting.value.values(data, rollout.answers, rows).tolist()
        decisions = rollout.decisions
        assert decisions is not None, "every text has a first span"
        decisions = replace(decisions, rows=torch.tensor(places)[decisions.rows])
        return decisions, {(places[a.row], a.turn): value for a, value in zip(rollout.answers, values, strict=True)}

    def _add_baselines(self, rows: Sequence[int]) -> None:
        """What the fixed weights earn on the prompts that are new; each is answered once in the whole training."""
        missing = sorted({row for row in rows if row not in self._baseline})
        if self._config.baseline != "fixed" or not missing:
            return
        values = values_of_fixed(self._setting, self._setting.splits.train.select(missing), self._fixed[None])
        self._baseline |= dict(zip(missing, values[0].tolist(), strict=True))

    def _rewards(self, values: _Values, rows: Sequence[int]) -> _Values:
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
        value = float(np.mean(_validation_values(self._setting, self._agent)))
        if self._log:
            self._log[-1]["validation"] = value
        state = {name: tensor.clone() for name, tensor in self._agent.trained_state().items()}
        if self._best is None or value > self._best[0]:
            self._best = (value, state, self._updates)
        if not this_process().is_main_process:
            return
        content = {
            "learner": self._learner.state(),
            "updates": self._updates,
            "baseline": self._baseline,
            "best": {"value": self._best[0], "agent": self._best[1], "update": self._best[2]},
            "log": self._log,
        }
        with written_whole(self._folder / _CHECKPOINT) as temporary:
            torch.save(content, temporary)
        with written_whole(self._folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self._log))

    def _load(self) -> None:
        content = torch.load(self._folder / _CHECKPOINT, weights_only=True)
        self._learner.load_state(content["learner"])
        self._updates, self._baseline, self._log = content["updates"], content["baseline"], content["log"]
        self._best = (content["best"]["value"], content["best"]["agent"], content["best"]["update"])

    def _finish(self, progress: Progress) -> AgentResult:
        assert self._best is not None, "the start is validated"
        value, state, kept = self._best
        self._agent.load_trained(state)
        if this_process().is_main_process:
            shutil.rmtree(self._folder / ENSEMBLE, ignore_errors=True)  # of fewer updates, or of a process killed here
            self._setting.ensemble(self._agent).save_pretrained(self._folder / ENSEMBLE)
        this_process().wait_for_everyone()
        progress.say(f"dynamic: {self._kind} has {value:.3f} on validation, of update {kept}")
        return AgentResult(value, kept, self._updates)


def _validation_values(setting: Setting, agent: SpanAgent) -> list[float]:
    """Value of each validation prompt under the agent's mean actions; shared by processes."""
    data, ensemble = setting.splits.validation, setting.ensemble(agent)

    def work(rows: Sequence[int]) -> list[float]:
        answers = ensemble.generate([data["prompt"][row] for row in rows], seeds=rows, batch=setting.config.batch)
        return mean_by_row(setting.value.values(data, answers, rows), answers, len(rows)).tolist()

    return [value for part in shared_out(range(len(data)), work) for value in part]


def _joined(parts: Sequence[Decisions]) -> Decisions:
    return Decisions(
        {key: torch.cat([part.data[key] for part in parts]) for key in parts[0].data},
        torch.cat([part.rows for part in parts]),
        torch.cat([part.turns for part in parts]),
    )
