"""LoRA adapters as plain tensors: read from a PEFT directory, checked against the base they were trained on.

Only what can be combined exactly is read (plain LoRA on linear layers); everything else PEFT can write is refused by
name. Tensors come from safetensors only, never from a pickle.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from emorl.config import UserError
from emorl.policies.placement import parameters_in_memory
from emorl.runs.layout import ADAPTER, POLICY_CARD, WEIGHTS
from emorl.runs.run import read_json

logger = logging.getLogger(__name__)

# Settings that do not change what plain LoRA computes at inference. Any other setting must be left empty, so what a
# future PEFT adds is refused until someone has looked at it.
_HARMLESS_SETTINGS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "eva_config",
        "loftq_config",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    ]
)
_EMPTY_VALUES: tuple[Any, ...] = (None, False, "none", [], {}, "")
_REMEDIES = {
    "bias": "train with bias='none'",
    "lora_bias": "train with lora_bias=False",
    "modules_to_save": "train without modules_to_save, so that all policies share every module of the base",
    "trainable_token_indices": "train without trainable_token_indices, so that all policies share the embeddings",
    "target_parameters": "name linear modules in target_modules instead",
}
# These start from random factors and leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from it.
_BASE_PRESERVING_INITIALISATIONS: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_SAMPLES_PER_PARAMETER = 16
_LARGEST = 1e30  # rank or alpha: what float32 still holds when it is divided


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter: module `m` of the base computes `x W_m + x A B`, with the LoRA scaling folded into B.

    `factors` maps the base's module names to (A (in, r), B (r, out)) in float32. An adapter that was read computes them
    when asked, from the file it maps into memory: K adapters on the way into one stack never lie in memory twice.
    """

    path: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    base_name: str | None
    base_fingerprint: str | None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    scale: float = 1.0


def read_adapter(path: str | Path, scale: float = 1.0) -> Adapter:
    """Read a plain LoRA adapter that PEFT saved, e.g. `read_adapter("runs/mine/train/empathy/policy")`.

    `scale` multiplies what it adds to the base; above 1 it goes on beyond the trained policy (task arithmetic). rsLoRA,
    rank_pattern and alpha_pattern are honoured. Raises UserError for anything that is not plain LoRA, or damaged.
    """
    path = Path(path).absolute()
    config = _read_config(path)
    check_plain_lora(config, f"The adapter in {path}")
    _check_numbers(config, path / ADAPTER)
    tensors = _read_tensors(path)
    modules = sorted({name for name, _ in tensors})
    scalings = {module: scale * _checked_scaling(module, tensors, config, path) for module in modules}
    base_name = config.get("base_model_name_or_path") or None
    return Adapter(
        path=path,
        factors=_ScaledFactors(tensors, scalings),
        base_name=base_name,
        base_fingerprint=_recorded_fingerprint(path),
        task_type=config.get("task_type"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        scale=scale,
    )


def check_adapter_fits(adapter: Adapter, base_model: PreTrainedModel) -> None:
    """Raise UserError unless every adapted module is a linear layer of the base, of the right shape, on the same base.

    Sameness is decided by `base_fingerprint` if `policy.json` records one; without it a differing base name only warns.
    """
    modules = dict(base_model.named_modules())
    shared = (base_model.get_input_embeddings(), base_model.get_output_embeddings())
    for name, (a, b) in adapter.factors.items():
        module = modules.get(name)
        if module is None:
            raise UserError(
                f"The adapter in {adapter.path} adapts {name!r}, which {type(base_model).__name__} does not have; "
                f"use the base it was trained on ({adapter.base_name or 'not recorded'})."
            )
        if any(module is one for one in shared):
            raise UserError(
                f"The adapter in {adapter.path} adapts {name!r}, an embedding or output head, which all policies must "
                "share; train with target_modules that leave it out."
            )
        if not isinstance(module, nn.Linear | Conv1D):
            raise UserError(
                f"The adapter in {adapter.path} adapts {name!r}, which is a {type(module).__name__}; expected a "
                "Linear or "
                "Conv1D of a bare base model (not one that already carries adapters)."
            )
        linear = isinstance(module, nn.Linear)
        expected = (module.in_features, module.out_features) if linear else (module.nx, module.nf)
        if (a.shape[0], b.shape[1]) != expected:
            raise UserError(
                f"The adapter in {adapter.path} maps {a.shape[0]} to {b.shape[1]} features at {name!r}, but the base "
                "has "
                f"{expected[0]} to {expected[1]}; use the base it was trained on "
                f"({adapter.base_name or 'not recorded'})."
            )
    _check_same_base(adapter, base_model)


def base_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the names, shapes and 16 sampled values of every parameter of a bare base model (cheap even for 7B).

    Values are rounded to bfloat16 first, so loading one checkpoint in float32 or in bfloat16 gives the same
    fingerprint; float16 may differ in a rounding. Quantised layers count by their precision alone, as what they keep
    changes when they are first used. Take it before adapters are added: they change names.
    """
    return fingerprint_of(parameters_in_memory(model))


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """`base_fingerprint` of a model's parameters by name, in its order; a tied one comes once."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        if not parameter.is_floating_point():
            digest.update(f"{name} {parameter.dtype}\n".encode())
            continue
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.is_meta or parameter.numel() == 0:
            raise ValueError(f"The parameter {name!r} is not in memory; take the fingerprint before sharding.")
        flat = parameter.detach().reshape(-1)
        steps = torch.arange(_SAMPLES_PER_PARAMETER, device=flat.device)
        positions = steps * (flat.numel() - 1) // (_SAMPLES_PER_PARAMETER - 1)
        sample = flat[positions].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(
            f"{path} is not a directory; expected the directory of a LoRA adapter saved by PEFT (fetch one from the "
            "hub "
            "with `hf download` first)."
        )
    file = path / ADAPTER
    if not file.is_file():
        raise UserError(f"{path} holds no {ADAPTER}; expected the directory PEFT's save_pretrained() wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{path} holds a PEFT adapter of type {kind!r:.60}; expected 'LORA'.")
    return config


def check_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for settings of `peft.LoraConfig` with which an adapter could not be combined with others.

    `where` begins the message: whose settings these are.
    """
    for key, value in config.items():
        if key not in _HARMLESS_SETTINGS and value not in _EMPTY_VALUES:
            remedy = _REMEDIES.get(key, f"train without {key}")
            raise UserError(f"{where} sets {key}={value!r}; only plain LoRA can be combined: {remedy}.")
    initialisation = config.get("init_lora_weights")
    if initialisation not in _BASE_PRESERVING_INITIALISATIONS:
        raise UserError(
            f"{where} sets init_lora_weights={initialisation!r}, which changes the base model, so it does not fit the shared "
            "base; train with init_lora_weights=True, or convert it to plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)."
        )


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Ranks and scalings that can be computed with, and patterns that can be matched."""
    for key, pattern_key, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", (int, float))):
        patterns: Any = config.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: expected {pattern_key} to map modules to numbers, got {patterns!r:.60}; save it again.")
        numbers: dict[str, Any] = {key: config.get(key), **patterns}
        for name, value in numbers.items():
            is_number = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < _LARGEST
            if not is_number or (kind is int and value < 1):
                raise UserError(f"{file}: expected a number for {name}, got {value!r:.60}; save the adapter again.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{file}: {pattern_key} {pattern!r} is no regular expression ({error}).") from None
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{file}: expected base_model_name_or_path to be a text, got {name!r:.60}; save the adapter again.")


def _read_tensors(path: Path) -> dict[tuple[str, str], Tensor]:
    """Tensors by (module name, "A" or "B"), as PEFT stores them: A (r, in), B (out, r)."""
    file = path / WEIGHTS
    if not file.is_file():
        has_pickle = (path / "adapter_model.bin").is_file()
        pickled = " (adapter_model.bin is a pickle, which can run code when read)" if has_pickle else ""
        raise UserError(f"{path} holds no {WEIGHTS}{pickled}; save it with PEFT's save_pretrained().")
    try:
        loaded = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); save the adapter again.") from error
    tensors: dict[tuple[str, str], Tensor] = {}
    for name, tensor in loaded.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise UserError(
                f"The adapter in {path} holds the tensor {name!r} of shape {tuple(tensor.shape)}; expected only "
                "lora_A and "
                "lora_B matrices of linear layers: train without adapting embeddings, biases or other modules."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(
                f"The adapter in {path} holds values in {name!r} that are no finite numbers; its training diverged or its "
                "file is damaged: take an earlier checkpoint, or train it again with a lower learning rate."
            )
        tensors[match["module"], match["factor"]] = tensor
    if not tensors:
        raise UserError(f"The adapter in {path} holds no tensors; expected lora_A and lora_B matrices: train again.")
    return tensors


class _ScaledFactors(Mapping[str, tuple[Tensor, Tensor]]):
    """`Adapter.factors` over tensors as PEFT stores them, A (r, in) and B (out, r)."""

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor], scalings: Mapping[str, float]) -> None:
        self._tensors, self._scalings = tensors, scalings

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        scaling = self._scalings[module]
        a, b = self._tensors[module, "A"].float(), self._tensors[module, "B"].float()
        return a.T.contiguous(), (b * scaling).T.contiguous()  # (in, r), (r, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalings)

    def __len__(self) -> int:
        return len(self._scalings)


