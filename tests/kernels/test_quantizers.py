from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS, parse_format
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.quantizers import QUANTIZERS, InputStats, get_quantizer
from bitatlas.kernels.quantizers import gptq as gptq_module
from bitatlas.kernels.quantizers.gptq import Gptq
from bitatlas.kernels.quantizers.grid import minmax_grid, round_to, search_grid
from bitatlas.kernels.reference import dequantize, quantize

INTS = [n for n, f in FORMATS.items() if f.kind == "int"]
SOME = ("int2-g32", "int3-g64-sym", "int4-channel", "int8-g32")


def problem(rows: int = 24, cols: int = 75, tokens: int = 400) -> tuple[Tensor, InputStats]:
    """A weight and correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(cols, cols, generator=g) * torch.logspace(-1, 1, cols)
    x = torch.randn(tokens, cols, generator=g) @ mix / cols**0.5
    return torch.randn(rows, cols, generator=g), InputStats(x.T @ x, tokens)


def layer_error(weight: Tensor, quantised: Tensor, stats: InputStats) -> float:
    d = (weight - quantised).double()
    return torch.einsum("ri,ij,rj->", d, stats.hessian.double() / stats.tokens, d).item()


@pytest.mark.parametrize("name", INTS)
def test_minmax_grid_is_the_reference(name: str) -> None:
    weight, _ = problem()
    got, want = (
        round_to(weight, minmax_grid(weight, parse_format(name))),
        quantize(weight, parse_format(name)),
    )
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales)
    assert (got.zeros is None) == (want.zeros is None)
    if want.zeros is not None:
        assert torch.equal(got.zeros, want.zeros)


@pytest.mark.parametrize("name", INTS)
def test_searched_grid_is_never_worse_in_any_group(name: str) -> None:
    fmt = parse_format(name)
    weight, _ = problem(cols=150)
    group = fmt.group_size or 150
    for q in (QUANTIZERS["mse"]()(weight, fmt),):
        found, plain = (
            (dequantize(q) - weight).square(),
            (dequantize(quantize(weight, fmt)) - weight).square(),
        )
        for a, b in zip(found.split(group, 1), plain.split(group, 1), strict=True):
            assert (a.sum(1) <= b.sum(1) * (1 + 1e-6)).all()
    if fmt.bits == 2:
        assert found.sum() < 0.95 * plain.sum()


def test_search_weighs_by_importance() -> None:
    weight, _ = problem(cols=64)
    importance = torch.zeros(64)
    importance[5] = 1.0
    fmt = parse_format("int2-channel")
    error = (dequantize(round_to(weight, search_grid(weight, fmt, importance))) - weight)[:, 5].square().sum()
    assert error < (dequantize(round_to(weight, search_grid(weight, fmt))) - weight)[:, 5].square().sum()


def naive_gptq(weight: Tensor, q0, stats: InputStats) -> tuple[Tensor, float]:
    """Textbook: invert the damped Hessian, quantise a column, update, remove it from the Hessian; all in float64."""
    cols = weight.shape[1]
    h = stats.hessian.double() / stats.tokens
    h = h + max(0.01, 1 - stats.tokens / cols) * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    group = q0.format.group_size or cols
    scales = q0.scales.double()[:, torch.arange(cols) // group]
    zeros = torch.full_like(scales, float(1 << (q0.format.bits - 1)))
    if q0.zeros is not None:
        zeros = q0.zeros.double()[:, torch.arange(cols) // group]
    w, codes, loss = weight.double().clone(), torch.empty_like(weight), 0.0
    left = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
    while left:
        i = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        q = ((w[:, i] / scales[:, i]).round() + zeros[:, i]).clamp(0, q0.format.qmax)
        codes[:, i] = q.float()
        err = w[:, i] - (q - zeros[:, i]) * scales[:, i]
        loss += (err**2 / inverse[0, 0]).sum().item()
        w[:, left] -= torch.outer(err, inverse[0] / inverse[0, 0])
        left = left[1:]
    return codes, loss


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("tokens", [400, 30])
def test_gptq_is_the_textbook(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "_BLOCK", 16)
    weight, stats = problem(tokens=tokens)
    quantizer = Gptq(stats)
    got = quantizer(weight, parse_format(name))
    codes, loss = naive_gptq(weight, got, stats)
    # float32 against float64: a value at the middle between two codes may fall either way, and moves what follows.
    assert (got.codes.float() != codes).float().mean() < 0.02
    assert quantizer.loss == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("name", SOME)
def test_gptq_loss_is_the_layer_error_and_beats_rounding(name: str) -> None:
    fmt = parse_format(name)
    weight, stats = problem(tokens=4000)
    quantizer = Gptq(stats)
    got = dequantize(quantizer(weight, fmt))
    h = stats.hessian / stats.tokens
    damped = InputStats((h + 0.01 * h.diagonal().mean() * torch.eye(75)) * stats.tokens, stats.tokens)
    assert quantizer.loss == pytest.approx(layer_error(weight, got, damped), rel=1e-3)
    for other in ("rtn", "mse"):
        assert layer_error(weight, got, stats) < 0.9 * layer_error(
            weight, dequantize(QUANTIZERS[other](stats)(weight, fmt)), stats
        )


def test_an_expert_nobody_chose_is_rounded() -> None:
    weight, _ = problem()
    fmt = parse_format("int3-g32")
    never = InputStats(torch.zeros(75, 75), 0)
    want = QUANTIZERS["mse"]()(weight, fmt)
    for stats in (never, None):
        assert torch.equal(Gptq(stats)(weight, fmt).codes, want.codes)
    assert torch.isfinite(dequantize(Gptq(InputStats(torch.zeros(75, 75), 5))(weight, fmt))).all()


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_rows_are_independent_so_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitatlas.kernels.packed import matrix

    weight, stats = problem()
    fmt = parse_format("int3-g32")
    whole = PackedMatrix(fmt, *weight.shape, pack_weight(weight, fmt, QUANTIZERS[name](stats))).dequantize()
    monkeypatch.setattr(matrix, "_BLOCK_WEIGHTS", 300)
    blocks = PackedMatrix(fmt, *weight.shape, pack_weight(weight, fmt, QUANTIZERS[name](stats))).dequantize()
    assert (whole != blocks).float().mean() < 0.01


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_conformance(name: str) -> None:
    kind = get_quantizer(name)
    assert name == kind.NAME
    assert kind.TITLE
    assert kind.SOURCE
    _, stats = problem()
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(2, 75)
        weight[1, 3] = bad
        with pytest.raises(UserError, match="NaN or Inf"):
            kind(stats)(weight, parse_format("int4-g32"))
    with pytest.raises(UserError, match="as they are"):
        kind(stats)(torch.ones(2, 75), parse_format("bf16"))
    zero = kind(stats)(torch.zeros(2, 75), parse_format("int4-g32"))
    assert torch.equal(dequantize(zero), torch.zeros(2, 75))


def test_an_unknown_quantizer_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="rtn, mse, gptq"):
        get_quantizer("magic")
