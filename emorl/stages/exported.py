"""What `emorl export` exports of a run: the sum of its policies, one policy of its own, and what must be said of either."""

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, Experiment, load_kept_experiment
from emorl.runs.layout import ADAPTER, DYNAMIC_CARD, ENSEMBLE, ENSEMBLE_CARD, POLICY, POLICY_CARD, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import BASE, SearchResult, read_result
from emorl.runs.run import read_json
from emorl.stages.generate import Wish, chosen, chosen_point, has_gone_on, told_front

if TYPE_CHECKING:
    from emorl.fusion.export_card import Exported
    from emorl.policies.adapters import Adapter

KINDS = ("soup", "distilled", "fused")
NO_ADAPTER = ("ensemble", "hidden_states", "dynamic")


@dataclass(frozen=True)
class Order:
    """What a user orders: of which run or policy, in which form, where to."""

    directory: Path
    format: str
    what: str | None = None
    wish: Wish = field(default_factory=Wish)
    output: Path | None = None
    rank: int | None = None
    dtype: str | None = None

    @property
    def place(self) -> Path:
        return self.output or self.directory / "export" / self.format

    @property
    def command(self) -> str:
        """The command line that gives the same again."""
        prefer, weights = (
            ",".join(f"{name}={number!r}" for name, number in numbers.items())
            for numbers in (self.wish.prefer, self.wish.weights)
        )
        options = {"what": self.what, "prefer": prefer, "weights": weights, "rank": self.rank, "dtype": self.dtype}
        given = [f"--{name}={value}" for name, value in {**options, "output": self.output}.items() if value]
        return shlex.join(["emorl", "export", str(self.directory), f"--format={self.format}", *given])


def kind_of(order: Order) -> str:
    """Which of `KINDS`, or "policy" where an adapter's folder was given."""
    directory, layout = order.directory, Layout(order.directory)
    if order.what in NO_ADAPTER or (directory / DYNAMIC_CARD).is_file():
        raise UserError(_no_adapter(order))
    if (directory / ENSEMBLE_CARD).is_file():
        raise UserError(f"{directory} is a saved ensemble; give the output of the experiment that found it, and --what soup")
    if (directory / ADAPTER).is_file():
        if order.what is not None:
            raise UserError(f"--what chooses in a run's output; {directory} is one policy: leave it out")
        return "policy"
    if (directory / "config.json").is_file():
        raise UserError(f"{directory} is a whole model, which engines load as it is; give a run's output, or an adapter")
    load_kept_experiment(directory)
    there = {
        "distilled": layout.has_result("distill") and (layout.distillation / POLICY / ADAPTER).is_file(),
        "soup": layout.has_result("search") or bool(order.wish.weights),
        "fused": layout.has_result("fuse") and (layout.fusion / POLICY / ADAPTER).is_file(),
    }
    chooses = order.format == "gguf-lora" or order.wish.prefer or order.wish.weights  # a trade-off, which one policy has not
    if chooses and told_front(layout.distillation / POLICY) is None:
        there = {"soup": there["soup"], **there}
    kind = order.what or next((kind for kind, is_there in there.items() if is_there), "soup")
    if not there[kind]:
        remedy = {
            "distilled": "run `emorl distill`",
            "fused": "run `emorl fuse`",
            "soup": "run `emorl search`, or give --weights",
        }
        raise UserError(f"there is no {kind} policy in {directory} yet: {remedy[kind]} first")
    return kind


def _no_adapter(order: Order) -> str:
    what = (
        "a dynamic ensemble"
        if order.what == "dynamic" or (order.directory / DYNAMIC_CARD).is_file()
        else "a hidden-state ensemble"
    )
    return (
        f"{what} is no sum of parameters, and no engine loads it. Two ways out, from the output of its experiment: `emorl "
        "distill` trains one adapter that answers like it (costs a training; its result.json says how much of the gain it "
        "keeps), or --what soup sums the policies' parameters (costs nothing, answers otherwise: `emorl evaluate` scores "
        "both). `emorl serve` serves it as it is"
    )


def policy_of(order: Order, kind: str) -> Path:
    """The adapter's folder of what is no soup."""
    layout = Layout(order.directory)
    return {"distilled": layout.distillation / POLICY, "fused": layout.fusion / POLICY}.get(kind, order.directory)


def check_wish(order: Order, kind: str) -> None:
    """Refuses weights and preferences that name what is not there, or that nothing can be made for."""
    if kind == "soup":
        _weights(order, load_kept_experiment(order.directory))
    elif order.wish.prefer or order.wish.weights:
        folder = policy_of(order, kind)
        if (told := told_front(folder)) is None:
            option = "--prefer" if order.wish.prefer else "--weights"
            raise UserError(f"{folder} is one policy, made for one trade-off; leave {option} out, or say --what soup")
        chosen_point(order.wish, *told)


