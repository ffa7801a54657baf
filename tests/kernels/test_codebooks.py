"""Table formats and outliers against brute force and against torch's own FP8."""

from __future__ import annotations

import math

import pytest
import torch

from bitatlas.kernels.codebooks import entries, nearest
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS, parse_format
from bitatlas.kernels.packed.matrix import (
    PackedMatrix,
    pack_blocks,
    pack_weight,
    packed_tensors,
    quantised_weight,
)
from bitatlas.kernels.quantizers import QUANTIZERS, InputStats
from bitatlas.kernels.reference import dequantize, quantize, quantize_dequantize

TABLES = [n for n, f in FORMATS.items() if f.kind == "codebook"]
SPARSE = [n for n, f in FORMATS.items() if f.kind == "sparse"]


def weight(rows: int = 9, cols: int = 147) -> torch.Tensor:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(5))
    w[1, 3], w[2], w[3] = 40.0, 0.0, w[3] * 1e-6
    return w


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8"])
def test_the_nearest_entry_is_taken(name: str) -> None:
    values = entries(name)
    top = float(values.nan_to_num(0).max())
    x = torch.cat([torch.linspace(-1.2 * top, 1.2 * top, 997), values[values.isfinite()]])
    got = values[nearest(x, name).long()]
    want = (values.nan_to_num(math.inf) - x[:, None]).abs().min(1).values
    assert torch.equal((got - x).abs(), want)


