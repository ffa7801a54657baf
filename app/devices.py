"""Where a model computes, and in what: the words of ``--device`` and ``--dtype``. Torch only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitatlas.analysis.schema import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "DTYPES", "check_place", "pick_device", "pick_dtype", "place_params"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_place(device: str, dtype: str) -> None:
    """Raises `UserError` for words that are none of `DEVICES` and `DTYPES`; whether the GPU is there shows later."""
    for what, word, known in (("device", device, DEVICES), ("dtype", dtype, DTYPES)):
        if word not in known:
            raise UserError(f"there is no {what} {word!r}", fix=f"--{what} {', '.join(known)}")


def place_params(device: str, dtype: str, usual: str) -> dict[str, str]:
    """What a job's request says of device and dtype: nothing of ``auto`` and of the ``usual`` dtype, so that asking for these is the same request."""
    return {k: v for k, v, u in (("device", device, "auto"), ("dtype", dtype, usual)) if v != u}


def pick_device(asked: str, need: int = 0) -> str:
    """``cpu`` or ``cuda``.

    Args:
        asked: one of `DEVICES`; ``auto`` = a GPU where there is one with ``need`` bytes free.
        need: bytes that will be held there, roughly.

    Raises:
        UserError: a GPU was asked for by name, and torch has none.
    """
    check_place(asked, "auto")
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda" if asked == "cuda" or torch.cuda.mem_get_info()[0] >= need else "cpu"
    if asked == "cuda":
        raise UserError("there is no GPU that torch can use", found=f"torch {torch.__version__}",
                        fix="--device auto or cpu; `bitatlas doctor` shows what this machine has")  # fmt: skip
    return "cpu"


def pick_dtype(asked: str, device: str) -> torch.dtype:
    """The computing dtype; ``auto`` = float32 on the CPU, bfloat16 on a GPU."""
    check_place("auto", asked)
    import torch

    name = ("float32" if device == "cpu" else "bfloat16") if asked == "auto" else asked
    dtype: torch.dtype = getattr(torch, name)
    return dtype
