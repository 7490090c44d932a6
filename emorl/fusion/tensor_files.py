"""The safetensors format, tensor by tensor: no two tensors of a file need lie in memory together.

`safetensors` itself writes a file from all of its tensors at once, and what it maps into memory counts as resident; reading
into one buffer per model keeps a fusion at a few tensors. The format: 8 bytes of header length, a JSON header, the data.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from emorl.config import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    """bytes"""


def tensor_entries(directory: Path) -> dict[str, TensorEntry]:
    """name -> entry of a checkpoint's safetensors file, or of its shards by their index.

    Raises:
        UserError: no safetensors, a shard that is missing or damaged.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {name: entry for file in sorted(set(weight_map.values())) for name, entry in _read_header(directory / file)}
        lost = sorted(set(weight_map) - set(found))
        if lost:
            raise UserError(f"{directory}: {lost[0]!r} is in the index but in none of the shards; copy the checkpoint again")
        return {name: found[name] for name in weight_map}
    if not (directory / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{directory} has no {WEIGHTS_NAME}: name the folder of a transformers checkpoint in safetensors (a pickle is "
            "converted by AutoModel….from_pretrained(…).save_pretrained(…))"
        )
    return dict(_read_header(directory / WEIGHTS_NAME))


def _read_header(file: Path) -> Iterable[tuple[str, TensorEntry]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = file.stat().st_size
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if stop > end:
                raise ValueError(f"{name} ends behind the end of the file")
            yield name, TensorEntry(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop - start)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(f"{file} cannot be read as safetensors ({type(error).__name__}: {error})") from None


class TensorReader:
    """Reads tensors of one checkpoint into one buffer: a tensor is good until the next one is read."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = entries
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.file not in self._files:
            self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
        if len(self._buffer) < entry.size:
            self._buffer = torch.empty(entry.size, dtype=torch.uint8)
        view = self._buffer.numpy()[: entry.size].data
        done = 0
        while done < entry.size:  # one call reads at most 2 GiB
            read = os.preadv(self._files[entry.file], [view[done:]], entry.start + done)
            if not read:
                raise UserError(f"{entry.file} ends in the middle of {name!r}; copy the checkpoint again")
            done += read
        return self._buffer[: entry.size].view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """bytes"""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """Writes the tensors of `specs`, in their order, into one safetensors file or several of at most `shard_size` bytes."""

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], shard_size: int) -> None:
        self._directory = directory
        self._shards = _shards(specs, shard_size)
        self._names = (
            [WEIGHTS_NAME]
            if len(self._shards) == 1
            else [f"model-{number:05}-of-{len(self._shards):05}.safetensors" for number in range(1, len(self._shards) + 1)]
        )
        self._waiting = [(file, spec) for file, shard in zip(self._names, self._shards, strict=True) for spec in shard]
        self._stream: IO[bytes] | None = None

    def write(self, tensor: Tensor) -> None:
        """The next tensor."""
        file, spec = self._waiting.pop(0)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
        if self._stream is None or Path(self._stream.name).name != file:
            self._open(file)
        assert self._stream is not None
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Completes the last shard and writes the index, if there are several."""
        assert not self._waiting, self._waiting[0]
        self._finish_shard()
        if len(self._shards) > 1:
            weight_map = {spec.name: file for file, shard in zip(self._names, self._shards, strict=True) for spec in shard}
            total = sum(spec.size for shard in self._shards for spec in shard)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _open(self, file: str) -> None:
        self._finish_shard()
        self._stream = (self._directory / file).open("wb")
        self._stream.write(_header(self._shards[self._names.index(file)]))

    def _finish_shard(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def _shards(specs: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size
    return shards


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, offset + spec.size]}
        offset += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text
