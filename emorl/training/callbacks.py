"""What watches a training run: convergence, collapse, cost and progress.

Convergence and collapse read the trainer's stored log, so a resumed run decides as an uninterrupted one would.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emorl.objectives.loading import Objective
from emorl.policies.conversation import answer_in, as_completion, completion_text
from emorl.runs.progress import Bar
from emorl.runs.run import Cost, Run

logger = logging.getLogger(__name__)


def has_converged(validations: Sequence[float], window: int, threshold: float) -> bool:
    """EMORL's stopping rule: standard deviation / |mean| of the last `window` validation means is below `threshold`."""
    last = validations[-window:]
    if len(last) < window or statistics.fmean(last) == 0:
        return False
    return statistics.pstdev(last) / abs(statistics.fmean(last)) < threshold


def _validations(state: TrainerState, key: str) -> list[float]:
    return [entry[key] for entry in state.log_history if key in entry]


class ConvergenceCallback(TrainerCallback):
    """Stops training when validation rewards no longer vary."""

    def __init__(self, window: int, threshold: float) -> None:
        self.reason = ""
        self._window, self._threshold = window, threshold

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:  # fmt: skip
        if has_converged(_validations(state, "eval_reward"), self._window, self._threshold):
            self.reason = f"converged: coefficient of variation below {self._threshold} over {self._window} validations"
            control.should_training_stop = True


class CollapseCallback(TrainerCallback):
    """Warns of collapse, stops after `patience` collapsed validations, and writes `eval_selection`.

    `eval_selection`, by which the best checkpoint is chosen, is the validation reward; for a checkpoint that has gone more
    than half the way to collapse it is the lowest reward seen so far, so that it never displaces one that has not. Half the
    way, because what is just above the limit on few validation prompts is often below it on others.
    """

    def __init__(self, share: float, patience: int) -> None:
        self.reason = ""
        self._share, self._patience = share, patience

    def is_collapsed(self, distinct: float, base_distinct: float) -> bool:
        return distinct < self._share * base_distinct

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        rewards, shares = _validations(state, "eval_reward"), _validations(state, "eval_distinct_share")
        assert metrics is not None
        assert rewards, "validation is logged before this is called"
        collapsed = [self.is_collapsed(share, shares[0]) for share in shares]
        half_way = (1 + self._share) / 2 * shares[0] if self._share > 0 else 0.0
        metrics["eval_selection"] = rewards[-1] if shares[-1] >= half_way else min(rewards)
        if collapsed[-1]:
            logger.warning(
                "step %d: the policy is collapsing: distinct completions %.2f, base %.2f",
                state.global_step, shares[-1], shares[0],
            )  # fmt: skip
        if len(collapsed) >= self._patience and all(collapsed[-self._patience :]):
            self.reason = f"collapsed in {self._patience} validations in a row"
            control.should_training_stop = True


class KeepCallback(TrainerCallback):
    """Calls what keeps the policy, after the steps asked for; in the main process."""

    def __init__(self, keep: Mapping[int, Callable[[], None]]) -> None:
        self._keep = keep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:  # fmt: skip
        if state.global_step in self._keep and state.is_world_process_zero:
            self._keep[state.global_step]()


class CostCallback(TrainerCallback):
    """Adds up what training consumed and writes it to the run at every validation, so that a kill loses little of it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending = Cost()
        self._since = time.perf_counter()

    def add(self, cost: Cost) -> None:
        self._pending += cost

    def flush(self) -> None:
        now = time.perf_counter()
        self._pending += Cost(seconds=now - self._since)
        self._since = now
        self._run = self._run.add_cost(self._pending)
        self._pending = Cost()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        assert metrics is not None
        completions, calls = int(metrics["eval_completions"]), int(metrics["eval_reward_calls"])
        self.add(Cost(prompts=completions, completions=completions, tokens=int(metrics["eval_tokens"]), reward_calls=calls))
        self.flush()


class RewardCounter:
    """The objective's rewards (of log scores where its scale says so) as TRL's reward function, counting what is scored; all
    processes of a distributed run are counted. Of several that score the same completions, the `first` counts these."""

    def __init__(self, objective: Objective, cost: CostCallback, first: bool = True, after: str | None = None) -> None:
        """`after` is the mark behind which answers begin, which alone are scored."""
        self.__name__ = objective.name
        self._objective, self._cost, self._first, self._after = objective, cost, first, after

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        processes = PartialState().num_processes
        cost = Cost(reward_calls=len(completions) * processes)
        if self._first:
            cost += Cost(
                prompts=len({str(prompt) for prompt in prompts}) * processes,
                completions=len(completions) * processes,
                tokens=sum(map(len, completion_ids)) * processes,
            )
        self._cost.add(cost)
        if self._after is not None:
            texts = [answer_in(completion_text(completion), self._after) for completion in completions]
            completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        scores = self._objective(prompts, completions, completion_ids=completion_ids, **columns)
        return self._objective.rewards(scores)


class ProgressCallback(TrainerCallback):
    """Moves a progress bar with what training has logged last, and the last validation."""

    def __init__(self, bar: Bar, key: str, name: str, validated: str = "eval_reward") -> None:
        """`key` is what the trainer logs, which the bar calls `name`; `validated` what a validation logs."""
        self._bar, self._key, self._name, self._validated = bar, key, name, validated
        self._shown = 0
        self._validation = math.nan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run goes on with what it has logged before."""
        self._shown = state.global_step
        self._validation = (_validations(state, self._validated) or [math.nan])[-1]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._validation = (logs or {}).get(self._validated, self._validation)
        if logs and self._key in logs:
            note = f"{self._name} {logs[self._key]:.3f}  validation {self._validation:.3f}"
            self._bar.advance(state.global_step - self._shown, note)
            self._shown = state.global_step
