"""The CPU's own packed product for few rows, compiled once with the machine's compiler; absent without one.

The shared library lies in the user's cache folder under the hash of source, compiler and processor, so nothing is
compiled twice and a library from another machine is never loaded. ``BITATLAS_KERNELS=torch`` switches it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitatlas.kernels.packed.matrix import PackedMatrix

__all__ = ["MOST_ROWS", "available", "library", "linear"]

MOST_ROWS = 8  # beyond, dequantising a block once for all rows and a BLAS product is faster
_FLAGS = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fopenmp",
          "-shared", "-fPIC")  # fmt: skip
_SOURCE = Path(__file__).with_name("cpu_linear.c")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bitatlas" / "kernels"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(line for line in lines[:60] if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return platform.processor()


@cache
def library(*more: str) -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler, or it fails. ``more`` flags are for tests."""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.byteorder != "little" or sys.platform == "win32":
        return None
    key = hashlib.sha256(
        "\0".join([_SOURCE.read_text(), compiler, *_FLAGS, *more, _processor()]).encode()
    ).hexdigest()
    path = _cache_folder() / f"linear-{key[:24]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                made = Path(work) / path.name
                subprocess.run(
                    [compiler, *_FLAGS, *more, "-o", str(made), str(_SOURCE)],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
                os.replace(made, path)
        lib = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.bitatlas_linear.argtypes = [
        p,
        i64,
        p,
        p,
        i64,
        p,
        p,
        p,
        i64,
        i64,
        i64,
        i64,
        ctypes.c_int,
        ctypes.c_int,
    ]
    lib.bitatlas_linear.restype = None
    return lib


def available(x: Tensor, matrix: PackedMatrix) -> bool:
    """Whether `linear` takes this product: few rows, integer codes, no gradient wanted."""
    fmt, rows = matrix.format, x.numel() // matrix.cols
    if fmt.kind != "int" or not 0 < rows <= MOST_ROWS or os.environ.get("BITATLAS_KERNELS") == "torch":
        return False
    if (
        x.device.type != "cpu"
        or matrix.codes.device.type != "cpu"
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return False
    # Eight codes are decoded at a time, so groups must start at whole bytes.
    return (fmt.group_size or 8) % 8 == 0 and library() is not None


def linear(x: Tensor, matrix: PackedMatrix, lib: ctypes.CDLL | None = None) -> Tensor:
    """``x (..., cols) @ W.T`` -> (..., rows) in x's dtype, computed in float32; ask `available` first."""
    lib = lib or library()
    assert lib is not None
    fmt, flat = matrix.format, x.detach().reshape(-1, matrix.cols).to(torch.float32).contiguous()
    m, k = flat.shape
    group = fmt.group_size or k
    codes, scales, zeros = matrix.codes.contiguous(), matrix.scales.contiguous(), matrix.zeros
    sums = torch.empty(m, fmt.groups(k))
    y = torch.empty(m, matrix.rows)
    lib.bitatlas_linear(
        codes.data_ptr(), codes.shape[1] * 4, scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), 0 if zeros is None else zeros.numel() * 4,
        flat.data_ptr(), sums.data_ptr(), y.data_ptr(), m, matrix.rows, k, group, fmt.bits, torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], matrix.rows).to(x.dtype)
