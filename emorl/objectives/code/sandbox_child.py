"""What runs in a sandbox's own interpreter: a supervisor, its fork that runs the tests, and the fork of that with the code.

`sandbox.py` starts this file by its path; it imports nothing of emorl. The supervisor forks, waits for the deadline, kills
what is left and hands on at most as many bytes as there are tests. None of the three can look into another.
"""

import contextlib
import ctypes
import errno
import importlib.util
import json
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, ClassVar

PROTECTIONS = (
    "no network, and no processes outside the sandbox",
    "files read-only outside the working directory",
    "an own /proc",
    "no sockets",
)

_PROCESSES = 16
_OPEN_FILES = 64
_FILE_BYTES = 16 << 20

# From linux/sched.h, mount.h, prctl.h, capability.h
_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000  # user, mount, pid, network, ipc
_NOSUID_NODEV, _NOEXEC = 2 | 4, 8
_MOUNT_SETATTR, _RECURSIVE, _READ_ONLY, _PRIVATE = 442, 0x8000, 1, 1 << 18
_DUMPABLE, _CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 4, 36, 38
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534

# Of seccomp, by machine: the audit architecture, and the numbers of socket, connect and ptrace, process_vm_readv and _writev,
# then socketpair. io_uring_setup, which could do the same, and pidfd_getfd have one number everywhere.
_SECCOMP, _FILTER = 22, 2
_CALLS = {
    "x86_64": (0xC000003E, (41, 42, 101, 310, 311), 53),
    "aarch64": (0xC00000B7, (198, 203, 117, 270, 271), 199),
}
_EVERYWHERE = (425, 438)
_X32 = 0x40000000  # numbers from here on are those of another interface to the same calls
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # classic BPF
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000


def read_frame(source: int) -> bytes:
    """The next bytes behind a length of 8 bytes; unbuffered, so that what follows stays in the pipe."""
    return _read_exactly(source, int.from_bytes(_read_exactly(source, 8), "big"))


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(8, "big") + content


def _read_exactly(source: int, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = os.read(source, min(size - len(content), 1 << 20))
        if not part:
            raise EOFError("the pipe of tests ended")
        content += part
    return content


def supervise() -> None:
    """Reads a job from stdin; writes to stdout a byte with the protections that are missing, then what the fork replied."""
    job = json.loads(read_frame(0))
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # out of memory, the kernel takes this process first
    own_processes = libc is not None and job["isolation"] != "process" and _enter_namespaces(libc)
    if libc is not None:
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)  # nor does /proc show another's memory and files
    replies, reply = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(replies)
        _sandboxed(job, libc, own_processes, reply)
    os.close(reply)
    os.close(0)
    content = _collect(pid, replies, 1 + job["tests"], job["timeout"])
    _end(pid, sweep=libc is not None and not own_processes)
    os.write(1, content)


def _enter_namespaces(libc: Any) -> bool:
    """Moves what is forked from here into namespaces of its own; False where the system refuses.

    For root, the real user becomes nobody: the limit on processes does not hold for root, and the effective user, by which
    files are read, stays.
    """
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        os.setresuid(_NOBODY, 0, 0)
    if libc.unshare(_NEW_NAMESPACES):
        if user == 0:
            os.setresuid(0, 0, 0)
        return False
    for name, content in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {user} 1"), ("gid_map", f"{_NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    return True


def _sandboxed(job: dict[str, Any], libc: Any, own_processes: bool, reply: int) -> None:
    """The fork: closes every door, then runs the code and its tests."""
    os.setsid()
    missing = 0b0111
    if own_processes:
        missing = _close_files(libc, job["directory"].encode())
    tests = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.chdir(job["directory"])
    seconds = int(job["timeout"]) + 1
    limits = {"CPU": seconds, "FSIZE": _FILE_BYTES, "NOFILE": _OPEN_FILES, "CORE": 0}
    if sys.platform == "linux":
        limits["AS"] = job["memory_mb"] << 20
    if own_processes:  # elsewhere it counts all processes of the user
        limits["NPROC"] = _PROCESSES
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (limit, limit))
    if libc is not None:
        libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc is None or not _close_sockets(libc):
        missing |= 0b1000
    os.write(reply, bytes([missing]))
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if missing and job["isolation"] == "namespaces":
        os._exit(0)
    try:
        _run(job, tests, reply)
    finally:  # whatever the code made of it
        os._exit(0)


