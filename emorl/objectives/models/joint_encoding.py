"""Prompt and completion as one input of a sequence classifier: the same in training and in scoring."""

from collections.abc import Sequence

from transformers import BatchEncoding, PreTrainedTokenizerBase

_MULTIPLE = 8  # few different lengths: kernels made for a length are made once


def encode_jointly(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], prompts: Sequence[str] | None
) -> BatchEncoding:
    """Token ids (B, T), padded on the right and cut at `tokenizer.model_max_length`; T is a multiple of 8 where that is.

    With a chat template (decoders) the two are a user and an assistant turn, otherwise (encoders) a pair of segments.
    Without prompts the completion stands alone.
    """
    cut = {
        "padding": True,
        "padding_side": "right",  # on the left it would shift an encoder's positions
        "pad_to_multiple_of": _MULTIPLE if tokenizer.model_max_length % _MULTIPLE == 0 else None,
        "truncation": True,
        "return_tensors": "pt",
    }
    if prompts is None:
        return tokenizer(list(completions), **cut)
    if tokenizer.chat_template is None:
        return tokenizer(list(prompts), list(completions), **cut)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    return tokenizer(texts, add_special_tokens=False, **cut)
