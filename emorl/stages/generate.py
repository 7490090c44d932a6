"""Answers prompts with the point of a search's front that suits a preference, or with one policy: a fused one, any adapter or
whole model in a folder, or a dynamic ensemble (`emorl generate RUN --prefer …`). An adapter that was distilled for the whole
front is told the same preference by a line in the prompt, and answers in place of the ensemble."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, Experiment, load_kept_experiment
from emorl.config.yaml import apply_overrides
from emorl.runs.console import Console
from emorl.runs.layout import ADAPTER, DYNAMIC_CARD, ENSEMBLE, EXPERIMENT, POLICY, POLICY_CARD, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import Point, SearchResult, best_dynamic_ensemble, read_result
from emorl.runs.run import read_json
from emorl.stages.materials import Materials

if TYPE_CHECKING:
    from emorl.policies.preference_line import PreferenceLine

_DEFAULT_GENERATION = {"max_new_tokens": 64, "do_sample": False}


@dataclass(frozen=True)
class _Speaker:
    """Who answers and how; `described` goes into each JSON line."""

    model: Any
    tokenizer: Any
    described: Mapping[str, Any]
    generation: Mapping[str, Any]
    system_prompt: str | None = None
    seed: int = 0
    line: "PreferenceLine | None" = None
    """of a policy that is told the weights in `described`"""

    def answer(self, prompt: str) -> str:
        from emorl.evaluation.scoring import generate
        from emorl.policies.conversation import as_prompt
        from emorl.policies.prompts import is_chat

        asked = as_prompt(prompt, is_chat(self.tokenizer), self.system_prompt)
        if self.line is not None:
            asked = self.line.put_into(asked, self.described["weights"])
        answered = generate(self.model, self.tokenizer, [asked], self.generation, seed=self.seed)
        return answered["completion"].iloc[0]


@dataclass(frozen=True)
class Wish:
    """What a user asks for: a preference by objective or weights by policy (neither: the best that was found), and settings of
    decoding that replace the experiment's; of the `ensemble` even where a distilled adapter could answer."""

    prefer: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    ensemble: bool = False


def check(directory: Path, wish: Wish) -> None:
    """Refuses what can be seen in the run directory, before any library is imported."""
    if wish.prefer and wish.weights:
        raise UserError("--prefer chooses the weights and --weights gives them; use one of both")
    dynamic, policy = dynamic_in(directory), policy_in(directory, wish)
    if dynamic is None and policy is None:
        chosen(load_kept_experiment(directory), wish)
    elif policy is not None and (told := told_front(policy)) is not None:
        chosen_point(wish, *told)
    elif wish.prefer or wish.weights:
        option = "--prefer" if wish.prefer else "--weights"
        fixed = f"{policy} is one policy, without a front to choose from"
        if dynamic is not None:
            fixed = f"{dynamic} is a dynamic ensemble, which was trained for one trade-off"
        raise UserError(f"{fixed}; leave {option} out")


def generate_lines(
    directory: Path, prompts: Sequence[str], wish: Wish, progress: Progress | None = None, *, as_json: bool
) -> Iterator[str]:
    """One answer per prompt, in order; as JSON lines with prompt, completion, and the point's weights and search scores or the
    policy's folder.

    Where only a fusion has run, the fused policy answers; where only `emorl dynamic` has, the dynamic ensemble, with its
    weights of each span.

    Args:
        directory: output of an experiment, or a policy's folder: an adapter, a whole model or a dynamic ensemble.
        progress: is told which weights or policy answer.
    """
    check(directory, wish)
    if not prompts:
        raise UserError("no prompt given; use --prompt TEXT or pipe prompts to standard input, one a line")
    progress, dynamic, policy = progress or Silent(), dynamic_in(directory), policy_in(directory, wish)
    if dynamic is not None:
        progress.say(f"weights: chosen anew for every span by {dynamic}")
        yield from _dynamic_lines(dynamic, prompts, wish, as_json)
        return
    speaker = _of_front(directory, wish, progress) if policy is None else of_policy(policy, wish, progress)
    for prompt in prompts:
        line = {"prompt": prompt, "completion": speaker.answer(prompt), **speaker.described}
        yield json.dumps(line, ensure_ascii=False) if as_json else line["completion"]


