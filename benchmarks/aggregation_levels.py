"""At which level should policies be combined? Hidden states, parameters or logits, at the same weights, greedy, in one run.

(a) *hidden states*: `HiddenStateEnsemble`, one forward for all policies.
(b) *parameters*: `ParameterAverage`, the weighted sum of the adapters (rewarded soups).
(c) *logits, synchronised*: the weighted average of the logits that each policy gives after the same merged prefix; policy by
    policy, each a full model (adapter merged) with a cache of its own. The head is linear, so these are the tokens of (a).
(d) *authors' logit level, unsynchronised*: what EMORL's code calls logit level, after the description in
    `shared/reference/EMORL.md`. Each policy writes its own text alone; the probabilities at position t, each after that
    policy's OWN prefix, are averaged, and the most probable token is taken position by position: nobody has read the text that
    comes out. Departures: the own texts are greedy, so that a run can be repeated (theirs are sampled; with `--sample`
    ours are, at temperature 1 from the 50 most probable tokens, transformers' defaults then); where the text of one policy
    ends earlier, which crashes their code, that policy puts all its probability on the end token from there on; the text ends
    with the first end token.

Policies are those of an experiment, prompts its validation prompts. Scores are means over weights and prompts; ± is the
standard error over prompts. "to (a)" is the difference of the mean over objectives on the same prompts, "best" the mean at
the best of the weights, "tokens as (a)" the share of positions with the same token, of those where one of both texts has
not ended. "time / (a)" is the median over weights of the ratio of seconds, scoring left out; (d) pays for the policies' own
texts each time, as in a search that samples.

    python -m benchmarks.aggregation_levels recipes/counselling/experiment.yaml policies=runs/reward_policies --threads 1
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import plain_greedy
from emorl.config import UserError
from emorl.config.experiment import Experiment, load_experiment
from emorl.data import load_prompts
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import completions_table, mean_and_error, score
from emorl.objectives.loading import Objective, load_objective
from emorl.policies.adapters import Adapter
from emorl.policies.base import load_base, read_policies
from emorl.policies.prompts import encode, is_chat
from emorl.runs.layout import Layout

HIDDEN, PARAMETERS = "(a) hidden states", "(b) parameters"
SYNCHRONISED, UNSYNCHRONISED = "(c) logits, synchronised", "(d) authors' logit level, unsynchronised"
Decode = Callable[[Sequence[float]], Tensor]
"""Weights (K,) -> new tokens (P, T), padded after the end."""


@dataclass(frozen=True)
class Case:
    """The same policies in the forms that the levels need, the encoded prompts, and when a text ends."""

    hidden: HiddenStateEnsemble
    parameters: ParameterAverage
    alone: list[PreTrainedModel]
    inputs: dict[str, Tensor]
    new_tokens: int
    ends: list[int]
    pad: int

    @property
    def options(self) -> dict[str, Any]:
        """Of `generate()`."""
        return {"max_new_tokens": self.new_tokens, "eos_token_id": self.ends, "pad_token_id": self.pad}

    @property
    def begin(self) -> int:
        """Where the new tokens of `generate()` begin."""
        return 1 if self.hidden.config.is_encoder_decoder else self.inputs["input_ids"].shape[1]


def make_case(
    base: PreTrainedModel, adapters: Mapping[str, Adapter], inputs: dict[str, Tensor], generation: Mapping[str, Any]
) -> Case:
    merged = [PeftModel.from_pretrained(deepcopy(base), str(one.path)).merge_and_unload().eval() for one in adapters.values()]
    hidden = HiddenStateEnsemble(base, adapters)
    greedy = plain_greedy(hidden, generation)
    if greedy is None or not greedy["eos_token_id"]:
        raise UserError(f"levels are compared with plain greedy decoding up to an end token, got {dict(generation)}")
    ends, pad = greedy["eos_token_id"], greedy["pad_token_id"]
    return Case(hidden, ParameterAverage(base, adapters), merged, inputs, greedy["max_new_tokens"], ends, pad)


class Reader:
    """One policy as a full model, with its own cache: called with the tokens that are new to it, it gives the next logits."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        self._model, self._mask, self._cache = model, inputs["attention_mask"], None
        self._encoded = model.get_encoder()(**inputs) if model.config.is_encoder_decoder else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (P, V) after tokens (P, T)."""
        if self._encoded is not None:
            new: dict[str, Any] = {"decoder_input_ids": tokens, "encoder_outputs": self._encoded}
        else:
            grown = tokens.shape[1] if self._cache is not None else 0  # the inputs' mask has the prompts already
            self._mask = torch.nn.functional.pad(self._mask, (0, grown), value=1)
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            new = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": 1}
        output = self._model(**new, attention_mask=self._mask, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[:, -1]


def synchronised(case: Case, weights: Sequence[float]) -> Tensor:
    """(c): every policy reads the merged prefix, and their logits are averaged."""
    readers = [Reader(model, case.inputs) for model in case.alone]
    tokens = case.inputs["input_ids"]
    if case.hidden.config.is_encoder_decoder:
        tokens = torch.full_like(tokens[:, :1], case.hidden.generation_config.decoder_start_token_id)
    chosen: list[Tensor] = []
    for _ in range(case.new_tokens):
        logits = sum(weight * reader(tokens) for weight, reader in zip(weights, readers, strict=True))
        tokens = torch.as_tensor(logits).argmax(-1, keepdim=True)  # (P, 1)
        chosen.append(tokens)
        if bool(is_end(torch.cat(chosen, 1), case.ends).any(-1).all()):
            break
    return until_end(torch.cat(chosen, 1), case)


def own_probabilities(case: Case, model: PreTrainedModel, sample: bool) -> Tensor:
    """The probabilities (P, T, V) along the text that a policy writes alone; after its end, all on the end token."""
    kept = {"return_dict_in_generate": True, "output_logits": True}
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 50} if sample else {"do_sample": False}
    output: Any = model.generate(**case.inputs, **case.options, **sampling, **kept)  # type: ignore[operator]
    written = torch.stack(output.logits, 1).float().softmax(-1)  # (P, T', V): T' < T where all texts have ended
    after = after_end(output.sequences[:, case.begin :], case.ends)  # (P, T')
    probabilities = written.new_zeros(len(written), case.new_tokens, written.shape[-1])
    probabilities[..., case.ends[0]] = 1
    probabilities[:, : written.shape[1]][~after] = written[~after]
    return probabilities


def unsynchronised(case: Case, weights: Sequence[float], sample: bool, seed: int) -> Tensor:
    """(d): the policies' probabilities along their own texts are averaged position by position."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        alone = [own_probabilities(case, model, sample) for model in case.alone]
    mixed = torch.as_tensor(sum(weight * one for weight, one in zip(weights, alone, strict=True)))
    return until_end(mixed.argmax(-1), case)


