"""One checkpoint with an adapter's deltas added to its weights, tensor by tensor, without loading a model.

In memory are, for each thread, one tensor of the base and its sum. What is added in float32 is rounded to the type that is
written: in bfloat16 a small delta loses more by that than PEFT loses, which keeps it apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from emorl.config import UserError
from emorl.fusion.adapters import common_fingerprint, weighted_sum
from emorl.fusion.checkpoints import Checkpoint, write_checkpoint
from emorl.fusion.export_card import Exported, export_card, fenced, vllm_command
from emorl.fusion.low_rank import LowRank
from emorl.fusion.tensor_files import TensorSpec, read_tensor
from emorl.policies.adapters import fingerprint_of
from emorl.runs.progress import Progress
from emorl.runs.run import write_text

_ROUNDED = """
Sums are rounded to {dtype}: greedy texts may part from the adapter's where two tokens are close. `--dtype float32` keeps
them."""
_USE = """{served}In Python:

```python
from transformers import {kind}, AutoTokenizer
model, tokenizer = ({name}.from_pretrained("{output}") for {name} in ({kind}, AutoTokenizer))
```

"""


def export_merged(
    what: Exported, directory: Path, output: Path, base: Checkpoint, dtype: torch.dtype, progress: Progress
) -> dict[str, Any]:
    """Writes the base with the weighted sum in its weights, and a card.

    Args:
        directory: is there, for files.
        output: where that will lie, for the card.

    Raises:
        UserError: a base that the policies do not fit.
    """
    adapters = list(what.adapters.values())
    check_same_base(base, what.config, common_fingerprint(adapters))
    modules = weighted_sum(adapters, what.vector)
    write_merged(directory, base, modules, fan_in_fan_out=adapters[0].fan_in_fan_out, dtype=dtype, progress=progress)
    said = str(dtype).removeprefix("torch.")
    kind = "AutoModelForSeq2SeqLM" if what.config.is_encoder_decoder else "AutoModelForCausalLM"
    rounded = "" if dtype == torch.float32 else _ROUNDED.format(dtype=said)
    summary = f"One model in {said}: the base with the policies' weighted sum in {len(modules)} of its weights.{rounded}"
    command = vllm_command(what, str(output))
    use = _USE.format(served=fenced(command), kind=kind, name="one", output=output)
    write_text(directory / "README.md", export_card(what, "A model exported by emorl", "transformers", summary, use))
    return {"dtype": said, "command": command}


def write_merged(
    directory: Path,
    base: Checkpoint,
    modules: Mapping[str, LowRank],
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Writes the checkpoint, with the base's config, tokenizer and generation config, into a folder that is there.

    Args:
        modules: module of the base -> factors of what is added to its weight.
        fan_in_fan_out: whether weights lie as (in, out), as GPT-2's do.
        dtype: of every floating-point tensor written.

    Raises:
        UserError: a module that the checkpoint has no weight for, or of another shape.
    """
    deltas = {f"{name}.weight": module for name, module in modules.items()}
    for name, (a, b, _) in deltas.items():
        shape = (a.shape[0], b.shape[1]) if fan_in_fan_out else (b.shape[1], a.shape[0])
        stored = base.entries[name].shape if name in base.entries else None
        if stored != shape:
            found = "no such tensor" if stored is None else f"one of {list(stored)}"
            raise UserError(
                f"{base.path} has {found} for {name!r}, expected {list(shape)}: give the base that the policies were trained "
                "on, saved by transformers' save_pretrained()"
            )
    specs = [
        TensorSpec(name, dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
        for name, entry in base.entries.items()
    ]

    def summed(spec: TensorSpec) -> Tensor:
        weight = read_tensor(base.entries[spec.name])
        if spec.name not in deltas:
            return weight
        a, b, _ = deltas[spec.name]
        return weight.float() + (a @ b if fan_in_fan_out else b.T @ a.T)

    write_checkpoint(directory, base, specs, summed, dtype=dtype, title="merge", progress=progress)


def check_same_base(base: Checkpoint, config: Any, fingerprint: str | None) -> None:
    """Refuses a checkpoint whose weights are not those that policies were trained on, by the fingerprint that they keep.

    Args:
        config: transformers' configuration of the base.

    Raises:
        UserError: another fingerprint.
    """
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        names = [name for name, _ in kind.from_config(config).named_parameters()]
    stored = {name: base.holds(name) for name in names}
    if fingerprint is None or None in stored.values():  # of a checkpoint whose tensors transformers renames
        return
    if fingerprint_of((name, read_tensor(base.entries[str(where)])) for name, where in stored.items()) != fingerprint:
        raise UserError(
            f"{base.path} holds other weights than the base that the policies were trained on; put that one back, or name it "
            "as base.model"
        )
