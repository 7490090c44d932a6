"""A weighted sum of adapters as one adapter of one rank and one alpha, which every engine reads alike.

vLLM declares one largest rank of a few that it knows, and llama.cpp divides one alpha by each tensor's own rank: a
`rank_pattern`, which PEFT honours, becomes wrong scales there. Rows of zeros make the ranks one, exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from emorl.config import UserError
from emorl.fusion.adapter_card import kept_in_all
from emorl.fusion.adapters import common_fingerprint, weighted_sum, write_adapter
from emorl.fusion.export_card import Exported, export_card, fenced, vllm_command
from emorl.fusion.low_rank import LowRank
from emorl.policies.adapters import Adapter
from emorl.runs.layout import POLICY_CARD
from emorl.runs.run import write_json, write_text

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""largest ranks that vLLM's --max-lora-rank may declare (it also knows 1)"""


_USE = """{served}In Python:

```python
from peft import PeftModel
PeftModel.from_pretrained(base, "{output}")
```

"""


def export_adapter(what: Exported, directory: Path, output: Path, rank: int | None = None) -> dict[str, Any]:
    """Writes the weighted sum as an adapter of PEFT's with its card; returns its rank and the command that serves it.

    Args:
        directory: is there, for files.
        output: where that will lie, for the command.
        rank: as in `one_rank`.
    """
    adapters = list(what.adapters.values())
    modules = one_rank(adapters, what.vector, rank)
    written, fingerprint = rank_of(modules), common_fingerprint(adapters)
    factors = {name: (module.a, module.b) for name, module in modules.items()}
    write_adapter(directory, factors, replace(adapters[0], base_name=what.base_name), fingerprint)
    write_json(directory / POLICY_CARD, {**what.card, **({"base_fingerprint": fingerprint} if fingerprint else {})})
    lora = ["--enable-lora", "--lora-modules", f"emorl={output}", "--max-lora-rank", str(declared_rank(written))]
    command = vllm_command(what, what.base_name, *lora)
    kept = kept_in_all(modules)
    summary = f"A LoRA adapter of rank {written} for every module, scale 1: {kept_in_words(kept)}."
    use = _USE.format(served=fenced(command), output=output)
    write_text(directory / "README.md", export_card(what, "An adapter exported by emorl", "peft", summary, use))
    return {"rank": written, "kept": kept, "command": command}


def kept_in_words(kept: float) -> str:
    """What a truncation has left of the squared Frobenius norm."""
    return "exactly the sum below, padded with zeros" if kept == 1 else f"the best of that rank, which keeps {kept:.4%}"


def one_rank(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None) -> dict[str, LowRank]:
    """Module -> factors of the weighted sum, all of one rank.

    Args:
        weights: one for each adapter, any finite numbers.
        rank: of the result; a module whose sum has more is approximated as well as that rank can. By default the
            smallest of `RANKS` that is exact.

    Raises:
        UserError: nothing is left of the adapters, or no rank of `RANKS` is exact.
    """
    summed = weighted_sum(adapters, weights)
    if not summed:
        raise UserError("these weights leave nothing of the policies: it is the base itself that they ask for")
    needed = max(module.a.shape[1] for module in summed.values())
    if rank is None:
        rank = declared_rank(needed)
    elif rank < needed:
        summed = weighted_sum(adapters, weights, dict.fromkeys(summed, rank))
    return {name: _padded(module, rank) for name, module in summed.items()}


def declared_rank(rank: int) -> int:
    """The smallest of `RANKS` that holds an adapter of this rank."""
    fitting = next((one for one in RANKS if one >= rank), None)
    if fitting is None:
        raise UserError(
            f"the sum of these adapters has rank {rank}, and engines load {RANKS[-1]} at most: give --rank {RANKS[-1]} for the "
            "best approximation, or --format merged"
        )
    return fitting


def rank_of(modules: Mapping[str, LowRank]) -> int:
    """The one rank that all modules have."""
    [rank] = {module.a.shape[1] for module in modules.values()}
    return rank


def _padded(module: LowRank, rank: int) -> LowRank:
    more = rank - module.a.shape[1]
    a, b = nn.functional.pad(module.a, (0, more)), nn.functional.pad(module.b, (0, 0, 0, more))
    return LowRank(a, b, module.kept_energy)
