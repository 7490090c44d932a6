"""The dynamic ensemble as one thing: models, a controller, and how it writes; saved as the agent and references to the models.

>>> ensemble = DynamicEnsemble.from_pretrained("runs/mine/dynamic/ppo/ensemble")
>>> ensemble.generate(["What is 17 + 25?"])[0].text
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

from safetensors.torch import load_file, save_file

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError, nearest
from emorl.config.dynamic import AgentConfig
from emorl.config.experiment import BaseConfig, Experiment
from emorl.dynamic.agents.agent import Agent
from emorl.dynamic.agents.observation import Controller
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import UnionEngine
from emorl.dynamic.rollout import Answer, Rollout, Turns, write
from emorl.policies.base import is_encoder_decoder, load_base, load_tokenizer, read_policies
from emorl.policies.prompts import is_chat
from emorl.runs.layout import Layout
from emorl.runs.run import read_json, written_whole_directory

AGENT_FILE, DYNAMIC_FILE = "agent.safetensors", "dynamic.json"
ENSEMBLE = "ensemble"
"""directory of a trained one, in its agent's run"""
_BATCH = 64
_DECODING_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p")


def decoding_of(generation: Mapping[str, Any], seed: int) -> Decoding:
    """A `Decoding` from transformers' generation settings.

    Raises:
        UserError: a setting that a dynamic ensemble does not know, such as beams.
    """
    for name in generation:
        if name not in _DECODING_KEYS:
            raise UserError(
                f"generation.{name}: a dynamic ensemble decodes greedily or samples; {nearest(name, _DECODING_KEYS)}"
            )
    samples = bool(generation.get("do_sample", False))
    empty = [name for name in ("max_new_tokens", "temperature", "top_p") if name in generation and generation[name] is None]
    if empty:
        raise UserError(f"generation.{empty[0]}: expected a number, got nothing")
    try:
        return Decoding(
            int(generation.get("max_new_tokens", 64)),
            float(generation.get("temperature", 1.0)) if samples else 0.0,
            float(generation.get("top_p", 1.0)) if samples else 1.0,
            seed,
        )
    except ValueError as error:
        raise UserError(f"generation: {error}") from None


def model_references(experiment: Experiment) -> dict[str, str]:
    """Name -> where its adapter or model is, in the order of the weights.

    Raises:
        UserError: policies that are not trained yet, adapters and whole models mixed.
    """
    models = experiment.dynamic.models
    if not models:
        return {
            name: str(path)
            for name, path in Layout(experiment.output, experiment.policies).trained(experiment.policy_names).items()
        }
    adapters = [name for name, place in models.items() if _is_adapter(place)]
    if adapters and len(adapters) < len(models):
        other = next(name for name in models if name not in adapters)
        raise UserError(
            f"dynamic.models: {adapters[0]} is a LoRA adapter of the base and {other} a model of its own; give adapters "
            "only, or whole models only"
        )
    return dict(models)


def check_models(experiment: Experiment, models: Mapping[str, str]) -> None:
    """Refuses models that are not there, or cannot write with others, before the first one is loaded.

    Raises:
        UserError: one of these; a system prompt for whole models.
    """
    if len(models) < 2:
        raise UserError(f"a dynamic ensemble needs at least two models, and here is {', '.join(models)}; see dynamic.models")
    if all(map(_is_adapter, models.values())):
        is_encoder_decoder(experiment.base.model)  # is it there?
        return
    for name, place in models.items():
        try:
            refused = is_encoder_decoder(place)
        except UserError as error:
            raise UserError(str(error).replace("base.model", f"dynamic.models.{name}", 1)) from None
        if refused:
            raise UserError(
                f"dynamic.models.{name} {place!r} is an encoder-decoder; different models write together as decoders"
            )
    if experiment.data.system_prompt:
        raise UserError("data.system_prompt: different models have templates of their own; write it into the prompts")


def is_conversational(experiment: Experiment, models: Mapping[str, str]) -> bool:
    """Whether prompts are made conversations; of whole models each one renders them by itself."""
    return all(map(_is_adapter, models.values())) and is_chat(load_tokenizer(experiment.base.model))