def _checked_scaling(module: str, tensors: Mapping[tuple[str, str], Tensor], config: Mapping[str, Any], path: Path) -> float:
    """What B is multiplied with, once both factors are seen to have the configured rank."""
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = rank_pattern.get(get_pattern_key(list(rank_pattern), module), config["r"])
    alpha = alpha_pattern.get(get_pattern_key(list(alpha_pattern), module), config["lora_alpha"])
    a, b = tensors.get((module, "A")), tensors.get((module, "B"))
    if a is None or b is None or not a.shape[0] == b.shape[1] == rank:
        found = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
        raise UserError(
            f"The adapter in {path} has lora_A, lora_B of shapes {found} at {module!r}; expected both, of rank {rank} "
            "as "
            "adapter_config.json says: save it again."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _recorded_fingerprint(path: Path) -> str | None:
    file = path / POLICY_CARD
    card = read_json(file) if file.is_file() else {}
    if not isinstance(card, dict):
        raise UserError(
            f"{file} is damaged: expected a mapping, got {card!r:.60}; train the policy again, or delete that file."
        )
    return card.get("base_fingerprint")


def _same_place(one: str, other: str) -> bool:
    """Whether two names are one hub id or one folder."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def _check_same_base(adapter: Adapter, base_model: PreTrainedModel) -> None:
    if adapter.base_fingerprint is not None:
        if adapter.base_fingerprint != base_fingerprint(base_model):
            raise UserError(
                f"The adapter in {adapter.path} was trained on another base ({adapter.base_name or 'not recorded'}) "
                "than "
                f"{base_model.name_or_path or 'the model given'}: their weights differ; load that base (or, if you "
                "know "
                "they agree, e.g. a quantised copy, delete base_fingerprint from its policy.json)."
            )
    elif adapter.base_name and base_model.name_or_path and not _same_place(adapter.base_name, base_model.name_or_path):
        logger.warning(
            "The adapter in %s was trained on %r and is used on %r; policy.json records no fingerprint to compare.",
            adapter.path,
            adapter.base_name,
            base_model.name_or_path,
        )
