"""Memory between the program and the system, where the C library is glibc; elsewhere these do nothing."""

from __future__ import annotations

import ctypes
import gc
from functools import cache

__all__ = ["give_back", "keep_pages"]

# Parameters of mallopt, malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _MOST_KEPT = 32 << 20, 128 << 20


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
    except (OSError, TypeError):
        return None


def give_back() -> None:
    """Between two phases of a job: glibc keeps what the last one freed, and the next one asks for other sizes."""
    gc.collect()
    if libc := _libc():
        libc.malloc_trim(0)


def keep_pages() -> None:
    """For work that goes through block after block: up to 128 MiB that are free stay with the process.

    By default every block of some MiB may come as new pages, and touching them for the first time costs more than
    what is computed with them.
    """
    if libc := _libc():
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
