"""Memory of the processor, kept for the next step.

A step of training asks for the same tensors as the one before, and large ones. The C library gives such memory back to
the system as soon as it is free, and the next step gets it anew, page by page and filled with zeros.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt in <malloc.h>


def keep_freed_memory() -> bool:
    """From now on this process keeps memory that it frees, for itself; whether the C library could be told so (glibc).

    The process stays as large as it once was, until it ends: for training, not for what is small most of the time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
