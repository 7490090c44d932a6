"""Which of a trainer's checkpoints a killed training can go on from."""

import shutil
from pathlib import Path

from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that was written to its end (its state is written last), or None."""
    complete = [path.parent for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")]
    for broken in set(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) - set(complete):
        if PartialState().is_main_process:
            shutil.rmtree(broken)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