def is_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(ends, device=tokens.device))


def after_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Whether a text (P, T) has ended before each position."""
    found = is_end(tokens, ends).long()
    return found.cumsum(-1) > found


def until_end(tokens: Tensor, case: Case) -> Tensor:
    """Tokens (P, T) with padding after the first end token, as wide as the longest text may be."""
    ended = tokens.masked_fill(after_end(tokens, case.ends), case.pad)
    return torch.nn.functional.pad(ended, (0, case.new_tokens - tokens.shape[1]), value=case.pad)


def make_levels(case: Case, sample: bool, seed: int) -> dict[str, Decode]:
    def generated(mixture: HiddenStateEnsemble | ParameterAverage, weights: Sequence[float]) -> Tensor:
        output = mixture.generate(**case.inputs, **case.options, do_sample=False, weights=weights)
        return until_end(output[:, case.begin :], case)

    return {
        HIDDEN: lambda weights: generated(case.hidden, weights),
        PARAMETERS: lambda weights: generated(case.parameters, weights),
        SYNCHRONISED: lambda weights: synchronised(case, weights),
        UNSYNCHRONISED: lambda weights: unsynchronised(case, weights, sample, seed),
    }


def equal_share(tokens: Tensor, others: Tensor, pad: int) -> float:
    """The share of equal tokens among the positions where one of both texts (P, T) has not ended."""
    counted = (tokens != pad) | (others != pad)
    return float((tokens == others)[counted].float().mean())


def default_weights(policies: int) -> list[list[float]]:
    """Equal weights, then for each policy the point half-way between them and that policy alone."""
    equal = 1 / policies
    leaning = [[(equal + float(policy == most)) / 2 for policy in range(policies)] for most in range(policies)]
    return [[equal] * policies, *leaning]


@dataclass(frozen=True)
class Measured:
    """One level at one weight vector: the scored texts, the share of tokens as (a), and seconds."""

    level: str
    weights: Sequence[float]
    table: pd.DataFrame
    equal_tokens: float
    seconds: float


@torch.no_grad()
def measure(
    case: Case,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    objectives: Sequence[Objective],
    vectors: Sequence[Sequence[float]],
    sample: bool = False,
    seed: int = 0,
) -> list[Measured]:
    """All levels at all weights, level by level within each vector."""
    levels, prompts, measured = make_levels(case, sample, seed), list(data["prompt"]), []
    order = [(index, 0) for index in range(len(prompts))]
    for decode in levels.values():
        decode(vectors[0])  # warms up
    with ScoreMemo(None) as memo:
        for weights in vectors:
            found = {}
            for level, decode in levels.items():
                start = time.perf_counter()
                found[level] = decode(weights)
                seconds = time.perf_counter() - start
                table = score(completions_table(tokenizer, prompts, order, found[level]), data, objectives, memo)
                equal = equal_share(found[level], found[HIDDEN], case.pad)
                measured.append(Measured(level, weights, table, equal, seconds))
    return measured


def summary(measured: Sequence[Measured], objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per level: means over weights and prompts with their errors, and what else the table shows."""
    first, rows = [one for one in measured if one.level == HIDDEN], {}
    for level in dict.fromkeys(one.level for one in measured):
        found = [one for one in measured if one.level == level]
        table, reference = (
            pd.concat([one.table.assign(mean=one.table[list(objectives)].mean(axis=1)) for one in part], ignore_index=True)
            for part in (found, first)
        )
        names = [*objectives, "mean"]
        means, errors = mean_and_error(table, names)
        (difference,), (error,) = mean_and_error(table.assign(mean=table["mean"] - reference["mean"]), ["mean"])
        rows[level] = {
            **dict(zip(names, means, strict=True)),
            **{f"{name}_error": one for name, one in zip(names, errors, strict=True)},
            "difference": difference,
            "difference_error": error,
            "best": max(float(one.table[list(objectives)].mean(axis=1).mean()) for one in found),
            "equal_tokens": statistics.mean(one.equal_tokens for one in found),
            "time": statistics.median(one.seconds / other.seconds for one, other in zip(found, first, strict=True)),
        }
    return rows


