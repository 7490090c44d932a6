"""A model of a few parameters with its tokenizer: settings are tried on it before a real one is loaded."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

_TOKENS = ("<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()))


def tiny_model(*, encoder_decoder: bool = False, vocabulary: int = len(_TOKENS)) -> PreTrainedModel:
    """A Llama, or a T5, of one layer; random.

    Args:
        vocabulary: at least the tokenizer's; more, where settings name tokens of another one.
    """
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
    if encoder_decoder:
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config.from_dict({**tokens, **sizes, "decoder_start_token_id": 0}))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig.from_dict({**tokens, **sizes}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes."""
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(_TOKENS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)
