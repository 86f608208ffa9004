"""Memory that is freed -> memory that the next tensor gets, without a word to the operating system."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of ``mallopt``, of glibc's malloc.h."""

_LARGEST = 2**31 - 1
_GROWTH = 64 << 20


def reuse_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether its allocator can.

    glibc gets large blocks from the operating system and returns them when they are freed. Every page of the next block
    is then made and zeroed anew, which takes longer than most operations on it: a step on images of 224 x 224 spends a
    third of its time there. A process that keeps its memory holds what it needed at most until it ends.
    """
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none that is loaded as such
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _GROWTH))
    return all(adjust(ctypes.c_int(parameter), ctypes.c_int(value)) == 1 for parameter, value in wanted)
