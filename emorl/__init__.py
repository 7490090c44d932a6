"""Fine-tune a language model towards several objectives at once and steer between them (EMORL, arXiv 2505.02579).

What a library user imports stands here; each name is imported when it is first used, so that `import emorl` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version

    from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
    from emorl.aggregation.trie import TrieDecoder
    from emorl.config import UserError
    from emorl.config.experiment import Experiment
    from emorl.dynamic.ensemble import DynamicEnsemble
    from emorl.policies.adapters import read_adapter
    from emorl.reporting.results import load_run
    from emorl.stages.stage import perform

    __version__ = version("emorl")

_HOMES = {
    "HiddenStateEnsemble": "emorl.aggregation.ensemble",
    "ParameterAverage": "emorl.aggregation.ensemble",
    "TrieDecoder": "emorl.aggregation.trie",
    "DynamicEnsemble": "emorl.dynamic.ensemble",
    "read_adapter": "emorl.policies.adapters",
    "Experiment": "emorl.config.experiment",
    "load_run": "emorl.reporting.results",
    "perform": "emorl.stages.stage",
    "UserError": "emorl.config",
}
__all__ = [
    "DynamicEnsemble",
    "Experiment",
    "HiddenStateEnsemble",
    "ParameterAverage",
    "TrieDecoder",
    "UserError",
    "__version__",
    "load_run",
    "perform",
    "read_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("emorl")
    if name not in _HOMES:
        raise AttributeError(f"module 'emorl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
