"""Memory that is freed -> memory that the next tensor gets, without a word to the operating system."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Parameters of ``mallopt``, of glibc's malloc.h."""

_KEEPING = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
_ORDINARY = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_TOP_PAD, 128 << 10))
"""glibc's own, with the thresholds that it comes to by itself after a block of 32 MiB or more was freed."""

_num_holders = 0
_lock = threading.Lock()


def reuse_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether its allocator can.

    glibc gets large blocks from the operating system and returns them when they are freed. Every page of the next block
    is then made and zeroed anew, which takes longer than most operations on it: a step on images of 224 x 224 spends a
    third of its time there. A process that keeps its memory holds what it needed at most until it ends.
    """
    global _num_holders
    with _lock:
        _num_holders += 1
        return _adjust(_KEEPING)


@contextmanager
def reusing_freed_memory() -> Iterator[None]:
    """Keep freed memory until this block ends; if nobody else keeps it then, give back what is free."""
    global _num_holders
    reuse_freed_memory()
    try:
        yield
    finally:
        with _lock:
            _num_holders -= 1
            if _num_holders == 0 and _adjust(_ORDINARY):
                ctypes.CDLL(None).malloc_trim(0)


def _adjust(wanted: tuple[tuple[int, int], ...]) -> bool:
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none that is loaded as such
        return False
    return all(adjust(ctypes.c_int(parameter), ctypes.c_int(value)) == 1 for parameter, value in wanted)