def policy_in(directory: Path, wish: Wish) -> Path | None:
    """The one policy that is meant; None where a front of the ensemble is."""
    is_policy = any((directory / name).is_file() for name in (ADAPTER, "config.json"))
    layout = Layout(directory)
    if wish.ensemble and (is_policy or not layout.has_result("search")):
        raise UserError(f"--ensemble: no search has finished in {directory}; give the output of the one that has searched")
    if is_policy:
        return directory
    distilled = layout.distillation / POLICY
    if not wish.ensemble and layout.has_result("distill") and told_front(distilled) is not None:
        return distilled
    if not wish.ensemble and not layout.has_result("search") and (distilled / ADAPTER).is_file():
        return distilled
    fused = layout.fusion / POLICY
    return fused if (fused / ADAPTER).is_file() and not layout.has_result("search") else None


def told_front(policy: Path) -> tuple[Point, list[Point]] | None:
    """What a policy for the whole front is told by default, and the front that preferences choose from; None of any other
    one."""
    file = policy / POLICY_CARD
    card = read_json(file) if file.is_file() else {}
    if "front" not in card:
        return None
    points = [Point(**point) for point in card["front"]]
    best = next((point for point in points if point.weights == card["weights"]), points[0])
    return best, points


def has_gone_on(output: Path, front: Sequence[Point]) -> bool:
    """Whether the search has another front than the one that was distilled."""
    layout = Layout(output)
    return layout.has_result("search") and list(read_result(SearchResult, layout.search).front) != list(front)


def dynamic_in(directory: Path) -> Path | None:
    """The dynamic ensemble that is meant; None where there is a front, or a policy of another kind."""
    if (directory / DYNAMIC_CARD).is_file():
        return directory
    layout = Layout(directory)
    has_other = layout.has_result("search") or (layout.fusion / POLICY / ADAPTER).exists()
    return None if has_other else best_dynamic_ensemble(layout)


def _dynamic_lines(directory: Path, prompts: Sequence[str], wish: Wish, as_json: bool) -> Iterator[str]:
    from emorl.dynamic.engines.engine import decoding_of
    from emorl.dynamic.ensemble import DynamicEnsemble

    ensemble = DynamicEnsemble.from_pretrained(directory)
    trained = ensemble.decoding
    ensemble.decoding = decoding_of({**trained.generation, **wish.generation}, trained.seed, trained.after)
    for prompt in prompts:
        [answer] = ensemble.generate([prompt], seeds=[0])
        weights = [dict(zip(ensemble.engine.names, row, strict=True)) for row in answer.weights]
        line = {"prompt": prompt, "completion": answer.text, "tokens": answer.tokens, "weights": weights}
        yield json.dumps(line, ensure_ascii=False) if as_json else answer.text


def _of_front(directory: Path, wish: Wish, progress: Progress) -> _Speaker:
    """The point of a search's front, or weights of the user's, in the ensemble that the search saved."""
    from emorl.aggregation.ensemble import MIXTURES

    experiment = load_kept_experiment(directory)
    described = chosen(experiment, wish)
    settings, weights = settings_of(experiment, wish), described["weights"]
    progress.say(f"weights: {', '.join(f'{name} {weight:.3g}' for name, weight in weights.items())}")
    base = Materials(experiment).base
    saved = Layout(directory).search / ENSEMBLE
    mixture = MIXTURES[experiment.ensemble.aggregate].from_pretrained(saved, base=base.model, weights=weights)
    return _Speaker(mixture, base.tokenizer, described, **settings)


def chosen(experiment: Experiment, wish: Wish) -> Mapping[str, Any]:
    """The weights that a user wishes, and what the search knows of them."""
    search = read_result(SearchResult, Layout(experiment.output).search)
    return chosen_point(wish, search.best, search.front)


def chosen_point(wish: Wish, best: Point, front: Sequence[Point]) -> Mapping[str, Any]:
    if wish.weights:
        from emorl.objectives.preference import check_weights

        return {"weights": check_weights("--weights", wish.weights, list(best.weights))}
    from emorl.objectives.preference import choose

    return choose([_described(point) for point in front], wish.prefer) if wish.prefer else _described(best)


def _described(point: Point) -> dict[str, Any]:
    return {"weights": dict(point.weights), "scores": dict(point.scores), "value": point.value}


