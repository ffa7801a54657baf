"""Round to nearest in C against the torch reference, bit by bit; for this processor and without its wide instructions."""

from __future__ import annotations

import pytest
import torch

from bitatlas.kernels import cpu_rounding
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.quantizers.rtn import Rtn
from bitatlas.kernels.reference import Quantized, quantize

pytestmark = pytest.mark.skipif(cpu_rounding.library() is None, reason="no C compiler here")
PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-fma", "-mno-f16c")
FORMATS = (
    "int2-g64",
    "int3-g32",
    "int4-g128",
    "int8-channel",
    "int5-g64-sym",
    "int3-channel-sym",
    "int6-g64",
)


def same(one: Quantized | None, other: Quantized) -> bool:
    """Codes, scales and zero points."""
    assert one is not None
    zeros = (one.zeros is None) == (other.zeros is None)
    if zeros and one.zeros is not None and other.zeros is not None:
        zeros = torch.equal(one.zeros, other.zeros)
    return zeros and torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("flags", [(), PLAIN], ids=["native", "plain"])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_reference_bit_by_bit(flags: tuple[str, ...], name: str) -> None:
    lib, fmt = cpu_rounding.library(*flags), parse_format(name)
    if lib is None:
        pytest.skip("these flags are for x86")
    generator = torch.Generator().manual_seed(7)
    for shape in ((1, 1), (3, 65), (7, 192), (5, 300), (33, 512)):
        for dtype in cpu_rounding.DTYPES:
            # Ordinary weights, groups below the smallest scale, above the largest, and none but zeros.
            for size in (1.0, 1e-9, 3e4, 0.0):
                w = (torch.randn(shape, generator=generator) * size).clamp(-6e4, 6e4).to(dtype)
                assert same(cpu_rounding.rounded(w, fmt, lib), quantize(w, fmt)), (shape, dtype, size)


def test_ties_one_sided_groups_and_the_largest_weights() -> None:
    fmt = parse_format("int3-g64")
    steps = torch.arange(64).float().view(1, -1) / 2  # halves lie exactly between two codes
    for w in (
        steps,
        -steps,
        steps + 5,
        -steps - 5,
        steps * (torch.finfo(torch.float32).max / 64),
        -steps * 0.0,
    ):
        assert same(cpu_rounding.rounded(w, fmt), quantize(w, fmt))


def test_rows_and_columns_apart() -> None:
    fmt, wide = parse_format("int4-g32"), torch.randn(9, 400)
    for w in (wide[:, 3:68], wide.T, wide[2:3, ::2], wide[::3]):
        assert same(cpu_rounding.rounded(w, fmt), quantize(w, fmt))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", list(cpu_rounding.DTYPES))
def test_nan_and_inf_are_refused_anywhere(odd: float, dtype: torch.dtype) -> None:
    fmt = parse_format("int4-g64")
    for at in (0, 15, 16, 63, 64, 99):
        w = torch.ones(2, 100, dtype=dtype)
        w[1, at] = odd
        assert cpu_rounding.rounded(w, fmt) is None
        with pytest.raises(UserError, match="holds NaN or Inf"):
            Rtn()(w, fmt)


def test_what_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(4, 128)
    for name in ("nf4-g64", "fp8-channel", "int3-g64-o1"):
        assert cpu_rounding.rounded(w, parse_format(name)) is None
    assert cpu_rounding.rounded(w.double(), parse_format("int4-g64")) is None
    assert cpu_rounding.rounded(torch.empty(0, 128), parse_format("int4-g64")) is None
    monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    assert cpu_rounding.rounded(w, parse_format("int4-g64")) is None
    assert same(Rtn()(w, parse_format("int4-g64")), quantize(w, parse_format("int4-g64")))
