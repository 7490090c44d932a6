"""The block `data`: prompts, how a base is asked them, and where its answers begin."""

from typing import Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from emorl.config.objects import TextOrObject, short_form

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

_RENDERED = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "loop", "self")


@dataclass(frozen=True, config=_strict)
class DataConfig:
    path: TextOrObject
    """prompts: a csv, json, jsonl or parquet file, or a data set's hub id; in Python also a `datasets.Dataset`. `data: X` alone
    is short for it"""
    split: str = "train"
    """split of a hub data set"""
    prompt_column: str = "prompt"
    """column with the prompts: text, or a conversation in TRL's format; other columns reach the objectives"""
    system_prompt: str | None = None
    """put before every text prompt as a system turn (chat models only)"""
    chat_template_kwargs: dict[str, Any] | None = None
    """what the chat template is told wherever a prompt is rendered, such as {enable_thinking: false}"""
    after: str | None = Field(default=None, min_length=1)
    """a mark such as </think>: what comes behind the last one is the answer, which alone is scored, counted and shown; a text
    without the mark is an empty answer"""
    validation: int = Field(default=32, ge=2)
    """prompts kept for validation while training and for the search"""
    test: int = Field(default=32, ge=2)
    """prompts kept for the final comparison; neither training nor search sees them"""
    seed: int | None = Field(default=None, ge=0)
    """seed of the splits; the experiment's by default. `emorl compare` keeps it while it varies the others"""
    validation_path: TextOrObject | None = None
    """a file or hub id of its own for the validation prompts"""
    test_path: TextOrObject | None = None
    """a file or hub id of its own for the test prompts"""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else short_form("path", value)

    def __post_init__(self) -> None:
        for name in self.chat_template_kwargs or {}:
            if not name.isidentifier() or name in _RENDERED:
                raise ValueError(f"chat_template_kwargs: {name!r} is no argument that a template can be given")
