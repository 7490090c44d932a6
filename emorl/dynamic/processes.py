"""Work on a list, shared by the processes of `accelerate launch` or `torchrun`."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")
Found = TypeVar("Found")


def this_process() -> PartialState:
    """Which process of how many this is; without a GPU they meet over gloo, which accelerate does only when told."""
    return PartialState(cpu=not torch.cuda.is_available())


def shared_out(items: Sequence[Item], work: Callable[[Sequence[Item]], Found]) -> list[Found]:
    """What `work` makes of each process's part of `items`, in their order: the same list in every process, without those that
    had nothing to do. One process does all of it."""
    state = this_process()
    if state.num_processes == 1:
        return [work(items)]
    bounds = [len(items) * process // state.num_processes for process in range(state.num_processes + 1)]
    mine = items[bounds[state.process_index] : bounds[state.process_index + 1]]
    return gather_object([work(mine)] if mine else [])  # type: ignore[return-value]
