"""A model, prompts and objectives become a table: one row per completion, one column per objective."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.perplexity import mean_perplexities
from emorl.evaluation.text_metrics import (
    distinct_2,
    distinct_share,
    diversity_2,
    edit_rate,
    mean_words,
    repeated_trigrams,
    words_deviation,
)
from emorl.objectives.loading import Objective
from emorl.policies.conversation import answer_in, as_completion, prompt_text
from emorl.policies.generation import asked_for
from emorl.policies.placement import input_device
from emorl.policies.prompts import answers_begin_after, check_fits, decode, encode
from emorl.runs.run import Cost


@dataclass(frozen=True)
class Evaluation:
    """A table of scored completions and what it cost.

    `table` has the columns prompt_index, sample, prompt, completion, tokens and one per objective (NaN where an
    objective could not score).
    """

    table: pd.DataFrame
    cost: Cost


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    generation: Mapping[str, Any],
    *,
    samples: int = 1,
    batch: int = 64,
    seed: int = 0,
    per_prompt: Mapping[str, torch.Tensor] | None = None,
) -> pd.DataFrame:
    """Completions of every prompt, `samples` each: columns prompt_index, sample, prompt, completion, tokens; where answers
    begin behind a mark (`data.after`), completion is what comes behind it and `generated` the whole text.

    The random state is set from `seed` before every batch, so candidates compared on the same prompts share their random
    numbers; the caller's random state is left as it was.

    Args:
        model: anything with transformers' `generate()`.
        generation: goes straight to `model.generate()`.
        per_prompt: further arguments of `model.generate()` with one row per prompt, such as an ensemble's weights (N, K).
    """
    rows = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompt_text(prompts[index])))
    repeated = [(index, sample) for index in order for sample in range(samples)]
    with torch.random.fork_rng():
        for start in range(0, len(repeated), batch):
            torch.manual_seed(seed + start)
            part = repeated[start : start + batch]
            rows_of = [index for index, _ in part]
            extra = {name: values[rows_of].to(input_device(model)) for name, values in (per_prompt or {}).items()}
            completion_ids = generated_ids(model, tokenizer, [prompts[index] for index in rows_of], generation, extra)
            rows.append(completions_table(tokenizer, prompts, part, completion_ids))
    return pd.concat(rows).sort_values(["prompt_index", "sample"], ignore_index=True)


def generated_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    generation: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """What the model writes behind each prompt of one batch, (B, T), padded on the right.

    Args:
        extra: further arguments of `model.generate()`.

    Raises:
        UserError: a prompt that leaves no positions for it.
    """
    inputs = encode(tokenizer, prompts).to(input_device(model))
    longest = max(prompts, key=lambda prompt: len(prompt_text(prompt)))
    check_fits(model.config, inputs["input_ids"].shape[1], generation.get("max_new_tokens"), longest)
    output = model.generate(**inputs, **generation, **asked_for(generation, tokenizer), **extra)
    before = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # start token, or the prompt
    return output[:, before:]


def completions_table(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], order: Sequence[tuple[int, int]], completion_ids: torch.Tensor
) -> pd.DataFrame:
    """Generated ids (N, T) as rows of `generate`'s table.

    Args:
        order: prompt_index and sample of each row.
    """
    pad: Any = tokenizer.pad_token_id
    lengths = completion_ids.ne(pad).sum(1).tolist()
    texts, after = decode(tokenizer, completion_ids), answers_begin_after(tokenizer)
    return pd.DataFrame(
        {
            "prompt_index": [index for index, _ in order],
            "sample": [sample for _, sample in order],
            "prompt": [prompt_text(prompts[index]) for index, _ in order],
            "completion": [answer_in(text, after) for text in texts],
            **({} if after is None else {"generated": texts}),
            "tokens": lengths,
        }
    )


def score(
    completions: pd.DataFrame, data: Dataset, objectives: Sequence[Objective], memo: ScoreMemo | None = None
) -> pd.DataFrame:
    """The completions with one column per objective.

    Args:
        completions: as from `generate`; `prompt_index` counts rows of `data`.
        data: the prompts with their own columns, which the objectives receive as TRL hands them over.
        memo: where texts that were scored before are looked up; without one, all are scored.
    """
    rows = data.select(completions["prompt_index"].tolist())
    prompts = list(rows["prompt"])
    columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
    texts = [as_completion(prompt, text) for prompt, text in zip(prompts, completions["completion"], strict=True)]
    scored = completions.copy()
    for objective in objectives:
        found = objective(prompts, texts, **columns) if memo is None else memo.score(objective, prompts, texts, columns)
        scored[objective.name] = np.array(found, dtype=float)
    return scored


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    objectives: Sequence[Objective],
    generation: Mapping[str, Any],
    **options: Any,
) -> Evaluation:
    """Generates and scores; `options` are those of `generate`."""
    start = time.perf_counter()
    completions = generate(model, tokenizer, list(data["prompt"]), generation, **options)
    table = score(completions, data, objectives)
    return Evaluation(table, cost_of(table, len(objectives), time.perf_counter() - start))


def cost_of(table: pd.DataFrame, objectives: int, seconds: float) -> Cost:
    """What a table of scored completions cost."""
    return Cost(
        prompts=int(table["prompt_index"].nunique()),
        completions=len(table),
        tokens=int(table["tokens"].sum()),
        reward_calls=len(table) * objectives,
        seconds=seconds,
    )


def mean_and_error(table: pd.DataFrame, objectives: Sequence[str]) -> tuple[list[float], list[float]]:
    """Mean score and its standard error per objective, both (O,).

    Samples of one prompt are averaged first: prompts, not samples, are independent. The error of one prompt is NaN.
    """
    per_prompt = table.groupby("prompt_index")[list(objectives)].mean()
    means, errors = per_prompt.mean(), per_prompt.sem()
    return means.tolist(), errors.tolist()


def summarize(table: pd.DataFrame, objectives: Sequence[str]) -> dict[str, float]:
    """One row of a comparison: `<objective>` and `<objective>_error`, mean and minimum over objectives with the error
    of the mean; over the first sample of each prompt distinct share and distinct-2; over all completions EMORL's diversity-2
    and edit rate, mean words and their standard deviation, repeated trigrams, and perplexities where the table has them."""
    means, errors = mean_and_error(table, objectives)
    per_prompt = table.groupby("prompt_index")[list(objectives)].mean().mean(axis=1)
    return {
        **dict(zip(objectives, means, strict=True)),
        **{f"{name}_error": error for name, error in zip(objectives, errors, strict=True)},
        "mean": float(np.mean(means)),
        "mean_error": float(per_prompt.sem()),
        "minimum": min(means),
        **summarize_texts(table),
    }


def summarize_texts(table: pd.DataFrame) -> dict[str, float]:
    """What `summarize` says of the texts alone."""
    first = table[table["sample"] == table["sample"].min()]["completion"].tolist()
    completions = table["completion"].tolist()
    return {
        "distinct_share": distinct_share(first),
        "distinct_2": distinct_2(first),
        "diversity_2": diversity_2(completions),
        "edit_rate": edit_rate(table["prompt"].tolist(), completions),
        "words": mean_words(completions),
        "words_deviation": words_deviation(completions),
        "repeated_trigrams": repeated_trigrams(completions),
        **mean_perplexities(table),
    }
