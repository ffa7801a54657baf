from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS, parse_format
from bitatlas.kernels.reference import dequantize, quantize, quantize_dequantize

INTS = [f for f in FORMATS.values() if f.kind == "int"]


def by_hand(w, fmt):
    """The module's formulas, one group at a time, in NumPy float32."""
    codes, out = np.zeros(w.shape, np.uint8), np.zeros_like(w)
    group = fmt.group_size or w.shape[1]
    f32 = np.float32
    for r in range(w.shape[0]):
        for c in range(0, w.shape[1], group):
            x = w[r, c : c + group]
            if fmt.symmetric:
                step, zero = f32(np.abs(x).max()) / f32(fmt.qmax / 2), f32(1 << (fmt.bits - 1))
            else:
                lo, hi = min(f32(0), x.min()), max(f32(0), x.max())
                step = f32(hi - lo) / f32(fmt.qmax)
            step = f32(np.float16(np.clip(step, f32(2**-24), f32(65504))))
            if not fmt.symmetric:
                zero = np.clip(np.round(-lo / step), 0, fmt.qmax)
            q = np.clip(np.round(x / step) + zero, 0, fmt.qmax)
            codes[r, c : c + group] = q
            out[r, c : c + group] = (q - zero) * step
    return codes, out


@pytest.mark.parametrize("fmt", INTS, ids=lambda f: f.name)
def test_codes_and_values_equal_the_formulas(fmt):
    w = np.random.default_rng(fmt.bits).standard_normal((5, 150)).astype(np.float32)
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    w[3] = 0
    w[4, :70] *= 1e-9
    codes, values = by_hand(w, fmt)
    q = quantize(torch.from_numpy(w), fmt)
    assert np.array_equal(q.codes.numpy(), codes)
    assert np.array_equal(dequantize(q).numpy(), values)


@pytest.mark.parametrize("fmt", INTS, ids=lambda f: f.name)
def test_the_short_way_gives_the_same_bits(fmt):
    w = torch.randn(7, 161, generator=torch.Generator().manual_seed(1)) * 3
    before = w.clone()
    assert torch.equal(quantize_dequantize(w, fmt), dequantize(quantize(w, fmt)))
    assert torch.equal(w, before)
    assert quantize_dequantize(w, fmt).is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-sym", "int2-channel"])
def test_nan_and_inf_are_refused_wherever_they_are(bad, name):
    for place in ((0, 0), (2, 31), (2, 49)):
        w = torch.randn(3, 50)
        w[place] = bad
        for run in (quantize, quantize_dequantize):
            with pytest.raises(UserError, match="1 such value"):
                run(w, parse_format(name))


def test_pass_through_types_only_round():
    w = torch.randn(3, 5)
    assert torch.equal(quantize_dequantize(w, parse_format("bf16")), w.bfloat16().float())
    assert torch.equal(quantize_dequantize(w, parse_format("fp16")), w.half().float())
    with pytest.raises(UserError, match="as they are"):
        quantize(w, parse_format("bf16"))
