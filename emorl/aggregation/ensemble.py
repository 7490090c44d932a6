"""Policies combined while decoding: K LoRA adapters on one base behind transformers' own `generate()`.

`HiddenStateEnsemble` is EMORL's aggregation (arXiv 2505.02579, section on hidden-state aggregation): the policies' last
hidden states, all computed on the same prefix, are averaged with weights and go through the shared head once. That is
exactly the weighted average of the policies' logits, a product of experts. Departures from the authors' code: one
shared base with stacked adapters instead of K models, a KV cache, batches with padding, sampling and beams; of an
encoder-decoder, each policy's encoder runs once, not once per token.
`ParameterAverage` is its rival with the same interface: the weighted sum of the adapters, one row per sequence.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from emorl.aggregation.capabilities import CAPABILITIES
from emorl.aggregation.given_weights import Vector, Weights, active_policies, in_order, say_other_sum, weight_rows
from emorl.aggregation.policy_encoder import PolicyEncoder, batch_of
from emorl.aggregation.row_cache import RowCache, has_only_full_attention
from emorl.aggregation.saved import (
    Front,
    chosen_weights,
    load_base_of,
    read_saved_adapters,
    read_saved_tokenizer,
    read_settings,
    reference_to,
    save,
)
from emorl.aggregation.stacked_lora import (
    AggregatingHead,
    StackedLoraLinear,
    SummedLoraLinear,
    aggregated,
    current_mixing,
    mixing,
    policy_rows,
    stack_adapters,
)
from emorl.policies.adapters import Adapter, base_fingerprint
from emorl.policies.base import quantization_of
from emorl.policies.placement import device_of

BASE_POLICY = "base"
_NEEDED_OF_DECODERS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
_NEEDED_OF_ENCODER_DECODERS = ("attention_mask", "decoder_attention_mask", "encoder_outputs", "past_key_values")


class AdapterMixture(PreTrainedModel, GenerationMixin):
    """What the two ways of combining adapters share; abstract: a subclass says how one forward combines the policies.

    The base's parameters are shared, not copied: `.to()` and dtype changes reach the base too. Weights are not
    normalised: under greedy decoding only their direction matters, when sampling their sum acts as an inverse
    temperature. Beside what `generate()` knows, it takes `weights`: one vector (K,) or one row per sequence (B, K), as
    numbers in policy order or as mappings by policy name.
    """

    main_input_name = "input_ids"
    _lora_layer: type[nn.Module]
    tokenizer: PreTrainedTokenizerBase | None = None
    """what was saved beside it; None where nothing was"""

    def __init__(
        self,
        base_model: PreTrainedModel,
        adapters: Mapping[str, Adapter],
        weights: Vector | None = None,
        include_base: bool = False,
    ) -> None:
        """`adapters` maps policy names to adapters, in policy order; `weights` defaults to 1/K each.

        With `include_base` the bare base is one more, last policy named "base", and weights may be negative: (1 + a)
        for a policy and -a for the base extrapolates beyond it. Without it, weights must be at least 0.
        """
        self._check_base(base_model)
        if not adapters:
            raise ValueError("No adapters given; expected at least one policy, as {name: read_adapter(path)}.")
        if include_base and BASE_POLICY in adapters:
            raise ValueError(f"A policy is named {BASE_POLICY!r}, as include_base names the bare base; rename it.")
        bare = {BASE_POLICY: Adapter(Path(), {}, None, None)} if include_base else {}
        policies = stack_adapters(base_model, [*adapters.values(), *bare.values()], self._lora_layer).eval()
        vars(self).update({name: getattr(policies, name) for name in CAPABILITIES})
        super().__init__(policies.config)  # no post_init(): it would initialise the base's parameters again
        self.policies = policies
        self.generation_config = deepcopy(base_model.generation_config)
        self.policy_names = (*adapters, *bare)
        self.adapter_paths = {name: adapter.path for name, adapter in adapters.items()}
        self.adapter_scales = {name: adapter.scale for name, adapter in adapters.items()}
        self.include_base = include_base
        self._has_said_sum = False
        self._base_fingerprint = base_fingerprint(base_model)
        self.weights = [1 / len(self.policy_names)] * len(self.policy_names) if weights is None else weights
        self.eval()

    @classmethod
    def _check_base(cls, base_model: PreTrainedModel) -> None:
        name = type(base_model).__name__
        needed = _NEEDED_OF_ENCODER_DECODERS if base_model.config.is_encoder_decoder else _NEEDED_OF_DECODERS
        missing = [key for key in needed if key not in inspect.signature(base_model.forward).parameters]
        if missing or base_model.get_output_embeddings() is None:
            raise ValueError(
                f"{name} cannot be combined (its forward lacks {missing or 'an output head'}); expected a language model "
                "of transformers with a key-value cache, from AutoModelForCausalLM or AutoModelForSeq2SeqLM and without "
                "adapters."
            )

    @property
    def device(self) -> torch.device:
        """Where it takes its tokens; of a base that is spread over devices, its embeddings' one."""
        return device_of(self.policies.get_input_embeddings())

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights in policy order, used where a call gives none."""
        return self._weights

    @weights.setter
    def weights(self, weights: Vector) -> None:
        self._weights_by_row(weights, 1)  # checks them
        self._weights: tuple[float, ...] = tuple(map(float, self.in_order(weights)))

    @property
    @abstractmethod
    def has_rows_by_policy(self) -> bool:
        """Whether each policy has a row of its own for every sequence."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        weights: Weights | None = None,
        active: tuple[int, ...] | None = None,
        aggregate: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
        """Logits (B, T, V) of the combined policies for input_ids (B, T), with `weights` (K,) or (B, K). All that decodes takes
        this step: `generate()`, the trie, and `RowBatch`. Of an encoder-decoder, input_ids (B, S) are the encoder's and
        decoder_input_ids (B, T) the decoder's. `active` are the policies to compute, in ascending order; the weights of all
        others must be 0 (default: all). Without `aggregate` an ensemble hands on the policies' hidden states, (B*K, T, H).
        """
        if labels is not None and decoder_input_ids is None and self.config.is_encoder_decoder:
            decoder_input_ids = self.policies.prepare_decoder_input_ids_from_labels(labels)  # pyright: ignore[reportCallIssue]
        by_sequence = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        batch = batch_of(decoder_input_ids, input_ids, inputs_embeds)
        rows = self._weights_by_row(self.weights if weights is None else weights, batch)
        with mixing(rows, active, aggregate):
            arguments = {name: self._model_rows(value, batch) for name, value in by_sequence.items() if value is not None}
            if encoder_outputs is not None:
                arguments["encoder_outputs"] = self._unpacked(encoder_outputs)
            if labels is not None:
                arguments["labels"] = labels
            if torch.is_tensor(logits_to_keep) or logits_to_keep != 0:  # an encoder-decoder has no such argument
                arguments["logits_to_keep"] = logits_to_keep
            return self.policies(**arguments, past_key_values=past_key_values, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, weights: Weights | None = None, **kwargs: Any) -> Any:
        """transformers' `generate()`, with `weights`: (K,) for all sequences or (B, K), one row per sequence.

        Policies whose weight is 0 for every sequence are not computed. A cache that is returned can be continued with
        weights that leave out the same policies.
        """
        kwargs.pop("active", None)  # an assistant gets all arguments of the model it drafts for
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("encoder_outputs"))
        batch = next((len(tensor) if torch.is_tensor(tensor) else len(tensor[0]) for tensor in given if tensor is not None), 1)
        rows = self._weights_by_row(self.weights if weights is None else weights, batch)
        self._has_said_sum = self._has_said_sum or (self.has_rows_by_policy and say_other_sum(rows))  # else a strength
        active = active_policies(rows)
        with mixing(rows, active):  # the encoder runs in here, before any forward of ours
            # As rows, weights are repeated by transformers with their sequence for beams and return sequences.
            return super().generate(  # pyright: ignore[reportAttributeAccessIssue]
                inputs, *args, weights=rows, active=active, **kwargs
            )

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Of an encoder-decoder: its encoder for all policies, whose hidden states (B, S, K*H) keep one row per
        sequence, as transformers expects when it repeats them for beams."""
        return PolicyEncoder(self) if self.config.is_encoder_decoder else super().get_encoder(modality)

    def _unpacked(self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...]) -> BaseModelOutput:
        """What `PolicyEncoder` gave, (B, S, K*H), as the decoder's rows (B*K, S, H)."""
        by_policy = encoder_outputs[0].unflatten(-1, (-1, self.config.hidden_size))  # (B, S, K, H)
        hidden: Any = by_policy.transpose(1, 2).flatten(0, 1)
        return BaseModelOutput(last_hidden_state=hidden)

    def _model_rows(self, value: Tensor | dict[str, Tensor], batch: int) -> Any:
        """The rows the model computes for a tensor (B, ...) with one row per sequence."""
        if isinstance(value, dict):  # one mask per layer type, made by generate() for a static cache
            return {kind: self._model_rows(mask, batch) for kind, mask in value.items()}
        if value is None or not self.has_rows_by_policy or len(value) < batch:  # a single row serves all
            return value
        active = current_mixing().active
        return value.repeat_interleave(len(self.policy_names) if active is None else len(active), 0)

    def _prepare_cache_for_generation(  # called by generate()
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A cache with room to grow, unless the caller brought one or asked for another kind."""
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        config = self.config.get_text_config(decoder=True)
        if wanted and model_kwargs.get("past_key_values") is None and has_only_full_attention(config):
            cache = RowCache()
            model_kwargs["past_key_values"] = (
                EncoderDecoderCache(cache, DynamicCache(config=config)) if self.config.is_encoder_decoder else cache
            )
            return None
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *args, **kwargs
        )

    def _get_logits_processor(  # called by generate()
        self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """transformers' own; guidance asks this model once more, without the prompt, and does so with the same weights."""
        processors = super()._get_logits_processor(  # pyright: ignore[reportAttributeAccessIssue]
            *args, model_kwargs=model_kwargs, **kwargs
        )
        mixed = {name: (model_kwargs or {}).get(name) for name in ("weights", "active")}
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self, **mixed)
        return processors

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base family's own preparation of masks, positions and cache."""
        return self.policies.prepare_inputs_for_generation(  # pyright: ignore[reportCallIssue]
            *args, **kwargs
        )

    def in_order(self, weights: Any) -> Any:
        """As `given_weights.in_order`."""
        return in_order(weights, self.policy_names)

    def _weights_by_row(self, weights: Weights, batch: int) -> Tensor:
        """Checked weights (B, K) in float32 on the model's device."""
        return weight_rows(weights, batch, self.policy_names, self.include_base).to(self.device)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings all policies share."""
        return self.policies.get_input_embeddings()

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        front: Front | None = None,
    ) -> None:
        """Writes a folder that can be copied alone: the adapters, how they are combined, which base they belong to, and a
        tokenizer (its own by default) and a search's front where there are any. The base stays where it is."""
        folder = Path(save_directory).resolve()
        settings = {
            "combination": type(self).__name__,
            "base": reference_to(self.name_or_path or "", folder),
            "base_fingerprint": self._base_fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": quantization_of(self.policies),
            "adapter_scales": self.adapter_scales,
            "weights": list(self.weights),
            "include_base": self.include_base,
        }
        save(folder, settings, self.adapter_paths, self.tokenizer if tokenizer is None else tokenizer, front)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        directory: str | Path,
        *,
        base: PreTrainedModel | None = None,
        prefer: Mapping[str, float] | None = None,
        weights: Vector | None = None,
        **base_options: Any,
    ) -> Self:
        """Loads what `save_pretrained` wrote, such as the ensemble that a search found.

            HiddenStateEnsemble.from_pretrained("runs/mine/search/ensemble", prefer={"reflection": 0.7, "empathy": 0.3})

        Args:
            base: the model that the policies belong to, if it is loaded already.
            prefer: importance by objective: the front's point that suits it best, instead of the best that was found.
            weights: or weights of the policies.
            base_options: go to the base's own `from_pretrained` (device_map, …).

        Raises:
            UserError: no such ensemble, a base that has gone or changed, or a preference without a front.
        """
        folder = Path(directory).resolve()
        settings = read_settings(folder, cls.__name__)
        weights = chosen_weights(folder, settings["weights"], prefer, weights)
        base_model = load_base_of(folder, settings, base, base_options)
        mixture = cls(base_model, read_saved_adapters(folder, settings["adapter_scales"]), weights, settings["include_base"])
        mixture.tokenizer = read_saved_tokenizer(folder)
        return mixture


