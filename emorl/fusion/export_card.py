"""The README.md of an exported folder: what it is, how it is used, how it was made, and what it does not keep."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import yaml

from emorl.policies.adapters import Adapter

_CARD = """---
{front_matter}---
# {title}

{summary}

{use}
## How it was made

```
{command}
```

{versions}. The base is `{base}`.

| policy | weight | strength | adapter |
|---|---|---|---|
{policies}
{notes}"""


@dataclass(frozen=True)
class Exported:
    """What is exported: adapters by policy name with their weights, over one base.

    `base_name` is a folder, a hub id or a GGUF file; `notes` are sentences that whoever uses the export must know.
    """

    adapters: Mapping[str, Adapter]
    weights: Mapping[str, float]
    base_name: str
    config: Any
    """transformers' configuration of the base"""
    command: str
    """that made the export"""
    notes: Sequence[str] = field(default_factory=list)
    card: Mapping[str, object] = field(default_factory=dict)
    """for policy.json: what the policy says of itself"""

    @property
    def vector(self) -> list[float]:
        """Weights in the adapters' order; the base's own adds nothing."""
        return [self.weights[name] for name in self.adapters]


def vllm_command(what: Exported, model: str, *options: str) -> str:
    """How vLLM serves it; nothing for an encoder-decoder, which vLLM does not know."""
    return "" if what.config.is_encoder_decoder else shlex.join(["vllm", "serve", model, *options])


def fenced(command: str) -> str:
    """A command in Markdown; nothing where there is none."""
    return f"```\n{command}\n```\n\n" if command else ""


def export_card(what: Exported, title: str, library: str, summary: str, use: str) -> str:
    """The text of README.md.

    Args:
        library: that loads it: a hub's name, such as peft.
        use: Markdown, with commands.
    """
    front_matter = {"library_name": library, "tags": ["emorl"], "base_model": what.base_name}
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=title,
        summary=summary,
        use=use,
        command=what.command,
        versions=", ".join(f"{name} {version(name)}" for name in ("emorl", "torch", "peft", "transformers")),
        base=what.base_name,
        policies="\n".join(
            f"| {name} | {what.weights[name]:g} | {adapter.scale:g} | {adapter.path} |"
            for name, adapter in what.adapters.items()
        ),
        notes="".join(f"\n- {note}" for note in what.notes) + ("\n" if what.notes else ""),
    )
