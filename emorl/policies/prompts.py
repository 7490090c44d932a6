"""The only place a prompt is rendered: TRL's rendering (chat template with generation prompt), padded as the tokenizer says."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from emorl.config import UserError

_AFTER = "answer_after"
_ARGUMENTS = re.compile(r"\A(?:{# emorl #}{% set \w+ = .*? %}\n)+")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None, after: str | None
) -> PreTrainedTokenizerBase:
    """The same tokenizer, which from now on renders prompts with these arguments and knows where answers begin. Both are saved
    with it, so that TRL, a saved ensemble and whoever loads a policy render alike.

    Args:
        chat_template_kwargs: become the first lines of its chat template.
        after: the mark behind which answers begin.

    Raises:
        UserError: arguments without a template to take them, or a mark that decoding would leave out.
    """
    if chat_template_kwargs:
        templates = tokenizer.chat_template
        if not templates:
            raise UserError("data.chat_template_kwargs needs a base with a chat template; this one has none")
        if isinstance(templates, dict):
            tokenizer.chat_template = {name: _told(text, chat_template_kwargs) for name, text in templates.items()}
        else:
            tokenizer.chat_template = _told(templates, chat_template_kwargs)
    if after is not None:
        if after in tokenizer.all_special_tokens:
            raise UserError(f"data.after: {after!r} is a special token of the tokenizer, which decoding leaves out")
        tokenizer.init_kwargs[_AFTER] = after
    return tokenizer


def answers_begin_after(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The mark behind which this model's answers begin, if it has one."""
    return tokenizer.init_kwargs.get(_AFTER)


def _told(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with arguments set before its first line; those that were set before are replaced."""
    lines = [f"{{# emorl #}}{{% set {name} = {_literal(value)} %}}\n" for name, value in arguments.items()]
    return "".join(lines) + _ARGUMENTS.sub("", template)


def _literal(value: Any) -> str:
    """A value of YAML as jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts of this model are conversations."""
    return tokenizer.chat_template is not None


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], chat_template_kwargs: Mapping[str, Any] | None = None
) -> BatchEncoding:
    """Token ids as `GRPOTrainer` makes them: `input_ids` and `attention_mask` of (B, T), padded on the tokenizer's side.

    Args:
        prompts: texts, or conversations (lists of role/content turns); not both in one call.
        chat_template_kwargs: of these prompts alone; they replace what the tokenizer was prepared with.

    Raises:
        UserError: conversations that the chat template refuses, or for which there is none.
    """
    if isinstance(prompts[0], str):
        ids = tokenizer(text=list(prompts))["input_ids"]
    elif not is_chat(tokenizer):
        raise UserError("the prompts are conversations, and the base has no chat template; give texts, or a chat model")
    else:
        try:
            own = _own(tokenizer, chat_template_kwargs)
            encoded: Any = tokenizer.apply_chat_template(
                list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **own
            )
        except (TemplateError, TypeError) as error:
            raise UserError(_refused(prompts, error)) from None
        ids = encoded["input_ids"]
    rows: Any = {"input_ids": ids}
    return tokenizer.pad(rows, return_tensors="pt")


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """One prompt as `encode` makes it, without padding; its errors."""
    return encode(tokenizer, [prompt], chat_template_kwargs)["input_ids"][0].tolist()


def _own(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `apply_chat_template` is given for arguments of its template: they are values, never parts of it."""
    if not arguments:
        return {}
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := [name for name in arguments if name in known]:
        raise UserError(f"chat_template_kwargs: {taken[0]!r} is no argument of a chat template")
    template = str(tokenizer.get_chat_template())
    set_before = re.compile(rf"{{# emorl #}}{{% set ({'|'.join(map(re.escape, arguments))}) = .*? %}}\n")
    return {**arguments, "chat_template": set_before.sub("", template)}


def _refused(prompts: Sequence[Any], error: Exception) -> str:
    roles = list(dict.fromkeys(turn["role"] for prompt in prompts for turn in prompt))
    remedy = "leave data.system_prompt out, or write it into the prompts" if "system" in roles else "look at the prompts' turns"
    reason = " ".join(str(error).split())
    return f"the base's chat template refuses a conversation of {', '.join(roles)} ({reason:.160}); {remedy}"


def longest_text(config: Any) -> int | None:
    """The most tokens that a model has positions for; None where they are relative, as T5's.

    Args:
        config: a model's configuration.
    """
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_fits(config: Any, prompt_tokens: int, new_tokens: int | None, prompt: Any) -> None:
    """Refuses a prompt that, with the tokens to be written, is longer than the model has positions for.

    Args:
        config: the model's configuration. An encoder-decoder has positions for each of both.
        prompt: for the message.

    Raises:
        UserError: with all three numbers.
    """
    longest, new = longest_text(config), new_tokens or 0
    needed = max(prompt_tokens, new) if config.is_encoder_decoder else prompt_tokens + new
    if longest is not None and needed > longest:
        raise UserError(
            f"a prompt of {prompt_tokens:,} tokens and generation.max_new_tokens={new} need {needed:,} positions, and the "
            f"model has {longest:,}; shorten or leave out {prompt!r:.80}"
        )


def check_prompts(tokenizer: PreTrainedTokenizerBase, config: Any, prompts: Sequence[Any], new_tokens: int | None) -> None:
    """Refuses prompts that the template refuses or that are too long, before a model loads; long ones alone are tokenised.

    Raises:
        UserError: the first one.
    """
    longest = longest_text(config)
    sizes = [len(str(prompt).encode()) for prompt in prompts]
    if not sizes:
        return
    template = encode(tokenizer, prompts[:1])["input_ids"].shape[1]  # no token is shorter than a byte
    for prompt, size in zip(prompts, sizes, strict=True):
        if longest is not None and size + template + (new_tokens or 0) > longest:
            check_fits(config, encode(tokenizer, [prompt])["input_ids"].shape[1], new_tokens, prompt)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Generated ids (B, T) as texts without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
