"""Memory that a training frees stays with the process.

By default glibc gives large blocks back to the kernel when they are freed, which hands them out and clears them again a moment
later: on a CPU a page fault for every page of every large activation. `mallopt` (mallopt(3)) does for a running process what
the variables MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ do for one that starts. `benchmarks/README.md` has what it gives.
"""

import ctypes
import os
import platform

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's; read when it makes its first tensor
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NO_LIMIT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for as long as it runs; whether it does.

    Only where torch was asked for huge pages: without them a training that keeps its memory needs up to 42 % more of it. Nor
    where there is no glibc, or where the user has set how it allocates (MALLOC_*, GLIBC_TUNABLES).
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or os.environ.get(HUGE_PAGES) != "1" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT))
