"""Who answers a request: a mixture of policies at its weights, or a dynamic ensemble, which sets its own."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import GenerationMode, LogitsProcessorList

from emorl.aggregation.ensemble import AdapterMixture
from emorl.aggregation.row_batch import can_join
from emorl.config import UserError
from emorl.dynamic.engines.engine import decoding_of
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import UnionEngine
from emorl.dynamic.ensemble import DynamicEnsemble
from emorl.policies.conversation import prompt_text
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import is_chat, longest_text, token_ids


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: `choose`'s settings, behind what else transformers does to logits (penalties, bans).

    Raises:
        UserError: settings that give no single text, such as beams.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    ends: tuple[int, ...] = ()
    """tokens that end a text"""
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generation: Mapping[str, Any] = field(default_factory=dict)
    """all of it in transformers' words, for what `generate()` writes"""

    @classmethod
    def of(cls, mixture: AdapterMixture, generation: Mapping[str, Any], prompt_tokens: int, most_tokens: int = 1) -> "Sampling":
        """As `mixture.generate(**generation, max_new_tokens=most_tokens)` would choose them."""
        generation = {name: value for name, value in generation.items() if name != "max_new_tokens"}
        model: Any = mixture  # generate() itself calls these
        config, others = model._prepare_generation_config(None, **generation)
        model._prepare_special_tokens(config, True, device=mixture.device)
        config.max_length = prompt_tokens + most_tokens
        mode = config.get_generation_mode()
        if others or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            what = ", ".join(others) or f"{mode.value}".replace("_", " ")
            raise UserError(f"generation: {what} cannot be served; serve greedy decoding or sampling")
        ends = () if config._eos_token_tensor is None else tuple(config._eos_token_tensor.flatten().tolist())

        def processors() -> LogitsProcessorList:
            length = {"input_ids_seq_length": prompt_tokens, "device": mixture.device, "model_kwargs": {}}
            return model._get_logits_processor(config, **length)

        if not config.do_sample:
            return cls(ends=ends, processors=processors(), generation=generation)
        ours = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        whole = processors()
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 0
        rest = processors()
        config.do_sample = False
        if len(rest) > len(processors()):  # other tails are cut off, behind these
            return cls(temperature=1.0, ends=ends, processors=whole, generation=generation)
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        given = {name: default if ours[name] is None else ours[name] for name, default in defaults.items()}
        return cls(**given, ends=ends, processors=rest, generation=generation)


@dataclass(frozen=True, eq=False)
class Voice:
    """A mixture at weights of its policies, by name; what it is told, where it reads a line."""

    mixture: AdapterMixture
    weights: Mapping[str, float]
    line: PreferenceLine | None = None
    told: Mapping[str, float] = field(default_factory=dict)

    @property
    def row(self) -> Tensor:
        """The weights in the mixture's order, (K,)."""
        return torch.tensor(self.mixture.in_order(self.weights), dtype=torch.float32)

    @property
    def joins(self) -> bool:
        """Whether its texts can be written beside others."""
        return can_join(self.mixture)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.mixture.config.is_encoder_decoder)

    @property
    def reads_tokens(self) -> bool:
        """Whether a prompt may be tokens: not where a line goes into its text."""
        return self.line is None

    @property
    def bytes_per_place(self) -> int:
        """Keys and values of one token, of all policies that are computed."""
        config = self.mixture.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        lanes = int((self.row != 0).sum()) if self.mixture.has_rows_by_policy else 1
        return 2 * config.num_hidden_layers * heads * width * self.mixture.dtype.itemsize * lanes

    @property
    def vocabulary(self) -> int:
        """Tokens that it can read."""
        embeddings: Any = self.mixture.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def longest(self) -> int | None:
        """Tokens that it has positions for."""
        return longest_text(self.mixture.config)

    def reads_turns(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether it is asked conversations, not texts."""
        return is_chat(tokenizer)

    def prompt(self, prompt: Any) -> Any:
        """The prompt, a text or a conversation, with the line in it."""
        return prompt if self.line is None else self.line.put_into(prompt, self.told)

    def ids(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
        """The prompt's tokens; the errors of `token_ids`."""
        return token_ids(tokenizer, prompt, chat_template_kwargs)

    def sampling(self, generation: Mapping[str, Any], prompt_tokens: int, most_tokens: int) -> Sampling:
        """How its tokens are chosen. Of an encoder-decoder, `generate()` makes the processors anew.

        Raises:
            UserError: settings that cannot be served.
        """
        return Sampling.of(self.mixture, generation, prompt_tokens, most_tokens)


@dataclass(frozen=True, eq=False)
class DynamicVoice:
    """A dynamic ensemble; what requests ask of any voice, as `Voice` has it."""

    ensemble: DynamicEnsemble
    joins = reads_tokens = is_encoder_decoder = False
    bytes_per_place = 0
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    """its first model's, to count with: a copy, while its own writes"""

    def __post_init__(self) -> None:
        engine = self.ensemble.engine
        assert isinstance(engine, StackedEngine | UnionEngine)
        own = engine.tokenizers[0] if isinstance(engine, UnionEngine) else engine.tokenizer
        object.__setattr__(self, "tokenizer", deepcopy(own))

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    @property
    def longest(self) -> int | None:
        engine = self.ensemble.engine
        models = engine.models if isinstance(engine, UnionEngine) else [engine.ensemble]  # type: ignore[union-attr]
        known = [longest for model in models if (longest := longest_text(model.config)) is not None]
        return min(known, default=None)

    def reads_turns(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Different models each read a conversation in their own way."""
        return isinstance(self.ensemble.engine, UnionEngine) or is_chat(self.tokenizer)

    def prompt(self, prompt: Any) -> Any:
        return prompt

    def ids(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
        """Of its first model; it renders prompts as in its training.

        Raises:
            UserError: arguments for a template.
        """
        if chat_template_kwargs:
            raise UserError("chat_template_kwargs: a dynamic ensemble renders prompts as in its training; leave them out")
        return token_ids(self.tokenizer, prompt if is_chat(self.tokenizer) else prompt_text(prompt))

    def sampling(self, generation: Mapping[str, Any], prompt_tokens: int, most_tokens: int) -> Sampling:
        decoding = decoding_of(generation, seed=0)
        return Sampling(decoding.temperature, decoding.top_p)


AnyVoice = Voice | DynamicVoice