def test_fp8_rounds_as_torch_does_ties_included() -> None:
    values = entries("fp8")
    ordered = values[values.isfinite()].unique()
    x = torch.cat([torch.randn(4000) * 50, ordered, (ordered[1:] + ordered[:-1]) / 2])
    assert torch.equal(values[nearest(x, "fp8").long()], x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_mxfp4_is_the_microscaling_standard() -> None:
    w = weight(cols=64)
    q = quantize(w, parse_format("mxfp4"))
    assert q.scales.dtype == torch.uint8
    for row in range(w.shape[0]):
        for g in range(2):
            x = w[row, 32 * g : 32 * g + 32]
            top = float(x.abs().max())
            exponent = math.floor(math.log2(top)) - 2 if top else -127
            assert int(q.scales[row, g]) == max(exponent + 127, 0)
            levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 2.0**exponent
            error = (x.abs()[:, None] - levels).abs().min(1).values
            assert torch.allclose(
                (dequantize(q)[row, 32 * g : 32 * g + 32] - x).abs(), error, atol=0, rtol=1e-6
            )


@pytest.mark.parametrize("name", [*TABLES, *SPARSE])
@pytest.mark.parametrize("shape", [(9, 147), (1, 5), (33, 64)])
def test_bytes_are_exact_and_packing_loses_nothing(name: str, shape: tuple[int, int]) -> None:
    fmt, w = parse_format(name), weight()[: shape[0], : shape[1]]
    w = torch.randn(shape) if w.shape != shape else w
    stored = pack_weight(w.to(torch.bfloat16), fmt, quantize)
    specs = packed_tensors(fmt, *shape)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == specs
    assert sum(t.numel() * t.itemsize for t in stored.values()) == fmt.payload_bytes(*shape)
    want = quantize_dequantize(w.to(torch.bfloat16), fmt)
    assert torch.equal(PackedMatrix(fmt, *shape, stored).to(torch.bfloat16).dequantize(), want)
    assert torch.equal(quantised_weight(w.to(torch.bfloat16), fmt, quantize), want)
    for bad in (math.nan, math.inf):
        broken = w.clone()
        broken[-1, -1] = bad
        with pytest.raises(UserError, match="NaN or Inf"):
            quantize(broken, fmt)


def test_sizes_are_those_of_the_standards() -> None:
    assert parse_format("mxfp4").bits_per_weight(64, 4096) == 4.25
    assert parse_format("nf4-g64").bits_per_weight(64, 4096) == 4.25
    assert parse_format("fp4-g16").bits_per_weight(64, 4096) == 5.0
    assert parse_format("fp8-channel").payload_bytes(64, 4096) == 64 * 4096 + 64 * 2
    assert parse_format("fp8-tensor").payload_bytes(64, 4094) == 64 * 4096 + 2
    plain, sparse = (
        parse_format("int3-g64").payload_bytes(10, 1000),
        parse_format("int3-g64-o1").payload_bytes(10, 1000),
    )
    assert sparse - plain == 10 * 10 * (2 + 2)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_scale_serves_all_blocks_of_a_matrix(kind: str) -> None:
    fmt, w = parse_format("fp8-tensor"), torch.randn(70, 9, generator=torch.Generator().manual_seed(1))
    w[61, 2] = -30.0  # in the last block
    scale = torch.tensor(30.0 / 448).half().float()
    want = (w / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(quantize_dequantize(w, fmt), want)
    stats = InputStats(torch.eye(9) * 50, 50)  # GPTQ rounds to nearest where inputs are independent
    whole, blocks = QUANTIZERS[kind](stats), QUANTIZERS[kind](stats)
    blocks.largest = w.abs().amax()
    stored = pack_blocks(w.split(32), 70, 9, fmt, blocks)
    matrix = PackedMatrix(fmt, 70, 9, stored)
    assert torch.equal(matrix.dequantize(), want)
    assert torch.equal(matrix.dequantize(64), want[64:])
    assert torch.equal(matrix.take_rows(torch.tensor([61, 3])), want[[61, 3]])
    assert torch.equal(quantised_weight(w, fmt, whole), want)


@pytest.mark.parametrize("name", SPARSE)
def test_outliers_are_the_largest_of_each_row_and_stay(name: str) -> None:
    fmt, w = parse_format(name), weight()
    q = quantize(w, fmt)
    count = math.ceil(147 * fmt.outliers / 1000)
    for row in range(w.shape[0]):
        kept = set(q.columns[row].tolist())
        assert len(kept) == count
        rest = [c for c in range(147) if c not in kept]
        assert w[row, sorted(kept)].abs().min() >= w[row, rest].abs().max()
    out = dequantize(q)
    assert torch.equal(out.gather(1, q.columns), w.gather(1, q.columns).half().float())
    # The rest is rounded as if the outliers were not there.
    without = quantize_dequantize(w.scatter(1, q.columns, 0.0), parse_format(f"int{fmt.bits}-g64"))
    assert torch.equal(out.scatter(1, q.columns, 0.0), without.scatter(1, q.columns, 0.0))
    plain = quantize_dequantize(w, parse_format(f"int{fmt.bits}-g64"))
    assert (out - w)[1].square().sum() < 0.5 * (plain - w)[1].square().sum()


def test_columns_beyond_15_bits_survive() -> None:
    w = torch.zeros(2, 40_000)
    w[0, 39_999], w[1, 32_768] = 3.0, -2.0
    fmt = parse_format("int2-g64-o0.5")
    m = PackedMatrix(fmt, 2, 40_000, pack_weight(w, fmt, quantize))
    assert torch.equal(m.dequantize(), w)
    assert torch.equal(m.take_rows(torch.tensor([1])), w[1:])


@pytest.mark.parametrize(
    "name", ["nf4-g32", "fp4-g16", "mxfp4", "fp8-channel", "fp8-tensor", "int3-g64-o1", "int2-g64-o0.5"]
)
def test_every_quantizer_takes_them(name: str) -> None:
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(7)
    x = (
        torch.randn(800, 75, generator=generator)
        @ (torch.randn(75, 75, generator=generator) * torch.logspace(-1, 1, 75))
        / 75**0.5
    )
    w, stats = torch.randn(24, 75, generator=generator), InputStats(x.T @ x, 800)
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(75)
    error = {}
    for kind, quantizer in QUANTIZERS.items():
        one = quantizer(stats)
        change = dequantize(one(w, fmt)) - w
        error[kind] = float(torch.einsum("ij,jk,ik->", change, damped, change)) / 800
        if one.loss is not None:
            assert one.loss == pytest.approx(error[kind], rel=2e-3)
    assert error["gptq"] < 0.95 * error["rtn"]
    # Its grids are searched for the diagonal of the Hessian alone.
    assert error["awq"] < 1.02 * error["rtn"]
