"""Reads models, tokenizers and their configurations with transformers: whole, from safetensors or GGUF, never a pickle.

Whatever their files make transformers raise becomes one line that names the model and the file.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.chat_template_utils import _compile_jinja_template

from emorl.config import UserError
from emorl.runs.layout import ADAPTER

GGUF = ".gguf"


def read_config(place: str, what: str, **options: Any) -> PreTrainedConfig:
    """The configuration of a model in a folder, on the hub or in a GGUF file.

    Args:
        what: the key that names it, such as base.model, for messages.
        options: of transformers' `from_pretrained`; only with `trust_remote_code` among them is code of the model's own run.

    Raises:
        UserError: no model is there, or its files are damaged.
    """
    _refuse_adapter(place, what)
    with _faults_of(place, what):
        return AutoConfig.from_pretrained(**_where(place), **{"trust_remote_code": False, **options})


def read_tokenizer(place: str, what: str, **options: Any) -> Any:
    """The tokenizer of a folder, on the hub or in a GGUF file; the arguments and errors of `read_config`."""
    with _faults_of(place, what):
        tokenizer = AutoTokenizer.from_pretrained(**_where(place), **{"trust_remote_code": False, **options})
        templates = tokenizer.chat_template or {}
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            _compile_jinja_template(template)
    return tokenizer


def read_model(
    kind: Any,
    place: str,
    what: str,
    *,
    is_new: Callable[[PreTrainedModel, str], bool] = lambda model, tensor: False,
    **options: Any,
) -> Any:
    """A model of transformers' auto class `kind`, in evaluation mode, frozen. What a GGUF file has quantised is unpacked.

    Args:
        is_new: whether a tensor of the model may be missing, such as a head that is to be trained. Tied ones never are.

    Raises:
        UserError: beside what `read_config` refuses: no safetensors weights, too few of them, or of other shapes.
    """
    _refuse_adapter(place, what)
    settings = {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True, **options}
    with _faults_of(place, what):
        format = (
            {"quantization_config": transformers.GgufConfig(dequantize=True)}
            if place.endswith(GGUF)
            else {"use_safetensors": True}
        )
        model, found = kind.from_pretrained(**_where(place), **settings, **format)
    lacks = sorted(tensor for tensor in found["missing_keys"] if not is_new(model, tensor))
    if lacks:
        raise UserError(
            f"{what} {place!r}: its files lack {len(lacks)} of the model's tensors, such as {lacks[0]}; fetch or convert it "
            "anew"
        )
    for tensor, saved, expected in sorted(found["mismatched_keys"]):
        if not is_new(model, tensor):
            raise UserError(
                f"{what} {place!r}: {tensor} has shape {tuple(saved)} where its config.json expects {tuple(expected)}; "
                "fetch or convert it anew"
            )
    if place.endswith(GGUF):
        model.name_or_path = model.config.name_or_path = place  # transformers names the folder, which may hold others
    return model.eval().requires_grad_(False)


def _where(place: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that name a folder, a hub id, or a GGUF file in one."""
    folder, _, file = place.rpartition("/")
    if place.endswith(GGUF):
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("a GGUF file needs the package gguf: pip install 'emorl[gguf]'")
        return {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}
    return {"pretrained_model_name_or_path": place}


def _refuse_adapter(place: str, what: str) -> None:
    """transformers would load the base that the adapter names, and the adapter on it."""
    if os.path.isfile(os.path.join(place, ADAPTER)):  # pathlib raises where a name is too long for a file
        raise UserError(f"{what} {place!r} is a LoRA adapter, no model; name the base that it was trained on instead")


@contextmanager
def _faults_of(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tokenizers raise bare ones, and transformers whatever a wrong file leads it to
        raise UserError(f"{what} {place!r}: {_fault(place, error)}") from error


def _fault(place: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")[:160]
    reason = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
    is_folder = os.path.isdir(place)
    if "trust_remote_code" in str(error):
        return f"it comes with code of its own; read that code, then say trust_remote_code: true ({reason})"
    settings = sorted(Path(place).glob("*.json")) if is_folder else []
    damaged = [file.name for file in settings if not _is_json(file)]
    if damaged:
        return f"{', '.join(damaged)} is no valid JSON ({reason}); fetch or save it anew"
    if settings or os.path.isfile(place):
        return f"transformers cannot load it ({reason}); fetch or save its files anew, or change the settings beside it"
    return f"{'the folder holds no model' if is_folder else 'neither a folder here nor a model on the hub'} ({reason})"


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
