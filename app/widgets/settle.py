"""What a finished run of the page leaves to the garbage collector.

Streamlit walks every object of the process after each run of the script (``gc.collect(2)``), before the last messages leave for the
browser. Modules hold most of them (torch, transformers, plotly: several hundred thousand) and are never garbage, so they are moved
out of the collector's sight once they are loaded.
"""

from __future__ import annotations

import atexit
import gc
import sys

__all__ = ["settle"]

_loaded = 0
atexit.register(gc.unfreeze)  # libraries look for leaks when the process ends


def settle() -> bool:
    """Freeze what is alive if modules were loaded since the last time; true where it did.

    Garbage is collected before, so that none is kept for good. Objects that are frozen still go when their last reference goes.
    """
    global _loaded
    if len(sys.modules) == _loaded:
        return False
    gc.collect()
    gc.freeze()
    _loaded = len(sys.modules)
    return True
