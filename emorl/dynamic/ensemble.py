"""The dynamic ensemble as one thing: models, an agent, and how it writes; saved as the agent and references to the models.

>>> ensemble = DynamicEnsemble.from_pretrained("runs/mine/dynamic/ppo/ensemble")
>>> ensemble.generate(["What is 17 + 25?"])[0].text
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file

from emorl.aggregation.saved import located, reference_to
from emorl.config import UserError
from emorl.config.dynamic import AgentConfig
from emorl.config.experiment import BaseConfig
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import WeightChooser
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.engines.loading import load_engine
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.models import Models
from emorl.dynamic.rollout import Answer, Rollout, Span, Turns, write
from emorl.policies.conversation import as_prompt
from emorl.policies.prompts import is_chat
from emorl.runs.layout import DYNAMIC_CARD
from emorl.runs.run import read_json, written_whole_directory

AGENT_FILE = "agent.safetensors"
_BATCH = 64
_BASE_PLACES, _AGENT_PLACES = ("model", "tokenizer"), ("encoder",)


class DynamicEnsemble:
    """Models that write together, with weights that are chosen on the way.

    Args:
        chooser: any `WeightChooser` will do, but only a `SpanAgent` can be saved.
        models: what `load_engine` was given, for saving.
    """

    def __init__(
        self,
        engine: Engine,
        chooser: WeightChooser,
        decoding: Decoding,
        *,
        span: Span = 8,
        turns: Turns = "last",
        models: Models | None = None,
    ) -> None:
        self.engine, self.chooser, self.decoding = engine, chooser, decoding
        self.span: Span = span
        self.turns: Turns = turns
        self.models = models

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[Answer]:
        """One answer to each prompt, in order; of a dialogue answered whole (`turns` all) one for each of its user turns.

        Args:
            prompts: conversations, or texts: one user turn each for policies of a base with a chat template, behind the system
                prompt of their training.
            options: those of `rollout`.
        """
        return self.rollout(prompts, **options).answers

    def rollout(
        self,
        prompts: Sequence[Any],
        *,
        span: Span | None = None,
        seeds: Sequence[int] | None = None,
        batch: int = _BATCH,
        **decoding: Any,
    ) -> Rollout:
        """As `generate`, with the seconds it took.

        Args:
            decoding: fields of `Decoding` that replace the ensemble's own, such as max_new_tokens.
        """
        whole = Rollout()
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        for start in range(0, len(prompts), batch):
            part = write(
                self.engine,
                [self.as_prompt(prompt) for prompt in prompts[start : start + batch]],
                self.chooser,
                replace(self.decoding, **decoding),
                span=self.span if span is None else span,
                turns=self.turns,
                seeds=seeds[start : start + batch],
            )
            whole.answers += [replace(answer, row=answer.row + start) for answer in part.answers]
            whole.seconds += part.seconds
            whole.choosing_seconds += part.choosing_seconds
        return whole

    def last_answers(self, prompts: Sequence[Any], *, seed: int = 0, batch: int = _BATCH) -> Iterator[tuple[int, Answer]]:
        """(index of the prompt, its answer); of a dialogue answered whole, the answer to its last user turn."""
        answers = self.generate(prompts, seeds=[seed + index for index in range(len(prompts))], batch=batch)
        last = {answer.row: answer for answer in answers}
        yield from sorted(last.items())

    def as_prompt(self, prompt: Any) -> Any:
        """A text as the prompts were in training: a conversation where the policies' base has a chat template, with its system
        prompt. Conversations stay."""
        if not isinstance(prompt, str) or not isinstance(self.engine, StackedEngine) or not is_chat(self.engine.tokenizer):
            return prompt
        system_prompt = self.models.system_prompt if self.models is not None else None
        return as_prompt(prompt, True, system_prompt)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `agent.safetensors` and `dynamic.json`, which refers to the models: whole, or not at all."""
        if not isinstance(self.chooser, SpanAgent) or self.models is None:
            raise ValueError("Only an ensemble with a SpanAgent and references to its models can be saved.")
        directory = Path(directory).resolve()
        directory.parent.mkdir(parents=True, exist_ok=True)
        models = self.models
        content = {
            "kind": self.chooser.kind,
            "models": {name: reference_to(place, directory) for name, place in models.places.items()},
            "base": _with_references(models.base, _BASE_PLACES, directory),
            "vocabulary": models.vocabulary,
            "top_k": models.top_k,
            "agent": _with_references(self.chooser.config, _AGENT_PLACES, directory),
            "system_prompt": models.system_prompt,
            "chat_template_kwargs": models.chat_template_kwargs,
            "span": self.span,
            "turns": self.turns,
            "decoding": asdict(self.decoding),
        }
        with written_whole_directory(directory) as temporary:
            save_file(dict(self.chooser.trained_state()), temporary / AGENT_FILE)
            (temporary / DYNAMIC_CARD).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads what `save_pretrained` wrote.

        Raises:
            UserError: nothing there, a model that has gone.
        """
        directory = Path(directory).resolve()
        if not (directory / DYNAMIC_CARD).is_file():
            raise UserError(f"{directory} holds no dynamic ensemble (no {DYNAMIC_CARD} in it); run `emorl dynamic` first")
        content = read_json(directory / DYNAMIC_CARD)
        models = Models(
            {name: located(reference, directory, f"model {name}") for name, reference in content["models"].items()},
            BaseConfig(**_with_places(content["base"], _BASE_PLACES, directory)),
            content["vocabulary"],
            content["top_k"],
            content["system_prompt"],
            content.get("chat_template_kwargs"),
        )
        engine = load_engine(models)
        config = AgentConfig(**_with_places(content["agent"], _AGENT_PLACES, directory))
        agent = SpanAgent(content["kind"], len(models.places), engine.state_width, config).to(engine.device)
        agent.load_trained(load_file(directory / AGENT_FILE))
        decoding = Decoding(**content["decoding"])
        return cls(engine, agent, decoding, span=content["span"], turns=content["turns"], models=models)


def _with_references(block: BaseConfig | AgentConfig, places: Sequence[str], directory: Path) -> dict[str, Any]:
    return {**asdict(block), **{key: reference_to(getattr(block, key) or "", directory) for key in places}}


def _with_places(content: Mapping[str, Any], places: Sequence[str], directory: Path) -> dict[str, Any]:
    return {**content, **{key: content[key] and located(content[key], directory, key) for key in places}}
