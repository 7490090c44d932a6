"""What does the whole weight search cost? Three ways of the same hierarchical grid (3 policies, 5 levels), in one run.

(a) *authors*: the procedure of EMORL's code as `shared/reference/EMORL.md` describes it, written for this benchmark: K full
    models (adapters merged, which is kinder to it than its own code), no cache, every token of the prefix again at every
    step and of an encoder-decoder the encoder too, batches of 16, all 27 points of every level again: 135 evaluations.
    Timed on a stated fraction and extrapolated, which is exact but for noise: every evaluation does the same work.
(b) *cached*: `HiddenStateEnsemble.generate()` with its cache, one candidate at a time, each distinct direction once.
(c) *ours*: `TrieDecoder` behind the same proposer.

All ways score texts with the same objectives (shares of tokens by their number). (b) and (c) run to the end and their texts
are compared candidate by candidate, those of (a) on the fraction that is timed. A text may differ where two tokens tie
within rounding, and may then send a search into another box. "same best" says whether (a)'s procedure, all 135 points, ends
at (c)'s best point when it is given (c)'s scores.

Random models. How much there is to share depends on how far apart the policies are: `--distance` is the standard deviation
of the adapters' B. "rows shared" says what came of it: tokens asked for / prefixes computed. The default is where the causal
model shares about as much as the trained policies of `recipes/counselling`; `benchmarks/README.md` gives others beside it.

    python -m benchmarks.search --models causal t5 --distance 0.0005 --threads 2
    python -m benchmarks.search --runs runs/counselling --new-tokens 40
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.trie import TrieDecoder
from emorl.config.experiment import load_kept_experiment
from emorl.data import load_prompts
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from emorl.policies.prompts import encode, is_chat
from emorl.runs.layout import Layout
from emorl.search.proposers.hierarchical_grid import HierarchicalGrid
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished

POLICIES, LEVELS, AUTHORS_BATCH = 3, 5, 16
AUTHORS_EVALUATIONS = LEVELS * 3**POLICIES
SPACE = WeightSpace(tuple(f"policy{index}" for index in range(POLICIES)))
TARGETS = {
    "causal": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
Evaluate = Callable[[Tensor], Tensor]
"""Weights (C, K) -> tokens (C, P, T)."""


def make_base(kind: str) -> PreTrainedModel:
    """15 million parameters, vocabulary 32,128; initial values for which texts vary and rounding does not grow."""
    torch.manual_seed(0)
    common = {"vocab_size": 32128, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "causal":
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8}
        config = LlamaConfig(**sizes, **common, tie_word_embeddings=True, initializer_range=0.06, bos_token_id=None)
        return LlamaForCausalLM(config).eval()
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 8}
    model = T5ForConditionalGeneration(T5Config(**sizes, **common, decoder_start_token_id=0, initializer_factor=0.5)).eval()
    model.lm_head.weight = torch.nn.Parameter(0.06 * torch.randn_like(model.lm_head.weight))  # tied, it repeats one token
    model.config.scale_decoder_outputs = False
    return model


@dataclass
class Case:
    """The same policies as an ensemble and as full models, with prompts and the token that ends a text."""

    ensemble: HiddenStateEnsemble
    merged: list[PreTrainedModel]
    inputs: dict[str, Tensor]
    end: int


def random_case(kind: str, options: argparse.Namespace) -> Case:
    base = make_base(kind)
    task = "CAUSAL_LM" if kind == "causal" else "SEQ_2_SEQ_LM"
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: Path(directory) / name for name in SPACE.policies}
        for path in paths.values():
            config = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS[kind], task_type=task)
            adapted = get_peft_model(deepcopy(base), config)
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=options.distance)
            adapted.save_pretrained(str(path))
        return make_case(base, paths, make_prompts(options.prompts, options.prompt_tokens), 1)


def trained_case(run: Path) -> Case:
    """The base, the policies and the validation prompts of a finished run with three policies."""
    experiment = load_kept_experiment(run)
    base = load_base(experiment.base)
    data = load_prompts(experiment.data, experiment.seed, is_chat(base.tokenizer)).validation
    paths = dict(
        zip(
            SPACE.policies,
            Layout(experiment.output, experiment.policies).trained(experiment.policy_names).values(),
            strict=True,
        )
    )
    end: Any = base.tokenizer.eos_token_id
    return make_case(base.model, paths, dict(encode(base.tokenizer, list(data["prompt"]))), end)


def make_case(base: PreTrainedModel, paths: Mapping[str, Path], inputs: dict[str, Tensor], end: int) -> Case:
    merged = [PeftModel.from_pretrained(deepcopy(base), str(path)).merge_and_unload().eval() for path in paths.values()]
    return Case(HiddenStateEnsemble(base, {name: read_adapter(path) for name, path in paths.items()}), merged, inputs, end)


def make_prompts(prompts: int, length: int) -> dict[str, Tensor]:
    """Ragged random prompts, padded left."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(length // 2, length + 1, (prompts,), generator=generator)
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    return {"input_ids": torch.randint(3, 32128, (prompts, length), generator=generator) * mask, "attention_mask": mask}