def _close_files(libc: Any, directory: bytes) -> int:
    """All files read-only, a small file system of its own in the working directory, a /proc with its own processes only;
    the bits of what the system refuses."""
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, _PRIVATE, 0)
    read_only = not libc.syscall(_MOUNT_SETATTR, -1, b"/", _RECURSIVE, attributes, ctypes.sizeof(attributes))
    size = f"size={_FILE_BYTES},mode=700".encode()
    files = read_only and not libc.mount(b"tmpfs", directory, b"tmpfs", _NOSUID_NODEV, size)
    processes = not libc.mount(b"proc", b"/proc", b"proc", _NOSUID_NODEV | _NOEXEC, None)
    return (not files) << 1 | (not processes) << 2


def _close_sockets(libc: Any) -> bool:
    """No socket of any family, a pair of connected ones apart: files that are sockets of the host take no orders. Nor may it
    trace other processes. False where the system refuses, or the machine's calls are not known."""
    if os.uname().machine not in _CALLS:
        return False
    architecture, calls, socketpair = _CALLS[os.uname().machine]
    refused = [*calls, *_EVERYWHERE]
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    lines += [(_EQUAL, len(refused) - place + 5, 0, call) for place, call in enumerate(refused)]
    lines += [(_AT_LEAST, 5, 0, _X32), (_EQUAL, 0, 3, socketpair)]
    lines += [(_LOAD, 0, 0, 24), (_AND, 0, 0, 0xF), (_EQUAL, 0, 1, 1)]  # its type is SOCK_STREAM: bound to its partner
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    program = b"".join(struct.pack("=HBBI", *line) for line in lines)
    return not libc.prctl(_SECCOMP, _FILTER, ctypes.byref(_Program(len(lines), program)), 0, 0)


class _Program(ctypes.Structure):
    """A struct sock_fprog."""

    _fields_: ClassVar[Any] = [("length", ctypes.c_ushort), ("lines", ctypes.c_char_p)]


def _collect(pid: int, replies: int, size: int, timeout: float) -> bytes:
    """What the fork has replied when all is there, its pipe or its life has ended, or the time is over."""
    deadline, content = time.monotonic() + timeout, b""
    while len(content) < size and (left := deadline - time.monotonic()) > 0:
        if select.select([replies], [], [], min(left, 0.02))[0]:
            part = os.read(replies, size - len(content))
            if not part:
                break
            content += part
        elif os.waitpid(pid, os.WNOHANG)[0]:  # what it forked may hold the pipe open
            break
    return content


def _end(pid: int, sweep: bool) -> None:
    """Kills the fork and its session; a process namespace dies with it, elsewhere orphans are swept up until none is left."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children() if sweep else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(child) for child in file.read().split()]
    return []


def _run(job: dict[str, Any], tests: int, reply: int) -> None:
    """Forks the code's process, then reads the tests, which that one has never seen, and answers with a byte for each."""
    link = _link()
    source, target = link.open_link(job["source"])
    suite, names, modules = marshal.loads(read_frame(tests))
    own = {**link.trusted_names(job["source"], set(names)), **{name: importlib.import_module(name) for name in modules}}
    tester = link.Tester(source, target, set(names) - set(modules), own)
    for test in suite:
        passed = tester.passes(test)
        os.write(reply, bytes([passed]))
        if not passed and not job["partial"]:
            return


def _link() -> Any:
    """The module beside this file, under no name that the code could import."""
    path = os.path.join(os.path.dirname(__file__), "sandbox_link.py")
    specification = importlib.util.spec_from_file_location("sandbox_link", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    supervise()
