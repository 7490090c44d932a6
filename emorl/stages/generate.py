"""Answers prompts with the point of a finished search's front that suits a preference, or with one policy: a fused one, any
adapter or whole model in a folder, or a dynamic ensemble (`emorl generate RUN --prefer …`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emorl.aggregation.ensemble import MIXTURES, HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, Experiment, load_run
from emorl.dynamic.ensemble import DYNAMIC_FILE, DynamicEnsemble, best_ensemble
from emorl.evaluation.scoring import generate
from emorl.objectives.preference import choose
from emorl.policies.adapters import read_adapter
from emorl.policies.base import Base, load_base, read_policies
from emorl.policies.prompts import is_chat
from emorl.runs.layout import POLICY_DIRECTORY, policy_directories
from emorl.search.fusion_result import FUSE
from emorl.search.weight_search import read_result

_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class _Speaker:
    """Who answers and how; `described` goes into each JSON line."""

    model: Any
    base: Base
    described: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=lambda: {"max_new_tokens": 64, "do_sample": False})
    system_prompt: str | None = None
    seed: int = 0

    def answer(self, prompt: str) -> str:
        turns: Any = [{"role": "user", "content": prompt}] if is_chat(self.base.tokenizer) else prompt
        if self.system_prompt and is_chat(self.base.tokenizer):
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        answered = generate(self.model, self.base.tokenizer, [turns], self.generation, seed=self.seed)
        return answered["completion"].iloc[0]


def generate_lines(
    directory: Path, preferences: Mapping[str, float], prompts: Sequence[str], *, as_json: bool
) -> Iterator[str]:
    """One answer per prompt, in order; as JSON lines with prompt, completion, and the point's weights and search scores or the
    policy's folder.

    Without preferences the search's best point answers; where only a fusion has run, the fused policy; where only
    `emorl dynamic` has, the dynamic ensemble, with its weights of each span.

    Args:
        directory: output of an experiment, or a policy's folder: an adapter, a whole model or a dynamic ensemble.
    """
    if not prompts:
        raise UserError("no prompt given; use --prompt TEXT or pipe prompts to standard input, one a line")
    dynamic = _dynamic_in(directory)
    if dynamic is not None and preferences:
        raise UserError(f"{dynamic} is a dynamic ensemble, which was trained for one trade-off; leave --prefer out")
    if dynamic is not None:
        yield from _dynamic_lines(dynamic, prompts, as_json)
        return
    policy = _policy_in(directory)
    if policy is not None and preferences:
        raise UserError(f"{policy} is one policy, without a front to choose from; leave --prefer out")
    speaker = _point(load_run(directory), preferences) if policy is None else _policy(policy)
    for prompt in prompts:
        line = {"prompt": prompt, "completion": speaker.answer(prompt), **speaker.described}
        yield json.dumps(line, ensure_ascii=False) if as_json else line["completion"]


def _policy_in(directory: Path) -> Path | None:
    """The one policy that is meant; None where there is a front."""
    if any((directory / name).is_file() for name in (_ADAPTER_FILE, "config.json")):
        return directory
    fused = directory / FUSE / POLICY_DIRECTORY
    searched = (directory / "search" / "result.json").exists()
    return fused if (fused / _ADAPTER_FILE).is_file() and not searched else None


def _dynamic_in(directory: Path) -> Path | None:
    """The dynamic ensemble that is meant; None where there is a front, or a policy of another kind."""
    if (directory / DYNAMIC_FILE).is_file():
        return directory
    others = (directory / "search" / "result.json", directory / FUSE / POLICY_DIRECTORY / _ADAPTER_FILE)
    return None if any(other.exists() for other in others) else best_ensemble(directory)


def _dynamic_lines(directory: Path, prompts: Sequence[str], as_json: bool) -> Iterator[str]:
    ensemble = DynamicEnsemble.from_pretrained(directory)
    for prompt in prompts:
        [answer] = ensemble.generate([ensemble.as_prompt(prompt)], seeds=[0])
        weights = [dict(zip(ensemble.engine.names, row, strict=True)) for row in answer.weights]
        line = {"prompt": prompt, "completion": answer.text, "tokens": answer.tokens, "weights": weights}
        yield json.dumps(line, ensure_ascii=False) if as_json else answer.text


def _point(experiment: Experiment, preferences: Mapping[str, float]) -> _Speaker:
    found = read_result(experiment)
    point = choose(found["front"], preferences) if preferences else found["best"]
    base = load_base(experiment.base)
    adapters = read_policies(policy_directories(experiment), base, experiment.ensemble.adapter_scale)
    ensemble = MIXTURES[experiment.ensemble.aggregate](
        base.model, adapters, list(point["weights"].values()), include_base=experiment.ensemble.include_base
    )
    return _Speaker(ensemble, base, point, **_settings(experiment))


def _policy(folder: Path) -> _Speaker:
    """With the base and the settings of the experiment in whose output it is; else its own base, and the defaults."""
    outputs = [above for above in folder.absolute().parents[1:3] if (above / "experiment.yaml").is_file()]
    experiment = load_run(outputs[0]) if outputs else None
    settings = {} if experiment is None else _settings(experiment)
    described = {"policy": str(folder)}
    if not (folder / _ADAPTER_FILE).is_file():
        base = load_base(BaseConfig(model=str(folder)))
        return _Speaker(base.model, base, described, **settings)
    trained_on = read_adapter(folder).base_name
    if experiment is None and trained_on is None:
        raise UserError(
            f"the adapter in {folder} does not say which base it belongs to: base_model_name_or_path, in {_ADAPTER_FILE}"
        )
    base = load_base(BaseConfig(model=str(trained_on)) if experiment is None else experiment.base)
    return _Speaker(
        HiddenStateEnsemble(base.model, read_policies({"policy": folder}, base), [1.0]), base, described, **settings
    )


def _settings(experiment: Experiment) -> dict[str, Any]:
    system_prompt = experiment.data.system_prompt
    return {"generation": experiment.generation, "system_prompt": system_prompt, "seed": experiment.seed}
