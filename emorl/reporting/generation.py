"""Answers prompts with the point of a finished search's front that suits a preference (`emorl generate RUN --prefer …`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emorl.aggregation.ensemble import MIXTURES
from emorl.config import UserError
from emorl.evaluation.scoring import generate
from emorl.experiment import Experiment
from emorl.policies.loading import load_base, read_policies
from emorl.policies.prompts import is_chat
from emorl.search.preference import choose
from emorl.search.weight_search import read_result
from emorl.training.policy import policy_directories


def generate_lines(
    experiment: Experiment, preferences: Mapping[str, float], prompts: Sequence[str], *, as_json: bool
) -> Iterator[str]:
    """One answer per prompt, in order; as JSON lines with prompt, completion, weights and the point's search scores.

    Without preferences the search's best point answers.
    """
    found = read_result(experiment)
    point = choose(found["front"], preferences) if preferences else found["best"]
    if not prompts:
        raise UserError("no prompt given; use --prompt TEXT or pipe prompts to standard input, one a line")
    base = load_base(experiment.base)
    adapters = read_policies(policy_directories(experiment), base, experiment.search.adapter_scale)
    ensemble = MIXTURES[experiment.search.aggregate](
        base.model, adapters, list(point["weights"].values()), include_base=experiment.search.include_base
    )
    for prompt in prompts:
        turns: Any = [{"role": "user", "content": prompt}] if is_chat(base.tokenizer) else prompt
        if experiment.data.system_prompt and is_chat(base.tokenizer):
            turns = [{"role": "system", "content": experiment.data.system_prompt}, *turns]
        answer = generate(ensemble, base.tokenizer, [turns], experiment.generation, seed=experiment.seed)
        text = answer["completion"].iloc[0]
        yield json.dumps({"prompt": prompt, "completion": text, **point}, ensure_ascii=False) if as_json else text