def exported(
    order: Order, kind: str, experiment: Experiment | None, base: BaseConfig, progress: Progress
) -> "tuple[Exported, list[dict[str, Any]]]":
    """What is exported, and the points of the front that policies' weights may be chosen from."""
    from emorl.fusion.export_card import Exported
    from emorl.policies.adapters import read_adapter
    from emorl.policies.base import config_of

    front: list[dict[str, Any]] = []
    notes = [] if experiment is None else _notes(experiment)
    if kind == "soup":
        assert experiment is not None
        weights, front = _weights(order, experiment)
        adapters = _policies(experiment)
        card: dict[str, Any] = {"method": "soup", "weights": weights}
        progress.say(f"weights: {', '.join(f'{name} {weight:.3g}' for name, weight in weights.items())}")
        if front and experiment.ensemble.aggregate == "hidden_states":
            notes.append(
                "The search scored the hidden-state ensemble of these policies; their parameters' sum answers otherwise. "
                "`emorl distill` makes an adapter that answers like the ensemble, `emorl evaluate` scores both."
            )
            progress.warn("export: a soup answers otherwise than the hidden-state ensemble that the search scored")
    else:
        folder = policy_of(order, kind)
        adapters, weights = {kind: read_adapter(folder)}, {kind: 1.0}
        file = folder / POLICY_CARD
        card = {key: value for key, value in (read_json(file) if file.is_file() else {}).items() if key != "base_fingerprint"}
        notes.extend(_told(order, folder, experiment, progress))
    absolute = str(Path(base.model).absolute()) if Path(base.model).exists() else base.model
    return Exported(adapters, weights, absolute, config_of(base), order.command, notes, card), front


def _weights(order: Order, experiment: Experiment) -> tuple[dict[str, float], list[dict[str, Any]]]:
    layout = Layout(experiment.output)
    if layout.has_result("search"):
        found = read_result(SearchResult, layout.search)
        ranked = sorted(found.front, key=lambda point: -point.value)
        return dict(chosen(experiment, order.wish)["weights"]), [asdict(point) for point in ranked]
    from emorl.objectives.preference import check_weights

    names = [*experiment.policy_names, *([BASE] if experiment.ensemble.include_base else [])]
    return check_weights("--weights", order.wish.weights, names), []


def _policies(experiment: Experiment) -> "dict[str, Adapter]":
    """Those that the search saved, else those that were trained."""
    from emorl.aggregation.saved import read_saved_adapters
    from emorl.policies.adapters import read_adapter

    layout = Layout(experiment.output, experiment.policies)
    saved = layout.search / ENSEMBLE
    if (saved / ENSEMBLE_CARD).is_file():
        return read_saved_adapters(saved, read_json(saved / ENSEMBLE_CARD)["adapter_scales"])
    folders = layout.trained(experiment.policy_names)
    return {name: read_adapter(folder, experiment.ensemble.adapter_scale) for name, folder in folders.items()}


def _told(order: Order, folder: Path, experiment: Experiment | None, progress: Progress) -> list[str]:
    """How a policy for the whole front is told its weights."""
    from emorl.policies.preference_line import PreferenceLine

    told, line = told_front(folder), PreferenceLine.read(folder)
    if told is None or line is None:
        return []
    if experiment is not None and has_gone_on(experiment.output, told[1]):
        progress.warn(f"the search in {experiment.output} has gone on since; `emorl distill` makes the adapter anew")
    said = line.text(chosen_point(order.wish, *told)["weights"])
    progress.say(f"told: {said}")
    where = "the system turn, as its last paragraph" if line.has_system_turn else "the first line of the user's turn"
    return [
        f"It is one policy for the whole front: {where}, says what matters, such as `{said}` (wording: `{line.wording}`, for "
        f"{', '.join(line.names)}). Without that line it answers as it was not trained to."
    ]


def _notes(experiment: Experiment) -> list[str]:
    """What whoever serves the export elsewhere must do as the experiment did."""
    data, quantization = experiment.data, experiment.base.quantization
    said = {
        "Prompts had this system turn": data.system_prompt,
        "The chat template in this folder has these arguments set (an engine that has its own template needs them)":
            dict(data.chat_template_kwargs or {}),
        "An answer begins behind this mark": data.after,
        "The policies were trained over the base in so many bits": quantization and quantization.bits,
        "Answers were decoded with": dict(experiment.generation),
    }  # fmt: skip
    return [f"{what}: `{value}`." for what, value in said.items() if value]