def show(rows: Mapping[str, Mapping[str, float]], objectives: Sequence[str]) -> None:
    columns = ["level", *objectives, "mean", "to (a)", "best", "tokens as (a)", "time / (a)"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for level, row in rows.items():
        cells = [f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in (*objectives, "mean")]
        cells += [f"{row['difference']:+.3f} ± {row['difference_error']:.3f}", f"{row['best']:.3f}"]
        cells += [f"{100 * row['equal_tokens']:.1f} %", f"{row['time']:.2f}"]
        print("| " + " | ".join([level, *cells]) + " |")


def run(experiment: Experiment, options: argparse.Namespace) -> list[Measured]:
    base = load_base(experiment.base)
    adapters = read_policies(Layout(experiment.output, experiment.policies).trained(experiment.policy_names), base)
    data = load_prompts(experiment.data, experiment.seed, is_chat(base.tokenizer)).validation
    data = data.select(range(min(options.prompts or len(data), len(data))))
    inputs = dict(encode(base.tokenizer, list(data["prompt"])).to(base.model.device))
    case = make_case(base.model, adapters, inputs, experiment.generation)
    vectors = options.weights or default_weights(len(adapters))
    print(f"policies {', '.join(adapters)}; {len(data)} prompts; weights " + "; ".join(map(in_words, vectors)) + "\n")
    objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
    return measure(case, base.tokenizer, data, objectives, vectors, options.sample, experiment.seed)


def in_words(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)


def as_row(one: Measured, objectives: Sequence[str]) -> dict[str, object]:
    return {
        "level": one.level,
        "weights": list(one.weights),
        **one.table[list(objectives)].mean().to_dict(),
        "equal_tokens": one.equal_tokens,
        "seconds": one.seconds,
        "completions": one.table["completion"].tolist(),
    }


def vector(text: str) -> list[float]:
    return [float(weight) for weight in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", type=Path, default=Path("recipes/counselling/experiment.yaml"))
    parser.add_argument("overrides", nargs="*", help="dotted.key=value (default: policies=runs/reward_policies)")
    parser.add_argument("--weights", nargs="+", type=vector, help="vectors such as 0.5,0.3,0.2 (default: see default_weights)")
    parser.add_argument("--prompts", type=int, help="only the first validation prompts")
    parser.add_argument("--sample", action="store_true", help="(d) samples the policies' own texts, with the experiment's seed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write scores and texts at each of the weights to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    experiment = load_experiment(options.experiment, options.overrides or ["policies=runs/reward_policies"])
    measured = run(experiment, options)
    names = list(experiment.objectives)
    show(summary(measured, names), names)
    if options.json:
        options.json.write_text(json.dumps([as_row(one, names) for one in measured], indent=2) + "\n")


if __name__ == "__main__":
    main()
