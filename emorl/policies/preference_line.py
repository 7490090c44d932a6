"""The line in a prompt that tells one policy what matters: "Priorities: helpful 70 %, brief 30 %." (as RiC, arXiv 2402.10207).

It is a system turn of a conversation, or the last part of the one that is there; the first line of the user's turn where the
chat template has no system turns, and of a prompt that is a text. Weights are said in whole units, percents or words: what the
line says is what is meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.config.distill import NUMBERS, WORDS
from emorl.policies.prompts import is_chat, token_ids
from emorl.runs.layout import POLICY_CARD
from emorl.runs.run import read_json

CARD = "preference"
_PERCENT, _MOST_WORDS = 100, 20


@dataclass(frozen=True)
class PreferenceLine:
    """How a policy is told weights.

    >>> PreferenceLine("Priorities: {weights}.", ("helpful", "brief")).text({"helpful": 0.7, "brief": 0.3})
    'Priorities: helpful 70 %, brief 30 %.'
    """

    wording: str
    """with {weights}, which says percents, or {words}, which repeats each name as often as its share of 20 words"""
    names: tuple[str, ...]
    """of the policies, in the order in which the line names them"""
    has_system_turn: bool = True
    """whether the base's conversations may have one"""

    @classmethod
    def of(cls, wording: str, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The line for the prompts of a base.

        Raises:
            UserError: its tokenizer reads other weights as the same tokens.
        """
        line = cls(wording, tuple(names), is_chat(tokenizer) and _takes_system_turn(tokenizer))
        first, last = names[0], names[-1]
        said = [line.text({first: unit, last: line.units - unit}) for unit in range(line.units + 1)]
        if len({tuple(tokenizer(text)["input_ids"]) for text in said}) < len(said):  # type: ignore[arg-type]
            raise UserError(
                f"distill.line: the base's tokenizer cannot tell {said[1]!r:.60} from {said[2]!r:.60} and others; choose a "
                f"wording with {WORDS}, or names that it knows"
            )
        return line

    @classmethod
    def read(cls, policy: Path) -> Self | None:
        """The line that a saved policy was trained with; None for one that reads no line."""
        file = policy / POLICY_CARD
        kept = read_json(file).get(CARD) if file.is_file() else None
        return None if kept is None else cls(kept["wording"], tuple(kept["names"]), kept["has_system_turn"])

    def card(self) -> dict[str, Any]:
        """For the policy's card, from which `read` takes it."""
        return {CARD: asdict(self)}

    @property
    def units(self) -> int:
        """In how many equal parts it can share out the weights."""
        return _MOST_WORDS if WORDS in self.wording else _PERCENT

    def text(self, weights: Mapping[str, float]) -> str:
        parts = shares([weights.get(name, 0.0) for name in self.names], self.units)
        numbers = ", ".join(f"{name} {share} %" for name, share in zip(self.names, parts, strict=True))
        words = " ".join(name for name, share in zip(self.names, parts, strict=True) for _ in range(share))
        return self.wording.replace(NUMBERS, numbers).replace(WORDS, words)

    def rounded(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights by name as the line says them, summing to 1."""
        parts = shares([weights.get(name, 0.0) for name in self.names], self.units)
        return {name: share / self.units for name, share in zip(self.names, parts, strict=True)}

    def put_into(self, prompt: Any, weights: Mapping[str, float]) -> Any:
        """The prompt, a text or a conversation, with the line in it; the prompt given stays as it is."""
        line = self.text(weights)
        if isinstance(prompt, str):
            return f"{line}\n{prompt}"
        first, *others = prompt
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{line}"}, *others]
        if self.has_system_turn:
            return [{"role": "system", "content": line}, *prompt]
        return [{**first, "content": f"{line}\n{first['content']}"}, *others]


def shares(weights: Sequence[float], units: int) -> list[int]:
    """Weights as whole shares of so many units, by largest remainders.

    Raises:
        UserError: a weight below 0, or none above.
    """
    total = sum(weights)
    if not (total > 0 and min(weights) >= 0 and total < float("inf")):
        raise UserError(f"a line of preferences says shares: expected weights of at least 0, not all 0, got {list(weights)}")
    exact = [units * weight / total for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in by_remainder[: units - sum(found)]:
        found[index] += 1
    return found


def _takes_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what a system turn says reaches the model: a template may refuse such turns, or leave them out."""
    asked = [[{"role": "system", "content": text}, {"role": "user", "content": "b"}] for text in ("a", "c")]
    try:
        one, other = (token_ids(tokenizer, prompt) for prompt in asked)
    except UserError:
        return False
    return one != other