def of_policy(folder: Path, wish: Wish, progress: Progress) -> _Speaker:
    """With the base and the settings of the experiment in whose output it is; else its own base, and the defaults."""
    from emorl.policies.base import load_base
    from emorl.policies.preference_line import PreferenceLine

    experiment = experiment_above(folder)
    told, line = told_front(folder), PreferenceLine.read(folder)
    settings: dict[str, Any] = {**settings_of(experiment, wish), "line": line}
    described: dict[str, Any] = {"policy": str(folder)}
    if told is None or line is None:
        progress.say(f"weights: none, one policy answers: {folder}")
    else:
        weights = chosen_point(wish, *told)["weights"]  # scores are the ensemble's
        described["weights"] = weights
        progress.say(f"told: {line.text(weights)}")
        if experiment is not None and has_gone_on(experiment.output, told[1]):
            progress.warn(f"the search in {experiment.output} has gone on since; `emorl distill` makes the adapter anew")
    if not (folder / ADAPTER).is_file():
        base = load_base(BaseConfig(model=str(folder)))
        return _Speaker(base.model, base.tokenizer, described, **settings)
    from emorl.aggregation.ensemble import HiddenStateEnsemble
    from emorl.policies.base import read_policies

    base = load_base(base_of(folder)) if experiment is None else Materials(experiment).base
    ensemble = HiddenStateEnsemble(base.model, read_policies({"policy": folder}, base), [1.0])
    return _Speaker(ensemble, base.tokenizer, described, **settings)


def experiment_above(policy: Path) -> Experiment | None:
    """The experiment in whose output a policy's folder is."""
    outputs = [above for above in policy.absolute().parents[1:3] if (above / EXPERIMENT).is_file()]
    return load_kept_experiment(outputs[0]) if outputs else None


def base_of(policy: Path) -> BaseConfig:
    """The base that an adapter names, with the tokenizer that lies beside it.

    Raises:
        UserError: it names none.
    """
    from emorl.policies.adapters import read_adapter

    trained_on = read_adapter(policy).base_name
    if trained_on is None:
        raise UserError(f"the adapter in {policy} does not say which base it belongs to: base_model_name_or_path, in {ADAPTER}")
    return BaseConfig(model=trained_on, tokenizer=str(policy) if (policy / "tokenizer_config.json").is_file() else None)


def settings_of(experiment: Experiment | None, wish: Wish) -> dict[str, Any]:
    """How the experiment's policies decode, as the user changed it; checked before a model loads."""
    from emorl.policies.generation import check_generation

    generation = {**(_DEFAULT_GENERATION if experiment is None else experiment.generation), **wish.generation}
    check_generation(generation)
    if experiment is None:
        return {"generation": generation}
    return {"generation": generation, "system_prompt": experiment.data.system_prompt, "seed": experiment.seed}


def add_options(parser: argparse.ArgumentParser) -> None:
    where = "output directory of an experiment, or a policy: an adapter (OUTPUT/fuse/policy) or a whole model (of `emorl fuse`)"
    parser.add_argument("directory", type=Path, metavar="RUN", help=where)
    setting = "settings of decoding that replace the experiment's, such as generation.max_new_tokens=200"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=setting)
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    parser.add_argument("--prompt", action="append", help="answer this (repeatable); standard input, a line each, otherwise")
    numbers = "NAME=NUMBER,…"
    what = "what matters to you, by objective, such as reflection=0.7,empathy=0.3"
    parser.add_argument("--prefer", default="", metavar=numbers, help=what)
    parser.add_argument("--weights", default="", metavar=numbers, help="instead: weights by policy, as they are")
    what = "let the ensemble answer, also where an adapter was distilled for the whole front"
    parser.add_argument("--ensemble", action="store_true", help=what)


def command(options: argparse.Namespace) -> None:
    from emorl.objectives.preference import parse_numbers

    prefer, weights = parse_numbers("--prefer", options.prefer), parse_numbers("--weights", options.weights)
    wish = Wish(prefer, weights, _generation(options.overrides), options.ensemble)
    check(options.directory, wish)  # before it waits for prompts
    prompts = options.prompt or _lines_of_standard_input()
    for line in generate_lines(options.directory, prompts, wish, Console(), as_json=options.json):
        print(line, flush=True)


def _lines_of_standard_input() -> list[str]:
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no UTF-8 text ({error}); give prompts as text, one a line") from None


def _generation(overrides: Sequence[str]) -> dict[str, Any]:
    content = apply_overrides({}, overrides)
    others = [key for key in content if key != "generation"]
    if others:
        raise UserError(f"{others[0]}: only settings of decoding can be changed here, such as generation.max_new_tokens=200")
    generation = content.get("generation", {})
    if not isinstance(generation, Mapping):
        raise UserError(f"generation: expected settings of decoding, such as generation.max_new_tokens=200, got {generation!r}")
    return dict(generation)
