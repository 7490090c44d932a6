"""The ensemble as TRL's DistillationTrainer reads a teacher: a backbone that gives one last hidden state, and a head.

The ensemble is exactly that, one mixed hidden state before one head, so the divergence from it needs no other form. This is a
view: it holds the ensemble's own tensors, which are those of the base. TRL hands teacher and student the same tokens; where the
teacher is to read other prompts (without the line that tells a student the weights) or other weights in each row, `asked` says
so for the forward within its block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.modeling_outputs import BaseModelOutput

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError

_PROBE = (2, 5)  # sequences and tokens on which the view is compared with the ensemble
_EXACT = {torch.float32: 1e-3, torch.float64: 1e-6}  # nats; of other precisions:
_ROUNDED = 0.1


@dataclass(frozen=True, eq=False)
class Asked:
    """How the teacher is asked: prompts (B, P) with their mask, padded on the left, and weights (B, K)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    weights: Tensor
    new_tokens: int
    """how many tokens of the student's text come behind its own prompts"""


class EnsembleTeacher(nn.Module):
    """An ensemble of decoders with what DistillationTrainer asks of a teacher: `base_model`, `get_output_embeddings()`, and
    `config` with the `vocab_size`.

    >>> DistillationTrainer(model=student, teacher_model=EnsembleTeacher(ensemble), args=config, train_dataset=prompts)
    """

    def __init__(self, ensemble: HiddenStateEnsemble) -> None:
        """
        Raises:
            UserError: the base does more between its last hidden state and its logits than one linear head and what TRL reads
                in its configuration, so the view would be another model.
        """
        super().__init__()
        self.config = ensemble.config
        self.base_model = MixedBackbone(ensemble)
        self._check_exact()

    def get_output_embeddings(self) -> nn.Module:
        """The base's own head, which all policies share."""
        return self.base_model.ensemble.policies.get_output_embeddings().head  # pyright: ignore

    @contextmanager
    def asked(self, asked: Asked) -> Iterator[None]:
        """Within the block, the teacher reads these prompts and weights instead of the student's prompts and its own
        weights."""
        self.base_model.asked = asked
        try:
            yield
        finally:
            self.base_model.asked = None

    @torch.no_grad()
    def _check_exact(self) -> None:
        ensemble = self.base_model.ensemble
        name, head = type(ensemble.policies).__name__, self.get_output_embeddings()
        if ensemble.config.is_encoder_decoder or ensemble.policies.base_model is ensemble.policies:
            raise UserError(
                f"{name} has no decoder alone before its head, which distillation needs; take a decoder as the base"
            )
        count = _PROBE[0] * _PROBE[1]
        tokens = torch.linspace(1, ensemble.config.get_text_config().vocab_size - 1, count, device=ensemble.device)
        ids = tokens.long().view(_PROBE)
        hidden = self.base_model(ids, torch.ones_like(ids)).last_hidden_state
        weight, bias = (getattr(head, part, None) for part in ("weight", "bias"))
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise UserError(f"{name}'s head is no plain linear layer, so its ensemble cannot be a teacher; load it unquantised")
        seen = linear(hidden, weight, bias) * _scale(ensemble.config.get_text_config())
        meant = ensemble(input_ids=ids).logits
        gap = float((seen.float().log_softmax(-1) - meant.float().log_softmax(-1)).abs().max())
        if not gap <= _EXACT.get(meant.dtype, _ROUNDED):
            raise UserError(
                f"{name} changes what its head gives in a way that TRL's distillation does not know (up to {gap:.2g} nats), so "
                "its ensemble cannot be a teacher; fuse the policies instead (`emorl fuse`)"
            )


class MixedBackbone(nn.Module):
    """Tokens (B, T) to the ensemble's mixed hidden states; with `asked`, to those of other prompts before the same text."""

    def __init__(self, ensemble: HiddenStateEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.asked: Asked | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
        """`last_hidden_state` (B, T', H), whose last positions are those of the student's text."""
        weights = None
        if self.asked is not None:
            text = slice(input_ids.shape[1] - self.asked.new_tokens, None)
            input_ids = torch.cat([self.asked.prompt_ids, input_ids[:, text]], 1)
            attention_mask = torch.cat([self.asked.prompt_mask, attention_mask[:, text]], 1)
            weights = self.asked.weights
        hidden: Any = self.ensemble.mixed_hidden_states(input_ids, attention_mask, weights)
        return BaseModelOutput(last_hidden_state=hidden)


def _scale(config: Any) -> float:
    """What TRL multiplies logits with, by the names that families have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 if scaling is None else float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
