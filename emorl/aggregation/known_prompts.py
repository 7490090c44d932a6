"""Prompts that were read lately, so that what several have in common, such as a system turn, is read once.

A token's keys and values depend on what stands before it, and on nothing behind it: the longest common beginning of a new
prompt and any known one is taken over. Across turns of a dialogue that is nearly all of the prompt.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from emorl.aggregation.row_batch import Layers

_WORTH = 16  # shorter beginnings are read again


class KnownPrompts:
    """The prompts used last, within so many bytes.

    Args:
        memory: of their keys and values; 0 remembers nothing.
    """

    def __init__(self, memory: int) -> None:
        self._memory, self.bytes = memory, 0
        self._known: OrderedDict[tuple[Hashable, bytes], Layers] = OrderedDict()
        self._alike: dict[tuple[Hashable, bytes], set[bytes]] = {}  # those that begin with the same tokens

    def beginning(self, kind: Hashable, ids: Sequence[int]) -> Layers:
        """Keys and values of the longest known beginning of a prompt, all of its tokens but the last at most; of nothing, an
        empty list.

        Args:
            kind: what else the keys and values depend on: the model, its active policies, weights of its parameters.
        """
        wanted = np.array(ids[:-1], np.int64)
        alike = self._alike.get((kind, wanted[:_WORTH].tobytes()), ())
        if len(wanted) < _WORTH or not alike:
            return []
        length, best = max((_shared(wanted, np.frombuffer(known, np.int64)), known) for known in alike)
        self._known.move_to_end((kind, best))
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in self._known[kind, best]]

    def keep(self, kind: Hashable, ids: Sequence[int], layers: Layers) -> None:
        """Remembers a prompt that was read; those used longest ago make room. A short one is not kept, nor one that takes more
        than half of the room."""
        tokens = np.array(ids, np.int64)
        key, size = (kind, tokens.tobytes()), _bytes(layers)
        if len(tokens) < _WORTH or key in self._known or 2 * size > self._memory:
            return
        while self.bytes + size > self._memory:
            self._forget(*next(iter(self._known)))
        self._known[key] = [(keys.clone(), values.clone()) for keys, values in layers]
        self._alike.setdefault((kind, tokens[:_WORTH].tobytes()), set()).add(key[1])
        self.bytes += size

    def _forget(self, kind: Hashable, tokens: bytes) -> None:
        self.bytes -= _bytes(self._known.pop((kind, tokens)))
        begun = (kind, np.frombuffer(tokens, np.int64)[:_WORTH].tobytes())
        self._alike[begun].remove(tokens)
        if not self._alike[begun]:
            del self._alike[begun]


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens agree."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
