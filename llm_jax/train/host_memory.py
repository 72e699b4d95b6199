"""Host memory that is kept instead of given back: what a training step on a CPU gains most from.

XLA:CPU takes the temporaries of every call from malloc and frees them after it. glibc serves such
sizes with mmap and munmap: each step then faults its whole working set in again, 4 KiB at a time,
which costs up to 40 % of a small model's step.

A large model's buffers do not fit the holes that others of its buffers left behind: kept, they pile
up to more than twice what is in use (SmolLM2-135M, tuned in full: 14 GB for 6), and save no time.
`fit` ends the keeping for those.
"""

import ctypes
import os
import sys

# Options of glibc's mallopt(3) and madvise(2).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20
_LARGE = 256 << 20  # bytes of parameters from which on nothing is kept
_done = False


def keep() -> bool:
    """Makes malloc keep freed memory for the rest of the process, on huge pages; True if it can.

    One heap serves all threads, grows in large steps and never shrinks, so that a process holds
    what it needed at its peak. Half of the machine's memory is asked for once and freed at once,
    untouched: only addresses, whose pages will be huge where the kernel has them. For processes
    that compute on the CPU, before jax starts its threads, which otherwise have heaps of their own.
    Does nothing a second time, or without glibc (musl, macOS).
    """
    global _done
    if _done or not sys.platform.startswith("linux"):
        return _done
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
    for option, value in options.items():
        libc.mallopt(option, value)
    _done = True
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // _HUGE * _HUGE
    if block := libc.malloc(size):  # a limit on memory (ulimit -v) refuses: pages stay small
        first = -(-block // _HUGE) * _HUGE
        libc.madvise(first, size - _HUGE, _MADV_HUGEPAGE)
        libc.free(block)
    return _done


def fit(parameter_bytes: int) -> None:
    """Ends what `keep` began if the model is too large for it: what is free goes back now, and large
    buffers are mapped and unmapped again, as is glibc's default. To be called where a model's size
    becomes known, before its buffers are made."""
    global _done
    if not _done or parameter_bytes < _LARGE:
        return
    libc = ctypes.CDLL(None)
    options = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}
    for option, value in options.items():
        libc.mallopt(option, value)
    libc.malloc_trim(0)
    _done = False
