"""Exports what a run found in the forms that other engines load (`emorl export RUN --format adapter|merged|gguf-lora`).

No run of an experiment: it may be asked for as often as one likes, and each export is a folder of its own. What is exported is
one sum of parameters, or the policies of which llama.cpp makes it; a hidden-state ensemble is none.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError, nearest
from emorl.config.experiment import BaseConfig, load_kept_experiment
from emorl.runs.console import Console
from emorl.runs.progress import Progress
from emorl.runs.run import written_whole_directory
from emorl.stages.exported import KINDS, NO_ADAPTER, Order, check_wish, exported, kind_of
from emorl.stages.generate import Wish, base_of, experiment_above
from emorl.stages.materials import Materials

if TYPE_CHECKING:
    from emorl.fusion.export_card import Exported

FORMATS = ("adapter", "merged", "gguf-lora")
DTYPES = ("float32", "bfloat16", "float16")
_HELP = """\
Formats:
  adapter     one LoRA adapter of one rank and one alpha, for vLLM, PEFT and others; exact (padded with zeros)
  merged      one checkpoint without adapters, for every engine that reads transformers' models
  gguf-lora   each policy as a GGUF LoRA for llama.cpp, whose requests choose the scales: one base, all trade-offs
What is exported (--what), by default the first that is there; a soup first for gguf-lora, --prefer and --weights:
  distilled   the adapter of `emorl distill`; one for the whole front reads its weights in the prompt
  soup        the policies' parameters, summed with the weights of the search's best point, of --prefer or of --weights
  fused       the adapter of `emorl fuse`
Examples:
  emorl export runs/mine --format adapter
  emorl export runs/mine --format gguf-lora --prefer empathy=0.8,brevity=0.2
  emorl export runs/mine --format merged --what soup --weights empathy=0.6,brevity=0.4 --output models/mine
