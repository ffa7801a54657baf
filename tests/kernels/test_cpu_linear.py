from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitatlas.kernels import cpu
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.packed.modules import PackedLinear
from bitatlas.kernels.packing import pack_codes
from bitatlas.kernels.reference import quantize, quantize_dequantize

FORMATS = [
    f"int{b}-{g}{s}" for b in (2, 3, 4, 5, 6, 8) for g in ("g32", "g128", "channel") for s in ("", "-sym")
]
TABLES = ["nf4-g32", "nf4-g128", "fp4-g16", "fp4-g32", "mxfp4", "fp8-channel", "fp8-tensor"]
AVX2 = ("-mno-avx512f",)
PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-bmi2", "-mno-f16c")  # what other processors run
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")


@pytest.fixture(params=[(), AVX2, PLAIN], ids=["native", "avx2", "plain"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Compiled for this processor, and for lesser ones."""
    found = cpu.library(*request.param)
    if found is None:
        pytest.skip("these flags are for x86")
    return found


def matrix(weight: torch.Tensor, name: str) -> PackedMatrix:
    fmt = parse_format(name)
    return PackedMatrix(fmt, *weight.shape, pack_weight(weight, fmt, quantize))


@needs_compiler
@pytest.mark.parametrize("name", FORMATS + TABLES)
def test_equals_the_reference(name: str, library: ctypes.CDLL) -> None:
    for rows, cols in ((5, 1), (33, 17), (7, 147), (6, 256)):
        generator = torch.Generator().manual_seed(cols)
        weight = torch.randn(rows, cols, generator=generator) * torch.logspace(-6, 2, rows).unsqueeze(1)
        m, dense = matrix(weight, name), quantize_dequantize(weight, parse_format(name)).double()
        for count in (1, 2, 3, 8):
            x = torch.randn(count, cols, generator=generator)
            got, want = cpu.linear(x, m, library), x.double() @ dense.T
            size = x.double().abs() @ dense.abs().T + 1e-30  # of the sums that cancel
            assert ((got - want).abs() / size).max() < 2e-6


@needs_compiler
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("int4-g32", 8),
        ("int4-g32-sym", 24),
        ("int3-g32", 40),
        ("int4-g32", 32),
        ("int8-g32-sym", 32),
        ("mxfp4", 32),
    ],
)
def test_any_number_of_rows_and_groups(name: str, group: int, library: ctypes.CDLL) -> None:
    weight, fmt = torch.randn(11, 1128), replace(parse_format(name), group_size=group)
    m = PackedMatrix(fmt, 11, 1128, pack_weight(weight, fmt, quantize))
    dense = quantize_dequantize(weight, fmt).double()
    for count in range(1, 9):
        x = torch.randn(count, 1128)
        got, want = cpu.linear(x, m, library), x.double() @ dense.T
        assert ((got - want).abs() / (x.double().abs() @ dense.abs().T)).max() < 2e-6


@needs_compiler
@pytest.mark.parametrize("cols", [4, 17, 36, 64])
def test_nan_codes_spoil_their_own_row_only(cols: int, library: ctypes.CDLL) -> None:
    m = matrix(torch.randn(9, cols), "fp8-channel")
    m.codes[1::2] = 0x7F7F7F7F
    y = cpu.linear(torch.randn(2, cols), m, library)
    assert bool(y[:, ::2].isfinite().all())
    assert bool(y[:, 1::2].isnan().all())


@needs_compiler
@pytest.mark.parametrize("name", ["nf4-g32", "mxfp4", "fp8-channel", "fp8-tensor"])
def test_every_code_of_a_table_is_the_reference_s_to_the_last_bit(name: str, library: ctypes.CDLL) -> None:
    fmt = parse_format(name)
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8).repeat(1, 256 >> fmt.bits)
    m = matrix(torch.randn(3, 256) * torch.tensor([[1e-3], [1.0], [1e3]]), name)
    codes = codes.repeat(3, 1)
    if fmt.bits == 8:
        codes[:2, [127, 255]] = 0  # NaN
    m.codes.copy_(pack_codes(codes, fmt.bits))
    if fmt.scale == "e8m0":
        m.scales[:2] = torch.tensor([0, 1, 127, 129, 2, 60, 200, 3], dtype=torch.uint8)
    dense = m.dequantize()
    for start in range(0, 256, 8):
        x = torch.zeros(8, 256)
        x[range(8), range(start, start + 8)] = 1
        got, want = cpu.linear(x, m, library).T, dense[:, start : start + 8]
        # A NaN code spoils all that it is summed with, also in the reference.
        spoilt = dense.isnan().any(1)
        assert torch.equal(got[~spoilt], want[~spoilt])
        assert bool(got[spoilt].isnan().all())


@needs_compiler
@pytest.mark.parametrize("name", ["int4-g32", "nf4-g64", "mxfp4", "fp8-tensor"])
def test_used_for_few_rows_only_and_keeps_dtype_and_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLinear(matrix(torch.randn(40, 64), name), torch.randn(40))
    used = []
    linear = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda x, m: used.append(tuple(x.shape)) or linear(x, m))
    for shape in ((64,), (1, 3, 64), (9, 64), (2, 0, 64)):
        x = torch.randn(*shape)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, atol=1e-4, rtol=1e-4)
    assert used == [(64,), (1, 3, 64)]
    x = torch.randn(2, 64).bfloat16()
    assert layer.to(torch.bfloat16)(x).dtype == torch.bfloat16
    monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    before = len(used)
    layer(x)
    assert len(used) == before


def test_gradients_of_the_input_still_flow() -> None:
    layer = PackedLinear(matrix(torch.randn(40, 64), "int4-g32"))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.library.cache_clear()
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        layer = PackedLinear(matrix(torch.randn(8, 64), "int3-g64"))
        x = torch.randn(1, 64)
        assert cpu.library() is None
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
    finally:
        cpu.library.cache_clear()


@needs_compiler
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    try:
        assert cpu.library() is not None
        folder = tmp_path / "bitatlas" / "kernels"
        (made,) = folder.iterdir()
        assert made.suffix == ".so"
        stamp = os.stat(made).st_mtime_ns
        cpu.library.cache_clear()
        assert cpu.library() is not None
        assert os.stat(made).st_mtime_ns == stamp
    finally:
        cpu.library.cache_clear()
