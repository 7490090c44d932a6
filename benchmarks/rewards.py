"""How fast are objectives that run a model? Texts per second, one by one and in batches, in one run.

Three ways over the same (prompt, completion) pairs through the objectives' public call: one at a time, batches in the
given order (padded to their longest), and length-sorted batches, which is what an objective does when it is given all.
All must give the same scores (within 1e-4; in bfloat16, 0.02). The encoder is MiniLM's architecture with a random
classification head, the language model `../shared/models/counsel-3m` or a random one of its size; prompts and responses
are those of AnnoMI, ESConv and PAIR under ../shared/data, or synthetic ones. The ways are interleaved within each repeat;
a ratio is the median over repeats of the ratio inside one repeat. *time / bound* divides by 2 FLOPs a parameter (no
embeddings) and real token at the measured matmul rate; *tokens computed / real* is what padding adds.

    python -m benchmarks.rewards --texts 128 --repeats 3 --threads 2 --dtype float32 bfloat16
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.decode import CLOCKS, measure_machine
from emorl.objectives.models.batching import similar_lengths
from emorl.objectives.models.classifier import Classifier
from emorl.objectives.models.likelihood import Likelihood

SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "real": (
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6},
    ),
    "tiny": (
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}
SORTED = "length-sorted"
LONGEST = 350  # words

Pairs = list[tuple[str, str]]
Objective = Callable[[Sequence[str], Sequence[str]], list[float]]


def real_pairs(folder: Path, count: int, seed: int) -> Pairs:
    """Turns of counselling with the turn before each."""
    found: Pairs = []
    for name in ("annomi_train", "esconv_train"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            texts = [turn["text"] for turn in json.loads(line)["turns"]]
            found += itertools.pairwise(texts)
    for line in (folder / "pair_train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found += [(row["prompt"], response) for response in row["complex_reflections"]]
    fitting = sorted({pair for pair in found if len(" ".join(pair).split()) <= LONGEST})
    return random.Random(seed).sample(fitting, count)


def synthetic_pairs(count: int, seed: int) -> Pairs:
    """Made-up words; lengths log-normal, median 15 words a text, as turns of dialogues are."""
    rng = random.Random(seed)

    def text() -> str:
        words = min(LONGEST // 2, max(1, round(rng.lognormvariate(2.7, 0.8))))
        return " ".join("".join(rng.choices("aeiorstlnm", k=rng.randint(1, 7))) for _ in range(words))

    return list(dict.fromkeys((text(), text()) for _ in range(count)))


def make_models(size: str, pairs: Pairs, shared: Path, folder: Path) -> dict[str, str]:
    """Folder of the model by objective."""
    torch.manual_seed(0)
    encoder, decoder = SIZES[size]
    words = sorted({word for pair in pairs for text in pair for word in text.split()})[:4000]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")
    BertForSequenceClassification(
        BertConfig(**encoder, vocab_size=len(vocabulary), num_labels=1, max_position_embeddings=512)
    ).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    counsellor = shared / "models" / "counsel-3m"
    if size == "real" and counsellor.is_dir():
        return {"classifier": str(folder / "classifier"), "likelihood": str(counsellor)}
    config = LlamaConfig(**decoder, vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "likelihood")
    tokenizer.save_pretrained(folder / "likelihood")
    return {name: str(folder / name) for name in ("classifier", "likelihood")}


def make_ways(single: Objective, batched: Objective, pairs: Pairs, batch: int) -> dict[str, Callable[[], list[float]]]:
    prompts, texts = (list(side) for side in zip(*pairs, strict=True))

    def in_parts(objective: Objective, size: int) -> list[float]:
        starts = range(0, len(pairs), size)
        return [s for at in starts for s in objective(prompts[at : at + size], texts[at : at + size])]

    return {
        "one by one": lambda: in_parts(single, 1),
        f"given order, {batch}": lambda: in_parts(batched, batch),
        f"{SORTED}, {batch}": lambda: batched(prompts, texts),
    }


def padding(lengths: Sequence[int], pairs: Pairs, batch: int) -> dict[str, float]:
    """Tokens computed / real tokens, by way; `lengths` in tokens."""
    tokens = dict(zip(pairs, lengths, strict=True))

    def padded(batches: Iterable[Pairs]) -> float:
        return sum(len(part) * max(tokens[pair] for pair in part) for part in batches) / sum(lengths)

    return {
        "one by one": 1.0,
        f"given order, {batch}": padded(pairs[at : at + batch] for at in range(0, len(pairs), batch)),
        f"{SORTED}, {batch}": padded(similar_lengths(pairs, batch)),
    }


def measure(
    ways: dict[str, Callable[[], list[float]]], repeats: int, clock: Callable[[], float], tolerance: float
) -> dict[str, list[float]]:
    """Seconds by way; the first, untimed round checks that the scores agree."""
    reference = torch.tensor(ways["one by one"]())
    for way, score in ways.items():
        distance = (torch.tensor(score()) - reference).abs().max().item()
        if distance > tolerance:
            raise SystemExit(f"{way}: a score differs by {distance:.1e} from one-by-one scoring")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats):
        names = list(ways)
        for way in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = clock()
            ways[way]()
            seconds[way].append(clock() - start)
    return seconds


def rows_of(objective: str, path: str, dtype: str, batch: int, pairs: Pairs, rate: float, options: Any) -> list[dict[str, Any]]:
    """One row per way for one objective."""

    def make(size: int) -> Any:
        if objective == "classifier":
            return Classifier(path, batch_size=size, dtype=dtype)  # type: ignore[arg-type]
        return Likelihood(path, "inverse", temperature=2.0, batch_size=size, dtype=dtype)  # type: ignore[arg-type]

    tokenizer = AutoTokenizer.from_pretrained(path)
    lengths = [len(tokenizer(f"{prompt} {text}")["input_ids"]) + 3 for prompt, text in pairs]  # and about 3 special tokens
    added = padding(lengths, pairs, batch)
    batched = make(batch)
    computing = sum(weight.numel() for name, weight in batched._model.named_parameters() if "embeddings" not in name)
    bound = 2 * computing * sum(lengths) / rate
    ways = make_ways(make(1), batched, pairs, batch)
    seconds = measure(ways, options.repeats, CLOCKS[options.clock], batched.batch_tolerance)
    return [
        {
            "objective": objective,
            "dtype": dtype,
            "way": way,
            "texts_per_second": options.texts / statistics.median(times),
            "speed_up": statistics.median(a / b for a, b in zip(seconds["one by one"], times, strict=True)),
            "padding": added[way],
            "time_over_bound": statistics.median(times) / bound,
        }
        for way, times in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="real")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where other processes disturb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds data/ and models/counsel-3m, or nothing")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    data = options.shared / "data"
    real = options.size == "real" and data.is_dir()
    pairs = real_pairs(data, options.texts, options.seed) if real else synthetic_pairs(options.texts, options.seed)
    rates = {dtype: measure_machine(getattr(torch, dtype))[1] for dtype in options.dtype}
    measured = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    print(
        f"{options.threads} threads, {options.clock} clock, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{measured}, {'real' if real else 'synthetic'} texts, seed {options.seed}\n"
    )
    print("| objective | dtype | way | texts/s | speed-up | tokens computed / real | time / bound |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(options.size, pairs, options.shared, Path(folder))
        for batch, dtype, (name, path) in itertools.product(options.batch, options.dtype, paths.items()):
            for row in rows_of(name, path, dtype, batch, pairs, rates[dtype], options):
                print(
                    f"| {row['objective']} | {row['dtype']} | {row['way']} | {row['texts_per_second']:.0f} "
                    f"| {row['speed_up']:.2f} | {row['padding']:.2f} | {row['time_over_bound']:.1f} |",
                    flush=True,
                )
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
