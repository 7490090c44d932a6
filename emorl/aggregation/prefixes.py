"""What trie decoding remembers from one call to the next: prefixes, their keys and values, and where weights lead.

A prefix is a prompt and the tokens decoded behind it. Its keys, values and last hidden states do not depend on the
weights, so each is computed once for the whole search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
UNKNOWN = -1
_BLOCK = 1024


class PrefixTree:
    """The known prefixes as nodes, numbered in order of creation; the prompts are the roots, 0 to P-1."""

    def __init__(self, roots: int) -> None:
        self._parent = _Growing(np.int64)
        self._depth = _Growing(np.int32)
        self._child: dict[tuple[int, int], int] = {}
        self._parent.append(np.full(roots, UNKNOWN))
        self._depth.append(np.zeros(roots))

    def __len__(self) -> int:
        return len(self._parent)

    def add(self, parents: Array, tokens: Array) -> Array:
        """New nodes for `parents` (N,) with one more token each (N,)."""
        nodes = np.arange(len(self), len(self) + len(parents))
        self._depth.append(self.depth(parents) + 1)
        self._parent.append(parents)
        self._child.update(zip(zip(parents.tolist(), tokens.tolist(), strict=True), nodes.tolist(), strict=True))
        return nodes

    def depth(self, nodes: Array) -> Array:
        """Decoded tokens in each prefix."""
        return self._depth[nodes]

    def children(self, nodes: Array, tokens: Array) -> Array:
        """The node of each prefix with one more token, or UNKNOWN."""
        pairs = zip(nodes.tolist(), tokens.tolist(), strict=True)
        return np.fromiter((self._child.get(pair, UNKNOWN) for pair in pairs), np.int64, len(nodes))

    def paths(self, nodes: Array) -> tuple[Array, Array]:
        """The nodes from below the root to each node, aligned right: (N, longest) with UNKNOWN in front; the roots (N,)."""
        longest = int(self.depth(nodes).max(initial=0))
        paths = np.full((len(nodes), longest), UNKNOWN)
        current = np.array(nodes)
        for column in range(longest - 1, -1, -1):
            below = self.depth(current) > 0
            paths[below, column] = current[below]
            current[below] = self._parent[current[below]]
        return paths, current


class Choices:
    """For every opened prefix, the tokens that some weights could choose, with each policy's logit.

    A token that another one beats under every policy is beaten under all weights that are not negative, so leaving it
    out changes no choice. Of 32,000 tokens a few dozen remain.
    """

    def __init__(self) -> None:
        self._first = _Growing(np.int64)
        self._count = _Growing(np.int64)
        self._tokens = _Growing(np.int64)
        self._logits = _Growing(np.float32)

    def extend_to(self, nodes: int) -> None:
        """Makes room for that many nodes; new ones are not open yet."""
        missing = nodes - len(self._count)
        self._first.append(np.zeros(missing))
        self._count.append(np.zeros(missing))

    def is_open(self, nodes: Array) -> Array:
        return self._count[nodes] > 0

    def open(self, nodes: Array, found: "Undominated") -> None:
        self._first[nodes] = len(self._tokens) + found.first
        self._count[nodes] = found.count
        self._tokens.append(found.tokens)
        self._logits.append(found.logits)

    def choose(self, nodes: Array, weights: Array) -> Array:
        """The token with the highest weighted sum of logits, for nodes (N,) and weights (N, K)."""
        count = self._count[nodes]
        starts = np.cumsum(count) - count  # of each node's segment
        flat = np.arange(count.sum()) + np.repeat(self._first[nodes] - starts, count)
        scores = (self._logits[flat] * np.repeat(weights, count, 0)).sum(1)
        highest = np.flatnonzero(scores == np.repeat(np.maximum.reduceat(scores, starts), count))
        _, first = np.unique(np.searchsorted(starts, highest, side="right"), return_index=True)
        return self._tokens[flat[highest[first]]]


@dataclass(frozen=True)
class Undominated:
    """The tokens worth keeping of N prefixes, one segment each: `first` (N,), `count` (N,), tokens (M,), logits (M, K)."""

    first: Array
    count: Array
    tokens: Array
    logits: Array


def undominated(logits: Tensor) -> Undominated:
    """Of logits (N, K, V), the tokens not beaten under every policy by the token of the highest sum."""
    champion = highest(logits.sum(1))  # (N,)
    bar = logits.gather(2, champion[:, None, None].expand(-1, logits.shape[1], 1))  # (N, K, 1)
    keep = logits[:, 0] >= bar[:, 0]  # (N, V); equal ones stay, since argmax takes the first of them
    for policy in range(1, logits.shape[1]):  # several times faster than any() over an axis in the middle
        keep |= logits[:, policy] >= bar[:, policy]
    keep[torch.arange(len(keep), device=keep.device), champion] = True
    rows, tokens = keep.nonzero(as_tuple=True)
    count = np.bincount(rows.cpu().numpy(), minlength=len(keep))
    return Undominated(np.cumsum(count) - count, count, tokens.cpu().numpy(), logits[rows, :, tokens].float().cpu().numpy())


def highest(scores: Tensor) -> Tensor:
    """argmax over the last axis; on a CPU through NumPy, whose argmax is vectorised."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)


class Store:
    """Rows of one shape on the model's device, such as a layer's keys of every token place; grows by blocks, so that
    nothing is ever copied to a larger place."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def write(self, start: int, rows: Tensor) -> None:
        """Puts rows (N, ...) at `start`, behind which nothing is."""
        while len(rows):
            block, offset = divmod(start, _BLOCK)
            if block == len(self._blocks):
                self._blocks.append(rows.new_empty(_BLOCK, *rows.shape[1:]))
            here = rows[: _BLOCK - offset]
            self._blocks[block][offset : offset + len(here)] = here
            rows, start = rows[len(here) :], start + len(here)

    def __getitem__(self, places: Tensor) -> Tensor:
        """The rows at `places` (any shape)."""
        flat = places.flatten().to(self._blocks[0].device)
        found = self._blocks[0].new_empty(len(flat), *self._blocks[0].shape[1:])
        number = flat // _BLOCK
        for block in number.unique().tolist():
            which = (number == block).nonzero().squeeze(1)
            found.index_copy_(0, which, self._blocks[block].index_select(0, flat[which] - block * _BLOCK))
        return found.unflatten(0, places.shape)


class _Growing:
    """An array that grows at its end."""

    def __init__(self, kind: type) -> None:
        self._kind, self._length = kind, 0
        self._values: Array | None = None

    def __len__(self) -> int:
        return self._length

    def append(self, values: Array | Sequence[float]) -> None:
        values = np.asarray(values, self._kind)
        end = self._length + len(values)
        if self._values is None:
            self._values = np.empty((0, *values.shape[1:]), self._kind)
        if end > len(self._values):
            larger = np.empty((max(2 * end, 1024), *values.shape[1:]), self._kind)
            larger[: self._length] = self._values[: self._length]
            self._values = larger
        self._values[self._length : end] = values
        self._length = end

    def __getitem__(self, index: Array) -> Array:
        assert self._values is not None
        return self._values[index]

    def __setitem__(self, index: Array, values: Array) -> None:
        assert self._values is not None
        self._values[index] = values
