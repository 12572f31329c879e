"""What a process that trains on a CPU does with the memory of a step."""

import ctypes
import sys

# As glibc's malloc.h has them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let malloc keep, for the whole process, what is freed; a C library other than glibc is left as it is.

    By itself glibc gives pieces above 32 MB, and the end of its heap, back to the system at once: each step would get
    its memory anew, zeroed page by page, which takes a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
