"""Runs untrusted code with tests in an interpreter, a directory and, where the system allows it, namespaces of its own."""

import json
import marshal
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import CodeType
from typing import Literal

from emorl.objectives.code.sandbox_child import PROTECTIONS, frame

_CHILD = Path(__file__).with_name("sandbox_child.py")
_GRACE = 60.0  # seconds for an interpreter to start and to end, on a busy machine
_ENVIRONMENT = {  # all there is
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # one order of sets, one score
    "PYTHONDONTWRITEBYTECODE": "1",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),  # threads count as processes
}


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds on the wall clock (and of CPU time, rounded up), MiB of address space of each process, and whether
    to use namespaces where the system gives them (`best`), to run only in them, or never to (`process`)."""

    timeout: float
    memory_mb: int
    isolation: Literal["best", "namespaces", "process"] = "best"


@dataclass(frozen=True)
class Suite:
    """Tests, each as its compiled statements; every name they use, and those that are modules, whatever the code says."""

    tests: tuple[tuple[CodeType, ...], ...]
    names: tuple[str, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Which tests passed, in their order, and the protections that the system refused."""

    passed: tuple[bool, ...]
    missing: tuple[str, ...]


def run(source: str, suite: Suite, limits: Limits, partial: bool = True) -> Verdict:
    """Runs `source` in a process, then the tests in another; stops at the first that fails unless `partial`.

    What the code prints, how it exits and how it ends its process says nothing.

    Raises:
        RuntimeError: the interpreter could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="emorl-tests-", ignore_cleanup_errors=True) as directory:
        job = {
            "source": source,
            "directory": directory,
            "tests": len(suite.tests),
            "partial": partial,
            **asdict(limits),
        }
        frames = [json.dumps(job).encode(), marshal.dumps(astuple(suite))]
        reply, error = _exchange(b"".join(map(frame, frames)), limits.timeout + _GRACE)
    if not reply:
        raise RuntimeError(f"the sandbox for unit tests did not start: {error.strip().splitlines()[-1:] or 'no message'}")
    missing = tuple(name for bit, name in enumerate(PROTECTIONS) if reply[0] >> bit & 1)
    return Verdict(tuple(byte == 1 for byte in reply[1:].ljust(len(suite.tests), b"\0")), missing)


def _exchange(content: bytes, timeout: float) -> tuple[bytes, str]:
    """What the child file writes to stdout and stderr when `content` is its stdin.

    -s and -P keep user packages and the script's folder out, as -I does, which would also ignore PYTHONHASHSEED.
    """
    with subprocess.Popen(
        [sys.executable, "-s", "-P", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            reply, error = process.communicate(content, timeout=timeout)
        except subprocess.TimeoutExpired:  # the supervisor itself was stopped
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reply, error = process.communicate()
    return reply, error.decode(errors="replace")
