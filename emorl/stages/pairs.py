"""What a policy trained offline (method dpo) reads: pairs that people made, or pairs of sampled answers.

The base's samples are those of `samples`; a round after the first one samples the policy before it. Each objective scores
them and makes pairs of its own, kept as `pairs.parquet` in the policy's run directory.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config.experiment import Experiment
from emorl.config.objective import PairsConfig
from emorl.config.yaml import as_mapping
from emorl.runs.layout import PAIRS, SAMPLES
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, Run, read_cost, written_whole
from emorl.stages.materials import Materials, identity_of
from emorl.stages.samples import samples_folder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from emorl.objectives.loading import Objective
    from emorl.training.dpo import PairSplits
    from emorl.training.modes import PolicyPlan

_SCORED_AT_ONCE = 256
_FEW = "lower train.samples.margin, raise its per_prompt, temperature or validation, or leave out its length_ratio"


def rounds_of(experiment: Experiment, policy: str) -> int:
    """How often a policy is trained on pairs of new answers; people's pairs are there once."""
    return experiment.train.samples.rounds if experiment.makes_pairs(policy) else 1


def pairs_of(
    materials: Materials,
    run: Run,
    progress: Progress,
    plan: "PolicyPlan",
    objectives: "Sequence[Objective]",
    folder: Path,
    start: Path | None,
) -> "tuple[PairSplits, Run]":
    """The pairs of one round of a policy, and its run with what they cost; of several processes the first one scores.

    Args:
        folder: the round's.
        start: the policy whose answers they are made of; the base's by default.
    """
    import numpy as np
    from accelerate import PartialState

    from emorl.training.dpo import check_enough
    from emorl.training.pairs import sampled_pairs, values_of

    experiment, file = materials.experiment, folder / PAIRS
    if (of_people := experiment.pairs_of(plan.name)) is not None:
        return _of_people(materials, progress, plan.name, of_people), run
    is_there = file.exists()
    PartialState().wait_for_everyone()  # nobody writes it before all have looked
    if not is_there:
        samples, scores, run = _samples(materials, run, progress, plan.name, folder, start)
        if run.is_main:
            rewards = []
            for objective in objectives:
                of_objective, run = _scored(materials, samples, objective, scores, run, progress)
                rewards.append(of_objective)
            values = values_of(np.stack(rewards, 1), plan, experiment.train.samples.per_prompt)
            table = sampled_pairs(samples, values, experiment.train.samples, experiment.seed)
            check_enough(plan.name, int((~table["held_out"]).sum()), int(table["held_out"].sum()), _FEW)
            with written_whole(file) as temporary:
                table.to_parquet(temporary, index=False)
        PartialState().wait_for_everyone()
    return _as_tokens(materials, file), run


def _of_people(materials: Materials, progress: Progress, name: str, config: PairsConfig) -> "PairSplits":
    from emorl.policies.base import config_of
    from emorl.training.dpo import check_enough
    from emorl.training.pair_files import read_pairs

    experiment, splits = materials.experiment, materials.splits
    pairs, lines = read_pairs(
        config,
        materials.tokenizer,
        config_of(experiment.base),
        system_prompt=experiment.data.system_prompt,
        apart=[*splits.validation["prompt"], *splits.test["prompt"]],
        seed=experiment.seed if experiment.data.seed is None else experiment.data.seed,
    )
    for line in lines:
        progress.say(f"policy {name}: {line}")
    check_enough(name, len(pairs.train), len(pairs.held_out), "; ".join([*lines, "bring more prompts"]))
    return pairs


def _samples(
    materials: Materials, run: Run, progress: Progress, name: str, folder: Path, start: Path | None
) -> "tuple[pd.DataFrame, Path, Run]":
    """Sampled answers to the training prompts, and the folder in which their scores are remembered."""
    from emorl.evaluation.tables import read_table
    from emorl.training.samples import COLUMNS, sample_answers

    experiment, prompts = materials.experiment, list(materials.splits.train["prompt"])
    if start is None:
        home = samples_folder(experiment)
        rows = len(prompts) * experiment.train.samples.per_prompt
        remedy = f"remove {home / SAMPLES}, and `emorl samples` makes it again"
        return read_table(home / SAMPLES, COLUMNS, remedy, rows), home, run
    from peft import PeftModel

    policy = PeftModel.from_pretrained(materials.own_base().model, str(start)).eval()
    samples, run = sample_answers(
        policy,
        materials.tokenizer,
        prompts,
        experiment.generation,
        experiment.train.samples,
        seed=experiment.seed,
        folder=folder,
        run=replace(run, cost=read_cost(run.path)),
        progress=progress,
        title=f"samples of policy {name}",
    )
    return samples, folder, run


def _scored(
    materials: Materials, samples: "pd.DataFrame", objective: "Objective", folder: Path, run: Run, progress: Progress
) -> "tuple[np.ndarray, Run]":
    """An objective's rewards (N,), NaN where it gives none, and the run with the cost of those that were not known before."""
    import numpy as np

    from emorl.evaluation.memo import ScoreMemo
    from emorl.evaluation.scoring import score as with_scores

    data, rewards = materials.splits.train, []
    paid: Any = _Paid(objective, run)
    file = folder / "scores" / f"{objective.name}-{_digest(materials.experiment, objective.name)}.sqlite"
    file.parent.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(samples), _SCORED_AT_ONCE)
    with closing(ScoreMemo(file)) as memo, progress.bar(f"score {objective.name}", len(starts)) as bar:
        for first in starts:
            table = with_scores(samples.iloc[first : first + _SCORED_AT_ONCE], data, [paid], memo)
            rewards += objective.rewards([None if np.isnan(score) else score for score in table[objective.name]])
            bar.advance()
    return np.array(rewards, dtype=float), paid.run


class _Paid:
    """An objective whose scores are paid for before they are remembered: a kill between the two loses no cost."""

    def __init__(self, objective: "Objective", run: Run) -> None:
        self.name, self.key, self.run = objective.name, objective.key, run
        self._objective = objective

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        began = time.perf_counter()
        scores = self._objective(prompts, completions, **columns)
        self.run = self.run.add_cost(Cost(reward_calls=len(scores), seconds=time.perf_counter() - began))
        return scores


def _digest(experiment: Experiment, name: str) -> str:
    """Of all that an objective's score depends on."""
    config = as_mapping(experiment.objectives[name], identity_of)
    said: dict[str, Any] = {key: config[key] for key in ("function", "options", "transform")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def _as_tokens(materials: Materials, file: Path) -> "PairSplits":
    from emorl.evaluation.tables import read_table
    from emorl.training.dpo import PairSplits, as_tokens

    columns = ("prompt_index", "chosen_ids", "rejected_ids", "held_out")
    table = read_table(file, columns, f"remove {file}, and it is made again")
    prompts = list(materials.splits.train["prompt"])
    train, held_out = (as_tokens(materials.tokenizer, prompts, table[table["held_out"] == out]) for out in (False, True))
    return PairSplits(train, held_out)
