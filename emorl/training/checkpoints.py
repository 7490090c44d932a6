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
_CUT = "it was not written to its end"
_PICKLED = ("adapter_model.bin", "pytorch_model.bin")


def last_complete_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint whose files can all be read, or None. One that was not written to its end is removed, a damaged one
    set aside."""
    found = sorted(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    faults = {path: fault for path in found if (fault := _fault_in(path)) is not None}
    if PartialState().is_main_process:
        for path, fault in faults.items():
            aside = path.with_name(f"damaged-{path.name}")
            logger.warning("%s cannot be gone on from (%s); it is %s", path, fault, aside.name if fault != _CUT else "removed")
            shutil.rmtree(aside if fault != _CUT else path, ignore_errors=True)
            if fault != _CUT:
                path.rename(aside)
    complete = [path for path in found if path not in faults]
    return str(complete[-1]) if complete else None


def _fault_in(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file can be read. The state is written last."""
    if not (checkpoint / _STATE).is_file():
        return _CUT
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
