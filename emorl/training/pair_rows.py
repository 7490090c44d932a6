"""One pair that people made, in any of TRL's formats: texts or conversations, the prompt beside the answers or in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl import extract_prompt

from emorl.config import UserError
from emorl.policies.conversation import prompt_text


@dataclass(frozen=True)
class PairRow:
    """A text, or role/content turns, each; no prompt where answers are read alone; an implicit one was cut off the answers."""

    prompt: Any
    chosen: Any
    rejected: Any
    is_implicit: bool = False


def pair_in(row: Mapping[str, Any], where: str, chosen_column: str, rejected_column: str, prompt_column: str | None) -> PairRow:
    """The pair of one row. `trl.maybe_extract_prompt` would lose a prompt that is turns beside answers that are texts, or the
    other way round.

    Args:
        where: the row, for messages.
        prompt_column: None where the answers are read alone; one that is not there means that both begin with the prompt.

    Raises:
        UserError: an answer that is none, or no prompt.
    """
    chosen, rejected = (read_side(row, column, where) for column in (chosen_column, rejected_column))
    if type(chosen) is not type(rejected):
        raise UserError(f"{where}: one answer is a text, the other a list of turns; expected two of a kind")
    prompt = read_side(row, prompt_column, where) if prompt_column is not None and prompt_column in row else None
    is_implicit = prompt is None and prompt_column is not None
    if is_implicit or (isinstance(chosen, list) and not isinstance(prompt, list) and not _is_answer(chosen)):
        if chosen == rejected:
            return PairRow(prompt, chosen, rejected, is_implicit)
        if chosen[:1] != rejected[:1]:
            raise UserError(
                f"{where}: the answers begin differently, so no prompt is in them; name its column {prompt_column!r}"
            )
        prompt, chosen, rejected = extract_prompt({"chosen": chosen, "rejected": rejected}).values()
    if prompt is not None and not prompt_text(prompt).strip():
        raise UserError(f"{where}: the prompt says nothing; expected a text or a turn of the user, got {prompt!r:.60}")
    for side in (chosen, rejected):
        if isinstance(side, list) and not _is_answer(side):
            raise UserError(f"{where}: expected turns of the assistant behind the prompt, got {side!r:.80}")
    return PairRow(prompt, chosen, rejected, is_implicit)


def _is_answer(turns: list[dict[str, str]]) -> bool:
    return {turn["role"] for turn in turns} == {"assistant"}


def read_side(row: Mapping[str, Any], column: str, where: str) -> str | list[dict[str, str]]:
    """A text, or turns without what a table fills in for other rows' keys.

    Raises:
        UserError: neither.
    """
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return [{"role": turn["role"], "content": turn["content"]} for turn in value]
    raise UserError(f"{where}: {column!r} is {value!r:.60}; expected a text or a list of role/content turns")
