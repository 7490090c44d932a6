"""The model of a plan (`merging_map`): blocks of several models one after another, in one new model."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from emorl.config import UserError
from emorl.fusion.merging_map import Plan


def count_blocks(model: PreTrainedModel) -> int:
    """L: the transformer blocks of a model; an encoder-decoder's encoder comes first."""
    return sum(len(stack) for stack in _stacks(model).values())


def assemble(columns: Sequence[PreTrainedModel], plan: Plan, *, host: int = 0) -> PreTrainedModel:
    """A new model with the blocks of `plan`, and everything else (embeddings, norms, heads, settings) of the column `host`.

    It takes no memory of its own: its parameters are the columns' own tensors, only a block used again is a copy. Copy the
    model (`copy.deepcopy`) before training it. Saved and loaded it is the same model. Of an encoder-decoder, the blocks of
    the encoder's layers become the encoder, in the order of the plan, the others the decoder. What only the first block of
    a stack has (T5's relative position bias) comes from the first block of the column that the stack now begins with.

    Raises:
        UserError: columns of different shapes, a plan beyond them, an architecture this does not know.
    """
    check_columns(columns)
    stacks = {name: len(stack) for name, stack in _stacks(columns[host]).items()}
    if not plan or not all(0 <= layer < sum(stacks.values()) and 0 <= column < len(columns) for layer, column in plan):
        raise UserError(f"a plan of {sum(stacks.values())} layers and {len(columns)} columns was expected, got {plan}")
    parts, start = {}, 0
    for name, length in stacks.items():
        parts[name] = [(layer - start, column) for layer, column in plan if start <= layer < start + length]
        start += length
    with torch.device("meta"):
        model = type(columns[host])(_config(columns, parts, host))
    _give_tensors(model, _sources(columns, parts, host))
    if model.can_generate():
        model.generation_config = copy.deepcopy(columns[host].generation_config)
    return model.train(columns[host].training)


def check_columns(columns: Sequence[PreTrainedModel]) -> None:
    """Raises UserError unless the blocks of all columns have the same tensors."""
    first = _block_tensors(columns[0])
    for number, column in enumerate(columns[1:], start=1):
        other = _block_tensors(column)
        for name in [*first, *(name for name in other if name not in first)]:
            if first.get(name) != other.get(name):
                ours, theirs = first.get(name, "missing"), other.get(name, "missing")
                raise UserError(f"column {number} cannot be merged block by block: {name} is {theirs}, in column 0 {ours}")


def _block_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Name -> shape and type, of the tensors in blocks."""
    prefixes = tuple(f"{name}." for name in _stacks(model))
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in _tensors(model) if name.startswith(prefixes)}


def _stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Name -> blocks: one stack, or an encoder and a decoder."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(b, GradientCheckpointingLayer) for b in module)
    }
    is_pair = len(stacks) == 2 and "num_decoder_layers" in vars(model.config)
    if len(stacks) != 1 and not is_pair:
        raise UserError(
            f"{type(model).__name__}: expected one stack of transformer blocks, or a T5's encoder and decoder; "
            f"found {', '.join(stacks) or 'none'}"
        )
    return stacks


def _config(columns: Sequence[PreTrainedModel], parts: Mapping[str, Sequence[tuple[int, int]]], host: int) -> Any:
    """The host's configuration with the depth of the plan and, where layers differ in kind, the kind of each."""
    config: Any = copy.deepcopy(columns[host].config)
    depths = [len(part) for part in parts.values()]
    config.num_hidden_layers = depths[0]
    if len(depths) == 2:
        config.num_decoder_layers = depths[1]
        config.decoder_layers = depths[1]  # without it, transformers 5 sizes a T5's cache by the encoder (get_text_config)
    for kinds in ("layer_types", "mlp_layer_types"):
        if vars(config).get(kinds) is not None:
            (part,) = parts.values()
            setattr(config, kinds, [getattr(columns[column].config, kinds)[layer] for layer, column in part])
    return config


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, saved with a model or not, under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _sources(
    columns: Sequence[PreTrainedModel], parts: Mapping[str, Sequence[tuple[int, int]]], host: int
) -> dict[str, Tensor]:
    """Name in the merged model -> the column's tensor, copied where its block was used before."""
    given = [dict(_tensors(column)) for column in columns]
    prefixes = tuple(f"{name}." for name in parts)
    sources = {name: tensor for name, tensor in given[host].items() if not name.startswith(prefixes)}
    for stack, part in parts.items():
        for position, (layer, column) in enumerate(part):
            first, moved = (_below(f"{stack}.{source}.", given[column]) for source in (0, layer))
            block = first | moved  # what the layer has not comes from the first one
            if (layer, column) in part[:position]:
                block = {name: _copy(tensor) for name, tensor in block.items()}
            sources |= {f"{stack}.{position}.{name}": tensor for name, tensor in block.items()}
    return sources


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _give_tensors(model: PreTrainedModel, sources: Mapping[str, Tensor]) -> None:
    """Puts the tensors in the place of those of a model without storage."""
    for name, _ in list(_tensors(model)):
        if name not in sources:
            raise UserError(
                f"{type(model).__name__} cannot be assembled: made of such blocks it has {name}, the columns have not"
            )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, sources[name])