class HiddenStateEnsemble(AdapterMixture):
    """Policies aggregated while decoding: one forward for all of them, one averaged last hidden state for the head.

        ensemble = HiddenStateEnsemble(base, {"empathy": read_adapter(first), "brevity": read_adapter(second)})
        ensemble.generate(**tokenizer("Hello", return_tensors="pt"), weights=[0.7, 0.3])

    One forward serves all K policies; the key-value cache holds K rows per sequence, sequence-major. With
    output_hidden_states or output_attentions those are the policies' own, of B*K rows. A bias of the head is added
    once, after aggregation, which equals averaging logits when the weights sum to 1.
    """

    _lora_layer = StackedLoraLinear

    def __init__(
        self,
        base_model: PreTrainedModel,
        adapters: Mapping[str, Adapter],
        weights: Vector | None = None,
        include_base: bool = False,
    ) -> None:
        super().__init__(base_model, adapters, weights, include_base)
        head = self.policies.get_output_embeddings()
        assert head is not None  # _check_base has seen it
        self.policies.set_output_embeddings(AggregatingHead(head))

    @classmethod
    def _check_base(cls, base_model: PreTrainedModel) -> None:
        super()._check_base(base_model)
        cap = getattr(base_model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            raise ValueError(
                f"{type(base_model).__name__} caps its logits (final_logit_softcapping={cap}), so averaging hidden "
                "states is not averaging logits; use ParameterAverage, or a base without a cap."
            )

    @property
    def has_rows_by_policy(self) -> bool:
        return True

    def mixed_hidden_states(self, input_ids: Tensor, attention_mask: Tensor, weights: Weights | None = None) -> Tensor:
        """What the head of a decoder reads, (B, T, H): the weighted sum of the policies' last hidden states, for tokens (B, T)
        with padding on any side and `weights` (K,) or (B, K)."""
        batch = len(input_ids)
        rows = self._weights_by_row(self.weights if weights is None else weights, batch)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # as generate() counts them
        by_sequence = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        with mixing(rows, active_policies(rows)):
            arguments = {name: self._model_rows(value, batch) for name, value in by_sequence.items()}
            return aggregated(self.policies.base_model(**arguments, use_cache=False).last_hidden_state)

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        """Called by transformers' beam search, which knows one row per beam; the cache has K."""
        active = current_mixing().active
        rows = policy_rows(beam_idx, len(self.policy_names) if active is None else len(active))
        past_key_values.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
        return past_key_values


class ParameterAverage(AdapterMixture):
    """Policies fused at run time: the base plus the weighted sum of all adapters' deltas, one row per sequence.

    The rival of `HiddenStateEnsemble` with the same interface, at about the cost of one policy; weights may differ by
    row.
    """

    _lora_layer = SummedLoraLinear

    @property
    def has_rows_by_policy(self) -> bool:
        return False


MIXTURES: Mapping[str, type[AdapterMixture]] = {"hidden_states": HiddenStateEnsemble, "parameters": ParameterAverage}
"""what `ensemble.aggregate` names"""