def authors(case: Case, new_tokens: int) -> Evaluate:
    """Their loop for one candidate (K,) and one batch: all models on the whole prefix at every step, until all rows end at
    once."""
    models, inputs = case.merged, {name: tensor[:AUTHORS_BATCH] for name, tensor in case.inputs.items()}
    head = models[0].get_output_embeddings()
    assert head is not None
    entering: list[Tensor] = []  # each model's last hidden state before its head
    for model in models:
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: entering.append(args[0][:, -1]))  # type: ignore

    def read(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        if model.config.is_encoder_decoder:
            model(**inputs, decoder_input_ids=tokens, use_cache=False)
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def decode(weights: Tensor) -> Tensor:
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        if models[0].config.is_encoder_decoder:
            tokens, mask = tokens.new_zeros(len(tokens), 1), mask.new_ones(len(tokens), 1)
        begin = tokens.shape[1]
        for _ in range(new_tokens):
            entering.clear()
            for model in models:
                read(model, tokens, mask)
            mixed = torch.einsum("kbh,k->bh", torch.stack(entering), weights)
            chosen = torch.nn.functional.linear(mixed, head.weight).argmax(-1, keepdim=True)
            tokens, mask = torch.cat([tokens, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
            if bool((chosen == case.end).all()):
                break
        return tokens[:, begin:]

    return decode


def until_end(tokens: Tensor, end: int, length: int) -> Tensor:
    """Tokens (P, T) with padding after the first end token, as wide as asked."""
    ended = (tokens == end).cumsum(-1) - (tokens == end).long() > 0
    return torch.nn.functional.pad(tokens.masked_fill(ended, 0), (0, length - tokens.shape[1]))


def one_by_one(case: Case, new_tokens: int) -> Evaluate:
    begin = 1 if case.ensemble.config.is_encoder_decoder else case.inputs["input_ids"].shape[1]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": case.end, "pad_token_id": 0}

    def evaluate(weights: Tensor) -> Tensor:
        found = [case.ensemble.generate(**case.inputs, **options, weights=row)[:, begin:] for row in weights]
        return torch.stack([torch.nn.functional.pad(tokens, (0, new_tokens - tokens.shape[1])) for tokens in found])

    return evaluate


def scores(tokens: Tensor) -> list[tuple[float, ...]]:
    """For tokens (C, P, T), the share of tokens in each third of the vocabulary by remainder: (C, 3)."""
    real = (tokens > 1).sum((1, 2)).clamp(min=1)
    return list(zip(*(((tokens > 1) & (tokens % 3 == rest)).sum((1, 2)).div(real).tolist() for rest in range(3)), strict=True))


def value(finished: list[Finished]) -> list[float]:
    """Unequal importance, so that there is one best direction."""
    return [0.5 * trial.scores[0] + 0.3 * trial.scores[1] + 0.2 * trial.scores[2] for trial in finished]


def search(evaluate: Evaluate) -> tuple[list[Finished], list[Tensor], float]:
    """The complete search: its trials, their tokens (P, T), and the seconds it took."""
    start = time.perf_counter()
    grid, finished, texts = HierarchicalGrid(SPACE, LEVELS, value), [], []
    while (proposed := grid(finished)) is not None:
        tokens = evaluate(torch.tensor([SPACE.vector(params) for params in proposed]))
        texts.extend(tokens)
        finished += [
            Finished(len(finished) + index, params, found, {})
            for index, (params, found) in enumerate(zip(proposed, scores(tokens), strict=True))
        ]
    return finished, texts, time.perf_counter() - start


def best_of_authors(finished: list[Finished]) -> dict[str, float]:
    """What their search ends with: the best of all points of all levels, given these scores."""
    known = {tuple(SPACE.vector(trial.params)): trial for trial in finished}
    low, high, best = (0.0,) * POLICIES, (1.0,) * POLICIES, None
    for _ in range(LEVELS):
        points = SPACE.lattice(low, high)
        trials = {
            point: known[tuple(SPACE.vector(direction))] for point in points if (direction := SPACE.canonical(as_params(point)))
        }
        values = dict(zip(trials, value(list(trials.values())), strict=True))
        candidates = list(trials.values()) if best is None else [best, *trials.values()]
        best = max(candidates, key=lambda trial: value([trial])[0])
        low, high = best_box(low, high, values)
    assert best is not None
    return dict(best.params)


def as_params(point: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(SPACE.policies, point, strict=True))


Point = tuple[float, ...]


def best_box(low: Point, high: Point, values: Mapping[Point, float]) -> tuple[Point, Point]:
    """The sub-box with the best corners on average (theirs takes the sum; the zero point has no score here)."""
    middle = tuple((lo + hi) / 2 for lo, hi in zip(low, high, strict=True))
    boxes = []
    for upper in itertools.product((False, True), repeat=len(low)):
        edges = [(mid, hi) if up else (lo, mid) for up, lo, mid, hi in zip(upper, low, middle, high, strict=True)]
        corners = [values[corner] for corner in itertools.product(*edges) if corner in values]
        boxes.append((sum(corners) / len(corners), tuple(edge[0] for edge in edges), tuple(edge[1] for edge in edges)))
    _, best_low, best_high = max(boxes, key=lambda box: box[0])
    return best_low, best_high


def run_case(label: str, case: Case, new_tokens: int) -> dict[str, object]:
    one_by_one(case, 2)(torch.ones(1, POLICIES))  # warms up
    prompts = len(case.inputs["input_ids"])
    start = time.perf_counter()
    sample = authors(case, new_tokens)(torch.tensor([0.5, 0.5, 0.5]))
    timed = time.perf_counter() - start
    batches = -(-prompts // AUTHORS_BATCH) * AUTHORS_EVALUATIONS

    def trie(weights: Tensor) -> Tensor:
        return decoder.decode(weights)

    start = time.perf_counter()
    decoder = TrieDecoder(case.ensemble, **case.inputs, max_new_tokens=new_tokens, eos_token_id=case.end)
    reading = time.perf_counter() - start
    ours, our_texts, our_seconds = search(trie)
    cached, cached_texts, cached_seconds = search(one_by_one(case, new_tokens))
    theirs = {tuple(trial.params.values()): text for trial, text in zip(cached, cached_texts, strict=True)}
    mine = {tuple(trial.params.values()): text for trial, text in zip(ours, our_texts, strict=True)}
    pairs = [(text, theirs[weights]) for weights, text in mine.items() if weights in theirs]
    equal = next(text for weights, text in theirs.items() if len(set(weights)) == 1)
    different = sum(int((one != other).any(-1).sum()) for one, other in pairs)
    ours_total = our_seconds + reading
    bests = [max(finished, key=lambda trial: value([trial])[0]) for finished in (ours, cached)]
    return {
        "model": label,
        "candidates": len(ours),
        "seconds_a": timed * batches,
        "timed_a": f"1 of {batches} batches",
        "seconds_b": cached_seconds,
        "seconds_c": ours_total,
        "a_to_c": timed * batches / ours_total,
        "b_to_c": cached_seconds / ours_total,
        "rows_shared": decoder.work.tokens / decoder.work.rows,
        "different_texts": different,
        "texts": len(pairs) * prompts,
        "a_same_texts": int((until_end(sample, case.end, new_tokens) == equal[:AUTHORS_BATCH]).all(-1).sum()),
        "best": {name: round(weight, 4) for name, weight in bests[0].params.items()},
        "same_best": dict(bests[0].params) == best_of_authors(ours),
        "best_values": [value([best])[0] for best in bests],
        "tokens_per_text": decoder.work.tokens / len(ours) / prompts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="trained policies of these run directories instead")
    parser.add_argument("--distance", type=float, default=0.0005, help="standard deviation of the adapters' B")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, distance {options.distance}\n")
    columns = "model, candidates, rows shared, (a) s, (b) s, (c) s, a / c, b / c, texts unlike (a) and (b), same best"
    print("| " + columns.replace(", ", " | ") + " |\n|" + "---|" * len(columns.split(", ")))
    rows = []
    random_cases = [] if options.runs else options.models
    cases = [*((kind, lambda kind=kind: random_case(kind, options)) for kind in random_cases)]
    cases += [(run.name, lambda run=run: trained_case(run)) for run in options.runs]
    for label, make in cases:
        with torch.no_grad():
            row = run_case(label, make(), options.new_tokens)
        rows.append(row)
        print(
            f"| {label} | {row['candidates']} | {row['rows_shared']:.1f} | {row['seconds_a']:.0f} ({row['timed_a']} timed) | "
            f"{row['seconds_b']:.1f} | {row['seconds_c']:.1f} | {row['a_to_c']:.0f} | {row['b_to_c']:.1f} | "
            f"{AUTHORS_BATCH - row['a_same_texts']} of {AUTHORS_BATCH} and {row['different_texts']} of {row['texts']} | "
            f"{row['same_best']} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