A hidden-state ensemble is no sum of parameters: distil it, or take its soup (`emorl serve` serves it as it is).
"""


def check(order: Order) -> str:
    """Refuses what can be seen before any library is imported; returns which of `KINDS` is exported, or "policy"."""
    for option, given, known in (("--format", order.format, FORMATS), ("--what", order.what, (*KINDS, *NO_ADAPTER)),
                                 ("--dtype", order.dtype, DTYPES)):  # fmt: skip
        if given is not None and given not in known:
            raise UserError(f"{option}: expected {', '.join(known[:3])}, got {given!r}; {nearest(given, known[:3])}")
    if order.wish.prefer and order.wish.weights:
        raise UserError("--prefer chooses the weights and --weights gives them; use one of both")
    if order.rank is not None and (order.format == "merged" or order.rank < 1):
        raise UserError(f"--rank is of adapters, at least 1; got {order.rank} for --format {order.format}")
    if order.dtype is not None and order.format != "merged":
        raise UserError(f"--dtype is of a merged checkpoint; an {order.format} is written in float32")
    if order.format == "gguf-lora" and importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf-lora needs the package gguf: pip install 'emorl[gguf]'")
    kind = kind_of(order)
    check_wish(order, kind)
    _check_place(order.place)
    return kind


def _check_place(place: Path) -> None:
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise UserError(f"{place} exists and is not empty; give another --output, or move it away")


def export(order: Order, progress: Progress) -> dict[str, Any]:
    """Writes the export whole or not at all; returns what it is, for people and programs.

    Raises:
        UserError: nothing there that can be exported so, or a folder that holds something else.
    """
    kind = check(order)
    is_alone = kind == "policy"
    experiment = experiment_above(order.directory) if is_alone else load_kept_experiment(order.directory)
    base = base_of(order.directory) if experiment is None else experiment.base
    if order.format == "merged" and base.quantization is not None:
        raise UserError(
            f"base.quantization: the policies were trained over a base in {base.quantization.bits} bits, and no file holds "
            "their sum with it; use --format adapter, and load the base in those bits"
        )
    from emorl.policies.base import load_tokenizer

    what, front = exported(order, kind, experiment, base, progress)
    tokenizer = load_tokenizer(base) if experiment is None else Materials(experiment).tokenizer
    with written_whole_directory(order.place) as partial:
        facts = _written(order, what, base, front, partial, progress)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone, and an engine may be another user
    progress.say(f"export: {order.place}, of {'one policy' if is_alone else 'the ' + kind}{_lost(facts)}")
    return {"format": order.format, "what": kind, "output": str(order.place), "base": what.base_name,
            "weights": dict(what.weights), "notes": list(what.notes), **facts}  # fmt: skip


def _lost(facts: Mapping[str, Any]) -> str:
    return f", of whose sum rank {facts['rank']} keeps {facts['kept']:.1%}" if facts.get("kept", 1) != 1 else ""


def _written(
    order: Order, what: "Exported", base: BaseConfig, front: list[Any], partial: Path, progress: Progress
) -> dict[str, Any]:
    place = order.place.absolute()
    if order.format == "adapter":
        from emorl.fusion.one_rank import export_adapter

        return export_adapter(what, partial, place, order.rank)
    if order.format == "gguf-lora":
        from emorl.fusion.gguf_lora import export_gguf_lora

        return export_gguf_lora(what, partial, place, front, order.rank)
    import torch

    from emorl.fusion.checkpoints import open_checkpoint
    from emorl.fusion.merged import export_merged
    from emorl.policies.base import dtype_of

    dtype = dtype_of(base) if order.dtype is None else getattr(torch, order.dtype)
    with tempfile.TemporaryDirectory(prefix=".base.", dir=partial.parent) as unpacked:
        checkpoint = open_checkpoint(_folder_of(base, Path(unpacked)))
        return export_merged(what, partial, place, checkpoint, dtype, progress)


def _folder_of(base: BaseConfig, unpacked: Path) -> Path:
    """The folder of a base's files: its own, the hub's copy on this machine, or `unpacked` with those of a GGUF file."""
    from emorl.policies.base import load_base
    from emorl.policies.loading import GGUF

    if base.model.endswith(GGUF):
        load_base(base).model.save_pretrained(unpacked)
        return unpacked
    if Path(base.model).is_dir():
        return Path(base.model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=wanted))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _HELP
    parser.add_argument("directory", type=Path, metavar="RUN", help="output directory of an experiment, or an adapter's folder")
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS), help="see below")
    parser.add_argument("--what", metavar="KIND", help=f"{', '.join(KINDS)}: see below")
    numbers = "NAME=NUMBER,…"
    parser.add_argument("--prefer", default="", metavar=numbers, help="the front's point that suits these objectives best")
    parser.add_argument("--weights", default="", metavar=numbers, help="instead: weights by policy, as they are")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(RUN/export/FORMAT)")
    what = "of an adapter; below what is exact, the best approximation (the smallest of 8, 16, 32, 64, … that is exact)"
    parser.add_argument("--rank", type=int, metavar="N", help=what)
    what = "of a merged checkpoint: float32, bfloat16 or float16 (that in which the base computes on this machine)"
    parser.add_argument("--dtype", metavar="TYPE", help=what)
    parser.add_argument("--json", action="store_true", help="print what was exported as JSON")


def command(options: argparse.Namespace) -> None:
    from emorl.objectives.preference import parse_numbers

    wish = Wish(parse_numbers("--prefer", options.prefer), parse_numbers("--weights", options.weights))
    order = Order(options.directory, options.format, options.what, wish, options.output, options.rank, options.dtype)
    facts = export(order, Console())
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _shown(facts))


def _shown(facts: Mapping[str, Any]) -> str:
    """How it is served, for people."""
    request = {"lora": facts["lora"]} if "lora" in facts else None
    asked = [] if request is None else [f"a request chooses its scales: {json.dumps(request)}"]
    return "\n".join([*filter(None, [facts["command"]]), *asked])
