"""TRL's DPOTrainer (Rafailov et al. 2023, arXiv 2305.18290) as the train stage uses it: offline, on pairs of answers.

Pairs of sampled answers come as the tokens that were sampled, so that an answer cut at its greatest length is not taught to end
there; pairs that people made are tokenised by TRL. The base is the reference, with the policy's adapter switched off; what it
gives every pair is computed once, before the first step (by several processes in every step).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from emorl.config import UserError
from emorl.policies.prompts import token_ids
from emorl.training.pairs import at_most
from emorl.training.validation import PAIR_ACCURACY, ValidatedPolicy

STEPS = 100  # most, by default: policies go far fast
HELD_OUT = 256  # most pairs that a policy is measured on at every validation
DPO_BETA = 0.1  # DPO's and TRL's
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def dpo_defaults() -> dict[str, Any]:
    """What the block `train.dpo` leaves out; TRL's cache of the base's log-probabilities is one process's own."""
    return {
        "beta": DPO_BETA,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "precompute_ref_log_probs": int(os.environ.get("WORLD_SIZE", "1")) == 1,
        "max_length": None,  # nothing is cut
    }


@dataclass(frozen=True)
class PairSplits:
    """Pairs to train on and pairs that are held out, of other prompts: columns prompt, chosen and rejected in TRL's formats, or
    their tokens, prompt_ids, chosen_ids and rejected_ids."""

    train: Dataset
    held_out: Dataset


class DPOPolicyTrainer(ValidatedPolicy, DPOTrainer):
    """DPO with emorl's validation, which measures the held-out pairs too."""

    def __init__(self, *, pairs: PairSplits, args: DPOConfig, **options: Any) -> None:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        train = at_most(pairs.train, per_step * args.max_steps, args.seed)
        self.pairs = PairSplits(train, at_most(pairs.held_out, HELD_OUT, args.seed))
        super().__init__(args=args, train_dataset=self.pairs.train, eval_dataset=self.pairs.held_out, **options)

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:  # called by DPOTrainer
        """What is tokenised already stays as it is."""
        if set(_TOKENS) <= set(dataset.column_names):
            return dataset
        return super()._prepare_dataset(dataset, *arguments, **options)

    @torch.no_grad()
    def pair_figures(self) -> dict[str, float]:
        """`pair_accuracy`, the share of held-out pairs whose chosen answer gained more on the base than the rejected one (equal
        ones count half: the base has 0.5), and `pair_margin`, by how much, in nats, on average."""
        margins = torch.cat([self._margins(self._prepare_inputs(batch)) for batch in self.get_eval_dataloader()])
        in_order = (margins > 0).float() + (margins == 0).float() / 2
        return {PAIR_ACCURACY: float(in_order.mean()), "pair_margin": float(margins.mean())}

    def _margins(self, batch: Mapping[str, Tensor]) -> Tensor:
        """log p(chosen) - log p(rejected) under the policy less the same under the base, of all processes' pairs: (B,)."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        model: Any = self.model
        chosen, rejected = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(2)
        if "ref_chosen_logps" in batch:
            base_chosen, base_rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            base_chosen, base_rejected = self.compute_ref_log_probs(model, batch)
        return self.accelerator.gather_for_metrics((chosen - rejected) - (base_chosen - base_rejected))


def as_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], pairs: Any) -> Dataset:
    """Pairs of sampled answers as their trainer reads them.

    Args:
        prompts: the training prompts, which `prompt_index` counts.
        pairs: from `sampled_pairs`.
    """
    asked = {index: token_ids(tokenizer, prompts[index]) for index in set(pairs["prompt_index"])}
    return Dataset.from_dict(
        {
            "prompt_ids": [asked[index] for index in pairs["prompt_index"]],
            "chosen_ids": [list(ids) for ids in pairs["chosen_ids"]],
            "rejected_ids": [list(ids) for ids in pairs["rejected_ids"]],
        }
    )


def check_enough(policy: str, train: int, held_out: int, remedy: str) -> None:
    """Refuses a policy without pairs to learn from, or to be measured on.

    Raises:
        UserError: with what would give more of them.
    """
    if not train or not held_out:
        raise UserError(f"policy {policy}: {train} pairs to train on and {held_out} held out are too few; {remedy}")
