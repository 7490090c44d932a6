"""The agent's reading: any transformers encoder over prompt and recent text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from emorl.config import UserError
from emorl.policies.loading import read_config, read_model, read_tokenizer

_WHAT = "dynamic.agent.encoder"


class TextEncoder(nn.Module):
    """Mean of the last hidden states over a text's tokens. Frozen, or with a LoRA adapter that learns.

    Raises:
        UserError: no such encoder, or settings that peft refuses.
    """

    def __init__(self, name: str, context: int, lora: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.tokenizer = read_tokenizer(name, _WHAT)
        model = read_model(AutoModel, name, _WHAT, is_new=lambda _, tensor: "pooler." in tensor, dtype=torch.float32)
        self._positions = min(context, getattr(model.config, "max_position_embeddings", context) or context)
        self.width: int = model.config.hidden_size
        self.is_tuned = lora is not None
        if lora is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                try:
                    model = get_peft_model(model, LoraConfig(**lora))
                except (TypeError, ValueError) as error:
                    raise UserError(f"dynamic.agent.lora: {str(error).splitlines()[0]:.200}") from None
        self.model = model.eval()

    def tokenize(self, texts: Sequence[str], *, keep_end: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, context), padded to one length; of a longer text its end, or its beginning."""
        self.tokenizer.truncation_side = "left" if keep_end else "right"
        found = self.tokenizer(
            list(texts), truncation=True, max_length=self._positions, padding="max_length", return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (B, E) in float32 of ids and mask (B, T); an empty text is zeros."""
        used = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
        first = int(mask.any(0).nonzero().min()) if bool(mask.any()) else 0
        ids, mask = ids[:, first:used], mask[:, first:used]
        device = next(self.model.parameters()).device
        with torch.set_grad_enabled(self.is_tuned and torch.is_grad_enabled()):
            states = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
        weight = mask.to(device)[..., None].float()
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def check_encoder(name: str) -> None:
    """Refuses an encoder that is not there, before anything else is loaded: UserError."""
    read_config(name, _WHAT)
