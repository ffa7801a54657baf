from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import part_path, run_metric
from bitatlas.analysis.metrics.slim_salience import SlimSalience, group_bits, group_salience
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(SlimSalience, lambda seed: context("mixtral", "int2-g32,bf16", seed))


def test_salience_equals_the_naive_one_and_stays_as_arrays(context, tmp_path):
    with context("mixtral", "int2-channel") as ctx:
        metric = SlimSalience()
        run_metric(metric, ctx, tmp_path)
        arrays = {}
        for key in metric.plan(ctx):
            with np.load(part_path(tmp_path, key)) as part:
                arrays |= {n: part[n] for n in part.files}
        seen = {}
        with torch.no_grad(), ctx.loaded.capture(lambda k, x, t, w: seen.update({k: x.double().numpy()})):
            ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        for u in ctx.index.units:
            if u.key not in seen:
                continue
            x, w = seen[u.key], ctx.reader.get(u).double().numpy()
            h = x.T @ x / len(x)
            h += 0.01 * np.trace(h) / len(h) * np.eye(len(h))
            # U_jj^2 is one over what is left of x_j after a fit on the columns behind it: no inverse of the whole.
            want = 0.0
            for j in range(len(h)):
                rest = np.arange(j + 1, len(h))
                left = h[j, j] - h[j, rest] @ np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j]) if len(rest) else h[j, j]  # fmt: skip
                want += np.square(w[:, j]).sum() * 1.0 / (1.0 / left)
            (got,) = arrays[f"salience/{u.key}/{u.cols}"]
            assert got == pytest.approx(want, rel=1e-4)
            assert arrays[f"bits/{u.key}/int2-channel"].tolist() == [2]


def naive_split(w, x, salience, size, fmt):
    """Every k built from scratch: (k, KL) in double precision."""
    order = np.argsort(salience, kind="stable")
    found = []
    for k in range(len(order) // 2):
        bits = np.full(len(order), fmt.bits)
        bits[order[:k]] -= 1
        bits[order[len(order) - k :]] += 1
        q = torch.cat(
            [quantize_dequantize(part, replace(fmt, bits=int(b))) for part, b in zip(w.split(size, 1), bits)],
            1,
        )
        p, r = (torch.softmax(x.double() @ m.double().T, -1).clamp_min(1e-6) for m in (q, w))
        found.append(float((p * (p / r).log()).sum(-1).mean()))
    return found


def test_the_double_pointer_equals_trying_every_split():
    torch.manual_seed(3)
    w, x = torch.randn(30, 7 * 32 + 9), torch.randn(40, 7 * 32 + 9)
    w[:, 64:96] *= 4.0
    x[:, 96:128] *= 0.1
    fmt = parse_format("int2-g32")
    salience = group_salience((w.square().sum(0) * x.square().mean(0)).double(), 32)
    assert len(salience) == 8
    best = group_bits(w, x, salience, 32, fmt)
    want = naive_split(w, x, salience.numpy(), 32, fmt)
    assert len(want) == 4
    assert best.uniform == pytest.approx(want[0], rel=1e-4)
    assert best.kl == pytest.approx(min(want[1:]), rel=1e-4)
    assert best.raised == 1 + int(np.argmin(want[1:]))
    assert best.kl < best.uniform
    assert best.bits.mean() == 2
    assert best.bits[2] == 3
    assert best.bits[3] == 1


def test_fewer_than_four_groups_stay_uniform():
    w, x = torch.randn(5, 70), torch.randn(6, 70)
    best = group_bits(w, x, torch.tensor([3.0, 1.0, 2.0]), 32, parse_format("int3-g32"))
    assert best.raised == 0
    assert best.kl == best.uniform > 0
    assert best.bits.tolist() == [3, 3, 3]
