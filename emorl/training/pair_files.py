"""Pairs that people made, read from files in TRL's formats, and pairs of answers that people graded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.config import UserError, nearest
from emorl.config.objective import PairsConfig
from emorl.data import read_table
from emorl.policies.conversation import as_completion, as_prompt, completion_text, prompt_text
from emorl.policies.prompts import encode, is_chat, longest_text
from emorl.training.dpo import PairSplits
from emorl.training.pair_rows import pair_in, read_side
from emorl.training.pairs import held_out_of, ordered_pairs

_PROMPT = "prompt"


@dataclass(frozen=True)
class Pair:
    """One prompt in TRL's format with a better and a worse answer: texts, or conversations that go on with the prompt's."""

    prompt: Any
    chosen: Any
    rejected: Any


def read_pairs(
    config: PairsConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: Any,
    *,
    system_prompt: str | None,
    apart: Collection[Any],
    seed: int,
) -> tuple[PairSplits, list[str]]:
    """The pairs of a file, as the base is asked them, and a line on each kind that was left out.

    Args:
        tokenizer: the base's.
        model_config: the base's.
        system_prompt: put before prompts that are texts.
        apart: prompts, in TRL's format, that no policy may have seen.
        seed: draws the prompts whose pairs are held out.

    Raises:
        UserError: missing files or columns, rows that are no pairs, or conversations for a base that has no chat template.
    """
    keep = _Keep(config, tokenizer, model_config, {_asked_in(prompt) for prompt in apart})
    pairs = keep.of_use(_read(config, config.path, tokenizer, system_prompt))
    if config.validation_path is not None:
        held_out = keep.of_use(_read(config, config.validation_path, tokenizer, system_prompt))
        prompts = {_asked_in(pair.prompt) for pair in held_out}
        train = keep.unlike(pairs, prompts)
    else:
        groups = list(dict.fromkeys(_asked_in(pair.prompt) for pair in pairs))
        prompts = held_out_of(groups, config.validation, seed)
        train, held_out = ([pair for pair in pairs if (_asked_in(pair.prompt) in prompts) == out] for out in (False, True))
    return PairSplits(_dataset(train), _dataset(held_out)), keep.lines()


def check_pairs(config: PairsConfig) -> None:
    """Refuses files of pairs that are not there or lack a column.

    Raises:
        UserError: the first of them.
    """
    for path in filter(None, (config.path, config.validation_path)):
        _table(config, path)


def _table(config: PairsConfig, path: Any) -> Dataset:
    """A file's rows, which have the columns that the block names."""
    table = read_table(path, config.split)
    wanted = [config.chosen_column, config.rejected_column]
    if config.prompt_column != _PROMPT:
        wanted.append(config.prompt_column)  # by default it may be missing: the answers then begin with it
    if config.grade_column is not None:
        wanted = [config.prompt_column, config.response_column, config.grade_column]
    for column in wanted:
        if column not in table.column_names:
            raise UserError(f"{_named(path)} has no column {column!r}; {nearest(column, table.column_names)}")
    return table


def _named(path: Any) -> str:
    return path if isinstance(path, str) else "the data set"


def _asked_in(prompt: Any) -> str:
    """What the user says in a prompt, by which prompts are told apart whatever is put before it."""
    return " ".join(prompt_text(prompt).split())


