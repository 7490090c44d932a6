"""Where the seconds of a GRPO training go, part by part, beside a bound; `benchmarks.training --profile` starts this.

A stopwatch stands at TRL's and emorl's seams; a part's seconds are its own, without those of parts inside it;
*start* is once a training: garbage collected, the optimiser built. *Bound*: FLOPs of
the real tokens / measured matmul rate (2 a parameter and token forward, 2 backward, since LoRA asks for no gradient of the
base's weights; attention, softmax and norms count nothing); where one forward reads more than it multiplies, its weights /
measured memory bandwidth. Weights that fit in a cache are read faster than that.

    python -m benchmarks.training_parts emorl EXPERIMENT.yaml PARTS.json float32 cpu
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler
from trl import GRPOTrainer

from benchmarks import bare_trl
from benchmarks.decode import CLOCKS, measure_machine
from emorl.cli import main as emorl
from emorl.training import validation
from emorl.training.trainers import GRPOPolicyTrainer

REST = "the rest of the loop"
PARTS = ("sampling", "scoring", "reference", "forward", "backward", "optimiser", "callbacks", "checkpoints", REST)
APART = ("start", "validation", "validation: KL")


class Stopwatch:
    """Seconds by part; of nested parts the innermost one counts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock, self._running, self._since = clock, list[str](), 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True)
class Sizes:
    """Parameters of a policy."""

    body: int
    """of the base, less its embedding and its head"""
    head: int
    lora: int
    itemsize: int
    """bytes of one of the base's"""


@dataclass(frozen=True)
class Machine:
    bandwidth: float
    """bytes/s"""
    rate: float
    """FLOP/s"""


@dataclass
class Work:
    """What a training computed: lengths, in tokens, of every prompt and completion, one list a step."""

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    computed: int = 0
    """tokens in the padded batches"""
    sizes: Sizes | None = None

    def add(self, trainer: Any, inputs: dict[str, Tensor]) -> None:
        """A batch, as TRL's loss gets it."""
        self.prompts.append(inputs["prompt_mask"].sum(1).tolist())
        self.completions.append(inputs["completion_mask"].sum(1).tolist())
        self.computed += inputs["prompt_mask"].numel() + inputs["completion_mask"].numel()
        self.sizes = self.sizes or sizes_of(trainer.accelerator.unwrap_model(trainer.model))

    @property
    def real(self) -> int:
        return sum(map(sum, self.prompts)) + sum(map(sum, self.completions))


def sizes_of(policy: Any) -> Sizes:
    """Of a PEFT model with a LoRA adapter; a head that is the embedding too is no part of the body either."""
    base = policy.get_base_model()
    apart = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    weights = {name: one for name, one in base.named_parameters() if id(one) not in apart}
    lora = sum(one.numel() for name, one in weights.items() if "lora_" in name)
    head = base.get_output_embeddings().weight
    return Sizes(sum(one.numel() for one in weights.values()) - lora, head.numel(), lora, head.dtype.itemsize)


def bounds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds that no training of this work can go below, by part."""
    assert work.sizes is not None
    body, head, lora = work.sizes.body, work.sizes.head, work.sizes.lora
    reading = (body + head) * work.sizes.itemsize / machine.bandwidth

    def forward(products: float) -> float:
        return max(reading, 2 * products / machine.rate)

    found: dict[str, float] = dict.fromkeys(("sampling", "reference", "forward", "backward"), 0.0)
    for prompts, completions in zip(work.prompts, work.completions, strict=True):
        answered = sum(completions)
        tokens = sum(prompts) + answered
        found["sampling"] += forward((body + lora) * sum(prompts) + head * len(prompts))
        for step in range(1, max(completions)):  # the prompt's forward gives the first token
            found["sampling"] += forward((body + lora + head) * sum(length > step for length in completions))
        found["reference"] += forward(body * tokens + head * answered)
        found["forward"] += forward((body + lora) * tokens + head * answered)
        found["backward"] += forward((body + 2 * lora) * tokens + head * answered)
    return found


@contextmanager
def watched(watch: Stopwatch, work: Work) -> Iterator[None]:
    """A stopwatch at every seam of a GRPO training."""

    def log_probabilities(*_: Any) -> str:
        return "forward" if torch.is_grad_enabled() else "reference"

    def loss(trainer: Any, _: Any, inputs: Any, *__: Any) -> str:
        work.add(trainer, inputs)
        return "forward"

    seams: list[tuple[Any, str, str | Callable[..., str]]] = [
        (GRPOTrainer, "train", REST),
        (Accelerator, "free_memory", "start"),
        (Trainer, "_prepare_for_training", "start"),
        (GRPOTrainer, "_generate_single_turn", "sampling"),
        (GRPOTrainer, "_calculate_rewards", "scoring"),
        (GRPOTrainer, "_get_per_token_logps_and_entropies", log_probabilities),
        (GRPOTrainer, "_compute_loss", loss),
        (Accelerator, "backward", "backward"),
        (Accelerator, "clip_grad_norm_", "optimiser"),
        (torch.optim.AdamW, "step", "optimiser"),
        (CallbackHandler, "call_event", "callbacks"),
        (GRPOTrainer, "_save_checkpoint", "checkpoints"),
        (Trainer, "_load_best_model", "checkpoints"),
        (GRPOPolicyTrainer, "evaluate", "validation"),
        (validation, "kl_to_base", "validation: KL"),
    ]
    with ExitStack() as stack:
        for owner, name, part in seams:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), part, watch)))
        yield


def _timed(call: Callable[..., Any], part: str | Callable[..., str], watch: Stopwatch) -> Callable[..., Any]:
    def timed(*positional: Any, **named: Any) -> Any:
        with watch.part(part if isinstance(part, str) else part(*positional)):
            return call(*positional, **named)

    return timed


def main(arguments: Sequence[str]) -> int:
    way, settings, output, dtype, clock = arguments
    machine = Machine(*measure_machine(getattr(torch, dtype)))
    watch, work = Stopwatch(CLOCKS[clock]), Work()
    with watched(watch, work):
        if way == "trl":
            bare_trl.train(json.loads(Path(settings).read_text()))
        elif emorl(["train", settings]):
            return 1
    told = {
        "seconds": watch.seconds,
        "work": asdict(work),
        "machine": asdict(machine),
    }
    Path(output).write_text(json.dumps(told, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
