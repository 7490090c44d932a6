"""What a run, or a policy in a folder, offers to a server: everything in it that answers, loaded over one base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config.experiment import load_kept_experiment
from emorl.runs.layout import ADAPTER, ENSEMBLE, POLICY, POLICY_CARD, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import BASE, SearchResult, best_dynamic_ensemble, read_result
from emorl.runs.run import read_json
from emorl.stages.generate import Wish, dynamic_in, of_policy, settings_of, told_front
from emorl.stages.materials import Materials

if TYPE_CHECKING:
    from emorl.policies.base import Base
    from emorl.serving.models import Model, Steered
    from emorl.serving.preparing import Preparing

_ALONE = "policy"


@dataclass
class _Offer:
    """What was found: what takes weights, and what is fixed."""

    steered: "list[Steered]" = field(default_factory=list)
    fixed: "list[Model]" = field(default_factory=list)


def load_served(
    directory: Path, wish: Wish, longest_prompt: int | None = None, progress: Progress | None = None
) -> "Preparing":
    """Models by name and how requests to them are read.

    Args:
        directory: an experiment's output with a search, a fusion, a distilled adapter or a dynamic ensemble, or a policy's
            folder.
        wish: settings of decoding that replace the experiment's.

    Raises:
        UserError: nothing there that answers, or settings that cannot be served.
    """
    progress = progress or Silent()
    if Layout(directory).experiment.is_file():
        return _of_experiment(directory, wish, longest_prompt, progress)
    if (dynamic := dynamic_in(directory)) is not None:
        model = _of_dynamic(dynamic)
        generation = {**model.voice.ensemble.decoding.generation, **wish.generation}  # type: ignore[union-attr]
        return _preparing(_Offer(fixed=[model]), model.voice.tokenizer, {"generation": generation}, longest_prompt)  # type: ignore[union-attr]
    from emorl.aggregation.ensemble import AdapterMixture, HiddenStateEnsemble
    from emorl.policies.adapters import Adapter

    speaker = of_policy(directory, wish, progress)
    model, offer = speaker.model, _Offer()
    if not isinstance(model, AdapterMixture):  # a whole model is a base without an adapter
        model = HiddenStateEnsemble(model, {_ALONE: Adapter(Path(), {}, None, None)})
    _add_adapter(offer, _ALONE, directory, model, prefix="")
    settings = {"generation": speaker.generation, "system_prompt": speaker.system_prompt}
    return _preparing(offer, speaker.tokenizer, settings, longest_prompt)


def _of_experiment(directory: Path, wish: Wish, longest_prompt: int | None, progress: Progress) -> "Preparing":
    from emorl.aggregation.ensemble import HiddenStateEnsemble
    from emorl.policies.base import read_policies

    experiment, layout, offer = load_kept_experiment(directory), Layout(directory), _Offer()
    settings, materials = settings_of(experiment, wish), Materials(experiment)
    dynamic = best_dynamic_ensemble(layout)
    adapters = {"fused": layout.fusion / POLICY, "distilled": layout.distillation / POLICY}
    adapters = {name: folder for name, folder in adapters.items() if (folder / ADAPTER).is_file()}
    if layout.has_result("search") or not (adapters or dynamic):
        read_result(SearchResult, layout.search)  # or says what is missing, before a base loads
        progress.say("loading the base and its policies")
        _add_search(offer, layout, experiment.ensemble.aggregate, materials.base)
    for name, folder in adapters.items():
        progress.say(f"loading the {name} policy")
        adapter = read_policies({_ALONE: folder}, materials.base)
        _add_adapter(offer, name, folder, HiddenStateEnsemble(materials.base.model, adapter), prefix=name)
    if dynamic is not None:
        progress.say("loading the dynamic ensemble")
        offer.fixed.append(_of_dynamic(dynamic))
    only_dynamic = not offer.steered and len(offer.fixed) == 1 and dynamic is not None
    tokenizer = offer.fixed[0].voice.tokenizer if only_dynamic else materials.base.tokenizer  # type: ignore[union-attr]
    return _preparing(offer, tokenizer, settings, longest_prompt)


def _add_search(offer: _Offer, layout: Layout, aggregate: str, base: "Base") -> None:
    """The front by hidden states and as soups, each policy alone, and the base."""
    from emorl.aggregation.ensemble import MIXTURES
    from emorl.aggregation.saved import load_base_of, read_saved_adapters, read_settings
    from emorl.serving.models import Model, Steered
    from emorl.serving.voices import Voice

    saved = layout.search / ENSEMBLE
    settings = read_settings(saved, MIXTURES[aggregate].__name__)
    model = load_base_of(saved, settings, base.model, {})
    policies = read_saved_adapters(saved, settings["adapter_scales"])
    result = read_result(SearchResult, layout.search)
    front = sorted(result.front, key=lambda point: -point.value)
    names = list(result.best.weights)
    mixtures = {"": MIXTURES[aggregate](model, policies, include_base=True)}
    if aggregate == "hidden_states":
        mixtures["soup"] = MIXTURES["parameters"](model, policies, include_base=True)
    for prefix, mixture in mixtures.items():

        def voice(weights: Mapping[str, float], mixture: Any = mixture) -> Voice:
            return Voice(mixture, weights)

        offer.steered.append(Steered(prefix, front, result.best, names, voice, is_scored=prefix == ""))
    alone = {name: f"emorl/policy/{name}" for name in policies} | {BASE: f"emorl/{BASE}"}
    for name, model_name in alone.items():
        kind = BASE if name == BASE else "policy"
        offer.fixed.append(Model(model_name, kind, Voice(mixtures[""], {name: 1.0}), {name: 1.0}))


def _add_adapter(offer: _Offer, name: str, folder: Path, mixture: Any, prefix: str) -> None:
    """One adapter: fixed, or told weights by the line it was trained with; then `prefix` begins its names."""
    from emorl.policies.preference_line import PreferenceLine
    from emorl.serving.models import Model, Steered
    from emorl.serving.voices import Voice

    told, line = told_front(folder), PreferenceLine.read(folder)
    alone = {mixture.policy_names[0]: 1.0}
    if told is None or line is None:
        card = folder / POLICY_CARD
        weights = read_json(card).get("weights") if card.is_file() else None
        offer.fixed.append(Model(f"emorl/{name}", name, Voice(mixture, alone), weights))
        return
    best, front = told
    front = sorted(front, key=lambda point: -point.value)
    told_weights = lambda weights: Voice(mixture, alone, line, weights)  # noqa: E731
    offer.steered.append(Steered(prefix, front, best, line.names, told_weights, is_scored=False))


def _of_dynamic(folder: Path) -> "Model":
    from emorl.dynamic.ensemble import DynamicEnsemble
    from emorl.serving.models import Model
    from emorl.serving.voices import DynamicVoice

    return Model("emorl/dynamic", "dynamic", DynamicVoice(DynamicEnsemble.from_pretrained(folder)))


def _preparing(offer: _Offer, tokenizer: Any, settings: Mapping[str, Any], longest_prompt: int | None) -> "Preparing":
    from emorl.policies.prompts import answers_begin_after
    from emorl.serving.models import Models
    from emorl.serving.preparing import Defaults, Preparing

    models, after = Models(offer.steered, offer.fixed), answers_begin_after(tokenizer)
    for model in models.listed():
        model.voice.sampling(settings["generation"], 1, 1)  # or says what cannot be served
    defaults = Defaults(settings["generation"], settings.get("system_prompt"), after, longest_prompt)
    return Preparing(models, tokenizer, defaults)
