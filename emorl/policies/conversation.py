"""Prompts and completions in TRL's two formats, plain text and conversations, read and written alike."""

from typing import Any


def prompt_text(prompt: Any) -> str:
    """What the user said: a text prompt itself, or the user turns of a conversation, one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt if turn["role"] == "user")


def as_prompt(text: str, conversational: bool, system_prompt: str | None = None) -> Any:
    """A user's text as a model is asked it: as it is, or as one user turn, behind the system turn where there is one."""
    if not conversational:
        return text
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def completion_text(completion: Any) -> str:
    """A completion in TRL's format (text, or a list of one assistant turn) as text."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def as_completion(prompt: Any, text: str) -> Any:
    """`text` in the format that TRL hands to reward functions beside `prompt`."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def answer_in(text: str, after: str | None) -> str:
    """What comes behind the last mark `after` of a generated text; nothing where there is no mark, all without `after`."""
    return text if after is None else text.rpartition(after)[2].strip() if after in text else ""
