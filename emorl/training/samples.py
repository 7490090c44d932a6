"""Answers of one model to every training prompt, a few to each: sampled once, they serve all objectives.

Written in parts, so that a killed run goes on where it was; the processes of a distributed run share the parts. What is drawn
depends on the settings and the seed alone, not on who draws it or how often it was interrupted.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from emorl.config.train import SamplesConfig
from emorl.evaluation.scoring import completions_table, generated_ids
from emorl.evaluation.tables import read_table
from emorl.policies.conversation import prompt_text
from emorl.policies.generation import end_tokens
from emorl.runs.layout import PARTS, SAMPLES
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, Run, written_whole

COLUMNS = ("prompt_index", "sample", "prompt", "completion", "tokens", "ids")


def sampling(generation: Mapping[str, Any], config: SamplesConfig) -> dict[str, Any]:
    """Settings of `generate()`: the experiment's, but that they sample from the whole distribution as `config` says; nothing
    that draws from another one (beams, top_k) is left in."""
    left_out = ("num_beams", "num_beam_groups", "penalty_alpha", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    kept = {name: value for name, value in generation.items() if name not in left_out}
    return {**kept, "do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}


def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    generation: Mapping[str, Any],
    config: SamplesConfig,
    *,
    seed: int,
    folder: Path,
    run: Run,
    progress: Progress,
    title: str,
) -> tuple[pd.DataFrame, Run]:
    """`config.per_prompt` answers to each prompt, and the run with what they cost. The table has `COLUMNS` (and `generated`
    where answers begin behind a mark); `ids` are the tokens as they were sampled, with the end token where there was one.

    Args:
        model: what answers: the base, or a policy on it.
        folder: where parts and the whole table are kept; one that is finished is only read.
        run: whose cost it is.
    """
    whole, rows = folder / SAMPLES, len(prompts) * config.per_prompt
    if not whole.exists():
        sampler = _Sampler(model, tokenizer, prompts, sampling(generation, config), seed)
        run = sampler.sample(config, folder, run, progress, title)
    return read_table(whole, COLUMNS, f"remove {whole}, and the answers are sampled again", rows), run


@dataclass(frozen=True)
class _Sampler:
    """What answers, what it is asked, and with which settings of `generate()`."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Any]
    settings: Mapping[str, Any]
    seed: int

    def sample(self, config: SamplesConfig, folder: Path, run: Run, progress: Progress, title: str) -> Run:
        """Writes the parts that are missing, each process its own, and then the whole table."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(prompt_text(self.prompts[index])))  # little padding
        rows = [(index, sample) for index in order for sample in range(config.per_prompt)]
        starts = range(0, len(rows), config.batch)
        files = [folder / PARTS / f"{number:06}.parquet" for number in range(len(starts))]
        state = PartialState()
        mine = list(zip(starts, files, strict=True))[state.process_index :: state.num_processes]
        missing = [(start, file) for start, file in mine if not file.exists()]
        with progress.bar(title, len(mine), done=len(mine) - len(missing)) as bar:
            for start, file in missing:
                began = time.perf_counter()
                table = self._part(rows[start : start + config.batch], start)
                with written_whole(file) as temporary:
                    table.to_parquet(temporary, index=False)
                run = run.add_cost(_cost(table, time.perf_counter() - began, state.num_processes))
                bar.advance()
        state.wait_for_everyone()
        if run.is_main:
            parts = [read_table(file, COLUMNS, f"remove {file}, and it is sampled again") for file in files]
            whole = pd.concat(parts).sort_values(["prompt_index", "sample"], ignore_index=True)
            with written_whole(folder / SAMPLES) as temporary:
                whole.to_parquet(temporary, index=False)
            shutil.rmtree(folder / PARTS)
        state.wait_for_everyone()
        return run

    @torch.no_grad()
    def _part(self, rows: Sequence[tuple[int, int]], start: int) -> pd.DataFrame:
        """One batch, whose random numbers depend on its place alone."""
        asked = [self.prompts[index] for index, _ in rows]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + start)
            ids = generated_ids(self.model, self.tokenizer, asked, self.settings, {})  # (B, T)
        ends, pad = end_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id
        kept = [_written(row, ends, pad) for row in ids.tolist()]
        return completions_table(self.tokenizer, self.prompts, rows, ids).assign(ids=kept)


def _written(ids: list[int], ends: Sequence[int], pad: Any) -> list[int]:
    """Tokens up to the first end token and with it; where there is none, without padding behind them."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _cost(table: pd.DataFrame, seconds: float, processes: int) -> Cost:
    """Of one part; the main process writes down as much for each other process."""
    rows = len(table) * processes
    return Cost(
        prompts=int((table["sample"] == 0).sum()) * processes,
        completions=rows,
        tokens=int(table["tokens"].sum()) * processes,
        seconds=seconds,
    )
