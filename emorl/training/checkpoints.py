"""Which of a trainer's checkpoints a killed training can go on from."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_PICKLED = ("adapter_model.bin", "pytorch_model.bin")


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint whose files can all be read, or None; those that cannot go on are removed."""
    found = sorted(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = {path: fault for path in found if (fault := _fault_in(path)) is not None}
    for path, fault in whole.items():
        if PartialState().is_main_process:
            logger.warning("%s cannot be gone on from (%s); it is removed", path, fault)
            shutil.rmtree(path)
    complete = [path for path in found if path not in whole]
    return str(complete[-1]) if complete else None


def _fault_in(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file can be read. The state is written last."""
    if not (checkpoint / _STATE).is_file():
        return "it was not written to its end"
    for file in sorted(checkpoint.iterdir()):
        if file.name in _PICKLED:
            return f"{file.name} is a pickle"
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
                return f"{file.name} is cut"
        except (ValueError, SafetensorError) as error:
            return f"{file.name}: {error}"
    return None
