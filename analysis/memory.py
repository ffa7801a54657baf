"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any

__all__ = ["give_back"]


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc, or no symbols to look up
        return None


def give_back() -> None:
    """Between two phases of a job: glibc keeps what the last one freed, and the next one asks for other sizes."""
    gc.collect()
    if trim := _trim():
        trim(0)
