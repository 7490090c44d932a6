"""The block `base`: which language model, and how it is loaded, by every stage alike."""

from typing import Any, Literal

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from emorl.config.objects import TextOrObject, is_object, short_form

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class QuantizationConfig:
    bits: Literal[4, 8]
    """4 (NF4) or 8 (LLM.int8) bits a parameter of the linear layers, by bitsandbytes; adapters are trained on top (QLoRA)"""


@dataclass(frozen=True, config=_strict)
class BaseConfig:
    model: TextOrObject
    """hub id or folder of the base language model, or a file.gguf in one: a decoder (trained by GRPO) or an encoder-decoder (by
    SCST); in Python also a loaded model. `base: X` alone is short for it"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision the base is loaded and computed in; auto: the checkpoint's own on a GPU, float32 on a CPU"""
    tokenizer: TextOrObject | None = None
    """hub id or folder of a tokenizer, in Python also a loaded one; the model's own by default"""
    revision: str | None = None
    """branch, tag or commit of a hub model, the tokenizer's too where that is the model's own"""
    attn_implementation: str | None = None
    """straight to transformers: sdpa, eager, flash_attention_2, …; its own choice by default"""
    device_map: str | dict[str, str | int] | None = None
    """where the base's layers lie, straight to transformers: auto, balanced, …, or a map from module to GPU number, cpu or
    disk; by default all on one GPU, or the CPU. Layers on disk or beside a GPU decode, but cannot be trained; several GPUs are
    untried"""
    offload_folder: str | None = None
    """for layers on disk that the checkpoint does not hold as they are needed, such as ones in another precision"""
    quantization: QuantizationConfig | None = None
    """the base's linear layers in few bits; none by default"""
    trust_remote_code: bool = False
    """run the code that comes with a hub model; read it before"""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else short_form("model", value)

    def __post_init__(self) -> None:
        loading = ("revision", "attn_implementation", "device_map", "quantization")
        given = [key for key in loading if getattr(self, key) is not None]
        if given and is_object(self.model):
            raise ValueError(f"base.{given[0]}: the model given is loaded already; load it so, or give its folder or hub id")
        if self.quantization is not None and isinstance(self.model, str) and self.model.endswith(".gguf"):
            raise ValueError("base.quantization: a GGUF file is unpacked while loading; quantise the model that it was made of")
