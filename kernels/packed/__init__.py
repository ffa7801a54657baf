"""The packed checkpoint: bit-packed safetensors shards with ``bitatlas.json``, and the modules that run it.

``from bitatlas.kernels.packed import load`` is the one import a user needs; transformers is imported at that point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitatlas.kernels.packed.loader import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Reading a manifest or writing shards must not import transformers.
    if name == "load":
        from bitatlas.kernels.packed.loader import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