class _Keep:
    """Which pairs are of use; counts the others by why not."""

    def __init__(
        self, config: PairsConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, apart: Collection[str]
    ) -> None:
        self._ratio, self._tokenizer, self._apart = config.length_ratio, tokenizer, apart
        self._longest = longest_text(model_config)
        self._left_out: dict[str, int] = {}

    def of_use(self, pairs: Sequence[Pair]) -> list[Pair]:
        kept = []
        for pair in pairs:
            if (why := self._why_not(pair)) is None:
                kept.append(pair)
            else:
                self._count(why)
        return kept

    def unlike(self, pairs: Sequence[Pair], prompts: Collection[str]) -> list[Pair]:
        """Those of other prompts."""
        kept = [pair for pair in pairs if _asked_in(pair.prompt) not in prompts]
        if len(kept) < len(pairs):
            self._count("their prompts are in the file of held-out pairs", len(pairs) - len(kept))
        return kept

    def _count(self, why: str, pairs: int = 1) -> None:
        self._left_out[why] = self._left_out.get(why, 0) + pairs

    def lines(self) -> list[str]:
        return [f"{count:,} pairs left out: {why}" for why, count in self._left_out.items()]

    def _why_not(self, pair: Pair) -> str | None:
        texts = [completion_text(answer) for answer in (pair.chosen, pair.rejected)]
        if texts[0].split() == texts[1].split():
            return "both answers are the same"
        if _asked_in(pair.prompt) in self._apart:
            return "their prompts are kept for validation and test"
        words = sorted(len(text.split()) for text in texts)
        if self._ratio is not None and words[1] > self._ratio * words[0]:
            return f"one answer has more than {self._ratio:g} times the words of the other (length_ratio)"
        if self._longest is not None and any(self._is_too_long(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)):
            return f"they are longer than the base's {self._longest:,} positions"
        return None

    def _is_too_long(self, prompt: Any, answer: Any) -> bool:
        """Whether a prompt and its answer need more positions than there are; only what may be too long is tokenised."""
        whole = prompt + answer
        if self._longest is None or len(str(whole).encode()) < self._longest:
            return False
        return encode(self._tokenizer, [whole])["input_ids"].shape[1] > self._longest


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_dict({side: [getattr(pair, side) for pair in pairs] for side in ("prompt", "chosen", "rejected")})


def _read(config: PairsConfig, path: Any, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> list[Pair]:
    rows = [(f"{_named(path)}, row {number}", row) for number, row in enumerate(_table(config, path), 1)]
    if config.grade_column is not None:
        return _of_grades(config, rows, tokenizer, system_prompt)
    return [_pair(config, row, place, tokenizer, system_prompt) for place, row in rows]


def _pair(config: PairsConfig, row: Any, where: str, tokenizer: Any, system_prompt: str | None) -> Pair:
    pair = pair_in(row, where, config.chosen_column, config.rejected_column, config.prompt_column)
    if pair.prompt is None:  # both answers are the same
        return Pair("", pair.chosen, pair.rejected)
    return _asked(pair.prompt, (pair.chosen, pair.rejected), where, tokenizer, system_prompt)


def _asked(prompt: Any, sides: Sequence[Any], where: str, tokenizer: Any, system_prompt: str | None) -> Pair:
    """The pair as the base is asked it."""
    conversational = is_chat(tokenizer)
    if not conversational and not all(isinstance(text, str) for text in (prompt, *sides)):
        raise UserError(f"{where} is a conversation, and the base has no chat template; give texts, or a chat model")
    asked = as_prompt(prompt, conversational, system_prompt) if isinstance(prompt, str) else prompt
    answers = [as_completion(asked, side) if isinstance(side, str) else side for side in sides]
    return Pair(asked, *answers)


def _of_grades(config: PairsConfig, rows: Sequence[tuple[str, Any]], tokenizer: Any, system_prompt: str | None) -> list[Pair]:
    """Graded answers to one prompt, in pairs."""
    graded: dict[str, list[tuple[Any, Any, float]]] = {}
    for where, row in rows:
        grade = row[config.grade_column]
        if not isinstance(grade, Real) or isinstance(grade, bool):
            raise UserError(f"{where}: expected a number as {config.grade_column!r}, got {grade!r:.60}")
        prompt, answer = (read_side(row, column, where) for column in (config.prompt_column, config.response_column))
        graded.setdefault(repr(prompt), []).append((prompt, answer, float(grade)))
    pairs = []
    for answers in graded.values():
        texts, grades = [completion_text(answer) for _, answer, _ in answers], [grade for *_, grade in answers]
        limits = {"margin": config.margin, "length_ratio": config.length_ratio}
        for chosen, rejected in ordered_pairs(grades, texts, choose=config.choose, **limits):
            prompt, sides = answers[chosen][0], (answers[chosen][1], answers[rejected][1])
            pairs.append(_asked(prompt, sides, f"the answers to {prompt!r:.60}", tokenizer, system_prompt))
    return pairs
