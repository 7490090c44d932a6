"""What stages work on: prompts, objectives, base, policies and their mixture, each loaded once, when first asked for.

Everything is loaded from what the experiment names, a path or an object. Imports stand inside functions here, so that a stage
asks for a file's prompts without waiting for a model's library.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.config.objects import callable_name
from emorl.config.yaml import as_mapping
from emorl.runs.layout import Layout

if TYPE_CHECKING:
    from peft import PeftModel

    from emorl.aggregation.ensemble import AdapterMixture
    from emorl.data import Splits
    from emorl.objectives.loading import Objective
    from emorl.policies.adapters import Adapter
    from emorl.policies.base import Base

Loaded = TypeVar("Loaded")

_PROCESS = uuid.uuid4().hex[:8]
_UNNAMED = "unnamed function"


class Materials:
    """Of one experiment; those of another one in the same command share what both name alike."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.layout = Layout(experiment.output, experiment.policies)
        self._loaded: dict[str, Any] = {}

    def of(self, experiment: Experiment) -> "Materials":
        """The materials of another experiment, which share what is loaded."""
        other = Materials(experiment)
        other._loaded = self._loaded
        return other

    @property
    def is_conversational(self) -> bool:
        """Whether prompts of the base are conversations."""
        from emorl.policies.prompts import is_chat

        return is_chat(self.tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The base's, which asks and reads as `data` says, without the base."""
        from emorl.policies.base import load_tokenizer

        base, data = self.experiment.base, self.experiment.data
        asked = [as_mapping(base, _in_memory), data.chat_template_kwargs, data.after]
        return self._once("tokenizer", asked, lambda: self._prepared(load_tokenizer(base)))

    @property
    def splits(self) -> "Splits":
        """Training, validation and test prompts, which the base's template takes and which fit into the base.

        Raises:
            UserError: one that does not.
        """
        splits = self.splits_as(self.is_conversational)
        return self._once("prompts that fit", self._asked, lambda: self._checked(splits))

    def _checked(self, splits: "Splits") -> "Splits":
        from emorl.policies.base import config_of
        from emorl.policies.prompts import check_prompts

        new_tokens = self.experiment.generation.get("max_new_tokens")
        for part in (splits.train, splits.validation, splits.test):
            check_prompts(self.tokenizer, config_of(self.experiment.base), part["prompt"], new_tokens)
        return splits

    @property
    def _asked(self) -> list[Any]:
        """What prompts and answers depend on beside the data: the base, and how it is asked and read."""
        data, generation = self.experiment.data, self.experiment.generation
        named = [as_mapping(block, _in_memory) for block in (self.experiment.base, data)]
        return [*named, data.seed or self.experiment.seed, generation.get("max_new_tokens")]

    def _prepared(self, tokenizer: Any) -> Any:
        """The same tokenizer, which asks and reads as `data` says."""
        from emorl.policies.prompts import prepare_tokenizer

        return prepare_tokenizer(tokenizer, self.experiment.data.chat_template_kwargs, self.experiment.data.after)

    def splits_as(self, conversational: bool) -> "Splits":
        """The prompts as conversations, or as they are."""
        from emorl.data import load_prompts

        config, seed = self.experiment.data, self.experiment.seed
        drawn = replace(config, seed=seed if config.seed is None else config.seed)
        settings = [as_mapping(drawn, _in_memory), conversational]
        return self._once("prompts", settings, lambda: load_prompts(config, seed, conversational))

    @property
    def objectives(self) -> "list[Objective]":
        """All of them, counting what they score from now on."""
        return [self.objective(name) for name in self.experiment.objectives]

    def objective(self, name: str) -> "Objective":
        """One of them, counting what it scores from now on."""
        from emorl.objectives.loading import load_objective

        config = self.experiment.objectives[name]
        return self._once(f"objective {name}", config, lambda: load_objective(name, config, self._tokenize)).counted_anew()

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of the base's, for reward functions that ask for them."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    @property
    def base(self) -> "Base":
        """The model that policies share, as it is; what changes it takes `own_base()`."""
        data = self.experiment.data
        asked = [as_mapping(self.experiment.base, _in_memory), data.chat_template_kwargs, data.after]
        return self._once("base", asked, lambda: self._load_base(is_changed=False))

    def own_base(self) -> "Base":
        """The base loaded anew, for a stage that changes it."""
        return self._load_base(is_changed=True)

    def _load_base(self, *, is_changed: bool) -> "Base":
        from emorl.policies.base import load_base

        base = load_base(self.experiment.base, is_changed=True) if is_changed else load_base(self.experiment.base)
        self._prepared(base.tokenizer)
        return base

    @property
    def policies(self) -> "dict[str, Adapter]":
        """The trained policies' adapters by name, times `ensemble.adapter_scale`.

        Raises:
            UserError: one is not trained yet, or does not fit the base.
        """
        from emorl.policies.base import read_policies

        folders, scale = self.layout.trained(self.experiment.policy_names), self.experiment.ensemble.adapter_scale
        settings = [{name: str(folder) for name, folder in folders.items()}, scale]
        return self._once("policies", settings, lambda: read_policies(folders, self.base, scale))

    def peft_policy(self, name: str) -> "PeftModel":
        """A trained policy as PEFT runs it, on a base of its own.

        Raises:
            UserError: it is not trained yet.
        """
        from peft import PeftModel

        [folder] = self.layout.trained([name]).values()
        return PeftModel.from_pretrained(self.own_base().model, str(folder)).eval()

    def mixture(self, aggregate: str | None = None) -> "AdapterMixture":
        """The policies combined as `ensemble` says, or by another way of `aggregate`."""
        from emorl.aggregation.ensemble import MIXTURES

        config = self.experiment.ensemble
        try:
            return MIXTURES[aggregate or config.aggregate](self.base.model, self.policies, include_base=config.include_base)
        except ValueError as error:
            raise UserError(str(error)) from None

    def not_resumed(self) -> list[str]:
        """One line for each objective that no other process can recognise, and so no interrupted run continue."""
        functions = {name: config.function for name, config in self.experiment.objectives.items()}
        return [
            f"objective {name!r} is a function without a name of its own: these runs are not resumed by another process"
            for name, function in functions.items()
            if function is not None and not isinstance(function, str) and identity_of(function).startswith(_UNNAMED)
        ]

    def _once(self, what: str, settings: Any, load: Callable[[], Loaded]) -> Loaded:
        """What was loaded for these settings before; else it is loaded now."""
        plain = settings if isinstance(settings, list) else as_mapping(settings, _in_memory)
        key = json.dumps([what, plain])
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]


def _in_memory(value: Any) -> str:
    return f"object {id(value)}"


def identity_of(value: Any) -> str:
    """What stands for an object of the caller's in a run's settings: a data set's fingerprint, a function's `module:name`, a
    model's fingerprint. A function without a name of its own is known in this process only."""
    from datasets import Dataset
    from transformers import PreTrainedModel

    from emorl.policies.adapters import base_fingerprint

    if isinstance(value, Dataset):
        return f"data set {value._fingerprint}"
    if isinstance(value, PreTrainedModel):
        return f"model {base_fingerprint(value)}"
    return callable_name(value) or f"{_UNNAMED} {id(value)} of process {_PROCESS}"
