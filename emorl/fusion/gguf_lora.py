"""An adapter as a GGUF file that llama.cpp loads beside its base, under a scale that each request may choose.

llama.cpp's own `convert_lora_to_gguf.py` writes the same tensors, but copies alpha alone: it divides by each tensor's rank, so
all must have one. Rows of query and key heads lie in the order of llama.cpp's rotary embedding, which is the base's there.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from emorl.config import UserError
from emorl.fusion.export_card import Exported, export_card
from emorl.fusion.low_rank import LowRank
from emorl.fusion.one_rank import one_rank, rank_of
from emorl.policies.loading import GGUF
from emorl.runs.run import write_json, write_text

SERVER_CARD = "llama-server.json"

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""model type of transformers -> architecture of GGUF: those whose files equal that of llama.cpp's converter (a test)"""
_REORDERED = "llama"
"""the architecture whose rotary embedding pairs neighbours, where transformers pairs the halves of a head"""


_USE = """```
{command}
```

`base.gguf` is the base: {base}.
A request chooses its own trade-off by one more field; what it does not list has scale 0, and an empty list means the
command's scales:

```json
{request}
```

`{card}` holds this, and the scales of each trade-off of the front. Requests of different scales are not computed in one batch.

"""
_CONVERSION = "`python convert_hf_to_gguf.py {base} --outtype f16 --outfile base.gguf` (a script of llama.cpp's) makes it"


def export_gguf_lora(
    what: Exported, directory: Path, output: Path, front: Sequence[Mapping[str, Any]], rank: int | None = None
) -> dict[str, Any]:
    """Writes each policy as a GGUF LoRA, with a card and the scales of the weights; returns them and llama-server's command.

    Args:
        directory: is there, for files.
        output: where that will lie, for the command.
        front: points with `weights` that a request may ask for.
        rank: as in `one_rank`.
    """
    for name, adapter in what.adapters.items():
        write_gguf_lora(directory / f"{name}{GGUF}", one_rank([adapter], [1.0], rank), what.config, name)
    scaled = ",".join(f"{name}{GGUF}:{weight!r}" for name, weight in zip(what.adapters, what.vector, strict=True))
    base = what.base_name if what.base_name.endswith(GGUF) else "base.gguf"
    command = f"cd {shlex.quote(str(output))} && {shlex.join(['llama-server', '-m', base, '--lora-scaled', scaled])}"
    request = {"lora": _scales(what, what.weights)}
    trade_offs = [{**point, "lora": _scales(what, point["weights"])} for point in front]
    facts = {"files": [f"{name}{GGUF}" for name in what.adapters], "command": command, **request, "front": trade_offs}
    write_json(directory / SERVER_CARD, facts)
    made = f"`{base}`" if base != "base.gguf" else _CONVERSION.format(base=what.base_name)
    use = _USE.format(command=command, base=made, request=json.dumps(request), card=SERVER_CARD)
    summary = "LoRA adapters for llama.cpp, one a policy, alpha their rank: a scale is a weight of the soup."
    write_text(directory / "README.md", export_card(what, "Policies for llama.cpp exported by emorl", "gguf", summary, use))
    return facts


def _scales(what: Exported, weights: Mapping[str, float]) -> list[dict[str, float]]:
    """A request's `lora`, with all adapters: one that is left out has scale 0."""
    return [{"id": index, "scale": weights[name]} for index, name in enumerate(what.adapters)]


def check_architecture(config: Any) -> str:
    """GGUF's name of a base's architecture.

    Args:
        config: transformers' configuration of the base.

    Raises:
        UserError: one whose tensors this does not know how to lay out.
    """
    if config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"a GGUF LoRA of a {config.model_type} is not known here, only of {', '.join(_ARCHITECTURES)}; use --format "
            "adapter, and llama.cpp's convert_lora_to_gguf.py on it"
        )
    return _ARCHITECTURES[config.model_type]


def write_gguf_lora(file: Path, modules: Mapping[str, LowRank], config: Any, name: str) -> None:
    """Writes the factors in float32, with an alpha that is their rank: at scale 1 what is added is exactly theirs.

    Args:
        modules: module of the base -> factors, all of one rank.
        name: of the adapter, which llama-server lists.

    Raises:
        UserError: an architecture or a module that is not known.
    """
    architecture = check_architecture(config)
    [kind] = [kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank_of(modules)))
    for module, (a, b, _) in modules.items():
        tensor = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if tensor is None:
            raise UserError(f"llama.cpp's {architecture} has no tensor for {module!r}, which the policies adapt")
        rows = _reordered(b.T, module, config) if architecture == _REORDERED else b.T
        writer.add_tensor(f"{tensor}.lora_a", a.T.contiguous().numpy())  # (r, in)
        writer.add_tensor(f"{tensor}.lora_b", rows.contiguous().numpy())  # (out, r)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reordered(rows: Tensor, module: str, config: Any) -> Tensor:
    """Rows (out, r) of a query or key projection as llama.cpp keeps them: of each head, the two halves interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
