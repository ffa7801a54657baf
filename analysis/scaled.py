"""Weights that checkpoints store with scales of their own: fp8 with block scales, MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from bitatlas.kernels.errors import UserError

__all__ = ["dequantize_fp8", "dequantize_mxfp4"]

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """float32 (.., rows, cols) times its scale: one number, one per row, or one per ``block`` (rows, cols).

    Raises:
        UserError: the number of scales does not fit the weight.
    """
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    for axis in (-2, -1):
        have, want = scale.shape[axis], weight.shape[axis]
        if have not in (1, want):
            if -(-want // block[axis]) != have:
                raise UserError(f"the fp8 scales of {name} do not fit it",
                                found=f"{have} scales for {want} in blocks of {block[axis]}")  # fmt: skip
            scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, want)
    return weight * scale


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, name: str) -> Tensor:
    """float32 (.., rows, 32 groups) of MXFP4 (OCP Microscaling v1.0): two E2M1 codes a byte, low nibble first.

    Args:
        blocks: (.., rows, groups, 16) uint8.
        scales: (.., rows, groups) uint8, powers of two with a bias of 127.
        name: for the message.

    Raises:
        UserError: the scales do not fit the blocks.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise UserError(f"the MXFP4 scales of {name} do not fit it",
                        found=f"blocks {list(blocks.shape)}, scales {list(scales.shape)}")  # fmt: skip
    table = torch.tensor(_FP4)
    # (.., rows, groups, 16, 2): low nibble, high nibble.
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1)
    values = table[codes.long()].flatten(-2)  # (.., rows, groups, 32)
    values = torch.ldexp(values, (scales.int() - _E8M0_BIAS).unsqueeze(-1))
    return values.flatten(-2)