def load_engine(
    models: Mapping[str, str], base: BaseConfig, *, vocabulary: Literal["top_k", "full"] = "top_k", top_k: int = 10
) -> Engine:
    """The engine of some models: stacked where all are adapters of the base, else by the union of their vocabularies.

    Raises:
        UserError: a model that cannot be loaded, or that cannot write with the others.
    """
    try:
        if all(_is_adapter(place) for place in models.values()):
            loaded = load_base(base)
            policies = read_policies({name: Path(place) for name, place in models.items()}, loaded)
            return StackedEngine(HiddenStateEnsemble(loaded.model, policies), loaded.tokenizer)
        each = [load_base(replace(base, model=place)) for place in models.values()]
        return UnionEngine(
            [one.model for one in each],
            [one.tokenizer for one in each],
            names=tuple(models),
            vocabulary=vocabulary,
            top_k=top_k,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _is_adapter(place: str) -> bool:
    return (Path(place) / "adapter_config.json").is_file()


class DynamicEnsemble:
    """Models that write together under a controller.

    Args:
        agent: what chooses the weights; any `Controller` will do, but only an `Agent` can be saved.
        references: what `load_engine` was given, for saving.
    """

    def __init__(
        self,
        engine: Engine,
        agent: Controller,
        decoding: Decoding,
        *,
        span: int | Literal["turn"] = 8,
        turns: Turns = "last",
        references: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.agent, self.decoding = engine, agent, decoding
        self.span: int | Literal["turn"] = span
        self.turns: Turns = turns
        self.references = references

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[Answer]:
        """One answer to each prompt (text or conversation), in order; of a dialogue answered whole (`turns` all) one for each
        of its user turns. Options are those of `rollout`."""
        return self.rollout(prompts, **options).answers

    def rollout(
        self,
        prompts: Sequence[Any],
        *,
        span: int | Literal["turn"] | None = None,
        seeds: Sequence[int] | None = None,
        batch: int = _BATCH,
        **decoding: Any,
    ) -> Rollout:
        """As `generate`, with the seconds it took.

        Args:
            decoding: fields of `Decoding` that replace the ensemble's own, such as max_new_tokens.
        """
        found = Rollout()
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        for start in range(0, len(prompts), batch):
            part = write(
                self.engine,
                prompts[start : start + batch],
                self.agent,
                replace(self.decoding, **decoding),
                span=self.span if span is None else span,
                turns=self.turns,
                seeds=seeds[start : start + batch],
            )
            found.answers += [replace(answer, row=answer.row + start) for answer in part.answers]
            found.seconds += part.seconds
            found.controller_seconds += part.controller_seconds
        return found

    def last_answers(self, prompts: Sequence[Any], *, seed: int = 0, batch: int = _BATCH) -> Iterator[tuple[int, Answer]]:
        """(index of the prompt, its answer); of a dialogue answered whole, the answer to its last user turn."""
        found = self.generate(prompts, seeds=[seed + index for index in range(len(prompts))], batch=batch)
        last = {answer.row: answer for answer in found}
        yield from sorted(last.items())

    def as_prompt(self, text: str) -> Any:
        """A user's text as the prompts were in training: a conversation where the base has a chat template, with its system
        prompt."""
        if not isinstance(self.engine, StackedEngine) or not is_chat(self.engine.tokenizer):
            return text
        system_prompt = (self.references or {}).get("system_prompt")
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*system, {"role": "user", "content": text}]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `agent.safetensors` and `dynamic.json`, which refers to the models (local ones by paths relative to the
        directory): whole, or not at all."""
        if not isinstance(self.agent, Agent) or self.references is None:
            raise ValueError("Only an ensemble with an Agent and references to its models can be saved.")
        directory = Path(directory).resolve()
        directory.parent.mkdir(parents=True, exist_ok=True)
        encoder = self.agent.config.encoder
        described = {
            "kind": self.agent.kind,
            "models": {name: _relative(place, directory) for name, place in self.references["models"].items()},
            "base": {**self.references["base"], "model": _relative(self.references["base"]["model"], directory)},
            "vocabulary": self.references["vocabulary"],
            "top_k": self.references["top_k"],
            "agent": {**asdict(self.agent.config), "encoder": encoder and _relative(encoder, directory)},
            "system_prompt": self.references["system_prompt"],
            "span": self.span,
            "turns": self.turns,
            "decoding": asdict(self.decoding),
        }
        with written_whole_directory(directory) as temporary:
            save_file(dict(self.agent.trained_state()), temporary / AGENT_FILE)
            (temporary / DYNAMIC_FILE).write_text(json.dumps(described, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads what `save_pretrained` wrote.

        Raises:
            UserError: nothing there, a model that has gone.
        """
        directory = Path(directory).resolve()
        if not (directory / DYNAMIC_FILE).is_file():
            raise UserError(f"{directory} holds no dynamic ensemble (no dynamic.json in it); run `emorl dynamic` first")
        said = read_json(directory / DYNAMIC_FILE)
        models = {name: _located(place, directory) for name, place in said["models"].items()}
        base = {**said["base"], "model": _located(said["base"]["model"], directory)}
        engine = load_engine(models, BaseConfig(**base), vocabulary=said["vocabulary"], top_k=said["top_k"])
        config = AgentConfig(**{**said["agent"], "encoder": _located(said["agent"]["encoder"] or "", directory) or None})
        agent = Agent(said["kind"], len(models), engine.state_width, config).to(engine.device)
        agent.load_trained(load_file(directory / AGENT_FILE))
        kept = {key: said[key] for key in ("vocabulary", "top_k", "system_prompt")}
        references = {"models": models, "base": base, **kept}
        return cls(engine, agent, Decoding(**said["decoding"]), span=said["span"], turns=said["turns"], references=references)


def best_ensemble(folder: Path) -> Path | None:
    """Directory of the trained ensemble that was best on the validation prompts, in the folder of `emorl dynamic`; None before
    there is one."""
    found = {
        directory.parent / ENSEMBLE: read_json(directory)["validation"]
        for directory in sorted(folder.glob("*/result.json"))
        if (directory.parent / ENSEMBLE).is_dir()
    }
    return max(found, key=lambda directory: found[directory]) if found else None


def references_of(models: Mapping[str, str], experiment: Experiment) -> dict[str, Any]:
    """What `DynamicEnsemble` needs to be saved."""
    config = experiment.dynamic
    how = {"vocabulary": config.vocabulary, "top_k": config.top_k, "system_prompt": experiment.data.system_prompt}
    return {"models": dict(models), "base": asdict(experiment.base), **how}


def _relative(place: str, directory: Path) -> str:
    return f"./{os.path.relpath(Path(place).resolve(), directory)}" if Path(place).is_dir() else place


def _located(place: str, directory: Path) -> str:
    if not place.startswith("./"):
        return place
    path = (directory / place).resolve()
    if not path.is_dir():
        raise UserError(f"{directory / 'dynamic.json'} refers to {path}, which has gone; put it back or correct it")
    return str(path)
