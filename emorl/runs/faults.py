"""What other libraries and the machine raise in a stage, as one line; a bug of ours keeps its traceback."""

import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from emorl.config import UserError

TRACEBACK = "traceback.txt"
_NOWHERE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than it may be",
    errno.EROFS: "it lies on a disk that can only be read",
    errno.EACCES: "this user may not write or read it",
    errno.EPERM: "this user may not write or read it",
    errno.EMFILE: "too many files are open",
}


_IN_WORDS = {
    "No space left on device": _NOWHERE[errno.ENOSPC],
    "database or disk is full": _NOWHERE[errno.ENOSPC],
    "readonly database": _NOWHERE[errno.EROFS],
    "Read-only file system": _NOWHERE[errno.EROFS],
}


@contextmanager
def faults_as_lines(folder: Path | None = None) -> Iterator[None]:
    """Turns what the block raises into a `UserError`, unless it is one already or comes from our own code.

    Args:
        folder: where the traceback is kept; nowhere by default.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a library was led to
        line = _of_the_machine(error)
        raise (_of_a_library(error, folder) if line is None else UserError(line)) from error


def _of_the_machine(error: Exception) -> str | None:
    """A line on a disk that cannot be written; None for anything else. Databases and writers of tensors use words alone."""
    if isinstance(error, BrokenPipeError):
        return None
    known = _NOWHERE.get(getattr(error, "errno", None) or 0)
    reason = known or next((said for words, said in _IN_WORDS.items() if words in str(error)), None)
    if reason is None:
        return None
    place = getattr(error, "filename", None) or "a file"
    return (
        f"{place}: {reason}; nothing that is finished is lost: make room or give another `output`, and the same command goes on"
    )


def _of_a_library(error: Exception, folder: Path | None) -> Exception:
    """The error itself where our own code raised it."""
    library = library_of(error.__traceback__)
    if library is None:
        return error
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    kept = ""
    if folder is not None:
        with suppress(OSError):  # a full disk
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            kept = f"; the traceback is in {folder / TRACEBACK}"
    return UserError(f"{library}: {type(error).__name__}: {text:.300}{kept}")


def library_of(trace: TracebackType | None, ours: Sequence[str] = ("emorl", "tests")) -> str | None:
    """The package whose code raised: of the innermost frame that is not Python's own. None where that is `ours`."""
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(trace)]
    outside = [package for package in packages if package not in sys.stdlib_module_names and package != "__main__"]
    return None if not outside or outside[-1] in ours else outside[-1]
