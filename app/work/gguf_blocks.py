"""Codes as ggml blocks: the formats in groups of 32 are the same grids as ggml's older types, so nothing is rounded twice.

q4_0, q5_0 and q8_0 are exactly our symmetric formats (d = scale, the middle code is zero), mxfp4 is ours byte for byte
(its table is doubled and its scale halved). q4_1 and q5_1 store
m = -zero * scale as float16, which moves a weight by less than 1/128 of a step. Everything else that the gguf package
can make is left to its own rounding.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bitatlas.app.targets.ggml import exact_type
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.reference import Quantized

__all__ = ["blocks_of", "ggml_round"]


def blocks_of(q: Quantized) -> np.ndarray:
    """(rows, bytes) uint8: the blocks of a matrix in groups of 32.

    Raises:
        ValueError: a format without a type of the same grid, or a ragged last group.
    """
    codes, scales = q.codes.cpu().numpy(), q.scales.cpu().numpy()
    fmt, (rows, cols) = q.format, q.codes.shape
    if not exact_type(fmt) or fmt.kind == "float" or cols % 32:
        raise ValueError(f"{fmt.name} with {cols} columns has no ggml type of the same grid")
    blocks = codes.reshape(-1, 32)
    d = scales if fmt.scale == "e8m0" else scales.astype("<f2")
    parts: list[np.ndarray] = [d.reshape(-1, 1).view(np.uint8)]
    if q.zeros is not None:
        zero = q.zeros.cpu().numpy().astype(np.float32).reshape(-1, 1)
        with np.errstate(over="ignore"):  # said below
            minimum = (-zero * scales.astype(np.float32).reshape(-1, 1)).astype("<f2")
        if not np.isfinite(minimum).all():
            raise UserError(
                "a group's minimum is beyond float16", found=f"{fmt.name}", fix="choose a symmetric format"
            )
        parts.append(minimum.view(np.uint8))
    if fmt.bits == 8:
        parts.append((blocks ^ 0x80).astype(np.uint8))  # unsigned with zero at 128 to two's complement
    else:
        if fmt.bits == 5:
            parts.append(np.packbits(blocks >> 4, axis=1, bitorder="little"))
        parts.append((blocks[:, :16] & 15) | (blocks[:, 16:] & 15) << 4)
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def ggml_round(weight: Tensor, kind: str) -> np.ndarray:
    """The gguf package's own rounding of a (rows, cols) matrix to a type such as ``q8_0`` or ``bf16``; uint8, or float."""
    import gguf

    values = np.ascontiguousarray(weight.detach().cpu().float().numpy())
    if kind == "f32":
        return values
    if kind == "f16":
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    except NotImplementedError:
        raise UserError(
            f"{kind} is not a type that the gguf package can make", fix="run the command of the export"
        ) from None
