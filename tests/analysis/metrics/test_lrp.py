from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance
from torch import nn

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.lrp import Lrp
from bitatlas.analysis.relevance import linear_rule, relevance_rules
from bitatlas.kernels.errors import UserError


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Lrp, lambda seed: context("mixtral", "int4-g32", seed, tokens=80))


def by_formula(weights, x, epsilon):
    """Relevance at every linear output and at the input of a ReLU network without biases, by the published sum."""
    inputs, z = [], x
    for i, w in enumerate(weights):
        inputs.append(z)
        z = w @ z
        if i + 1 < len(weights):
            z = np.maximum(z, 0)
    r = np.where(np.arange(len(z)) == z.argmax(), z, 0.0)
    found = [r]
    for w, a in zip(weights[::-1], inputs[::-1]):
        z = w @ a
        z = z + np.where(z >= 0, epsilon, -epsilon)
        r = np.array([sum(a[i] * w[j, i] / z[j] * r[j] for j in range(len(z))) for i in range(len(a))])
        found.append(r)
    return found[::-1]


@pytest.mark.parametrize("epsilon", [1e-9, 0.3])
def test_a_small_network_equals_the_formula_and_conserves_relevance(epsilon):
    torch.manual_seed(1)
    layers = [nn.Linear(a, b, bias=False) for a, b in ((7, 9), (9, 6), (6, 5))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()
    found = []
    for layer in layers:
        layer.register_forward_hook(lambda _, a, out: linear_rule(out, epsilon, found.append))
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with relevance_rules(model, 1e-12):
        out = model(x)
        out.max().backward()
    top = float(out.detach().max())
    want = by_formula([m.weight.detach().numpy() for m in layers], x.detach().numpy(), epsilon)
    got = [(x * x.grad).detach().numpy(), *(f.numpy() for f in found[::-1])]
    assert len(got) == len(want) == 4
    for g, w in zip(got, want):
        assert g == pytest.approx(w, rel=1e-6, abs=1e-10)
    if epsilon < 1e-6:
        for g in got:
            assert g.sum() == pytest.approx(top, rel=1e-6)
    else:
        assert abs(got[0].sum()) < abs(top)  # what epsilon swallows


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3"])
def test_relevance_is_conserved_where_the_rules_say_so(context, tmp_path, family):
    with context(family, "int4-g32", tokens=60, settings={"lrp_epsilon": 1e-9}) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(Lrp(), ctx, tmp_path)}
        with torch.no_grad():
            logits = ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        net = {(u.layer, u.expert, u.role): rows["lrp_net", u.key].value for u in ctx.index.units}
        top = float(logits.max(-1).values.double().mean())
        assert net[-1, -1, "head"] == pytest.approx(top, rel=1e-5)
        for (layer, expert, role), value in net.items():
            if role == "down":
                into = net[layer, expert, "gate"] + net[layer, expert, "up"]
                assert into == pytest.approx(value, rel=1e-3, abs=1e-5)
                assert net[layer, expert, "gate"] == pytest.approx(
                    net[layer, expert, "up"], rel=1e-3, abs=1e-5
                )
            elif role == "o":
                # Half of what attention puts out goes to the values; their sums over a row of weights is 1.
                assert net[layer, expert, "v"] == pytest.approx(0.5 * value, rel=1e-3, abs=1e-5)
        # The last block's two branches and the stream before it share out what reaches the final norm.
        assert all(rows["lrp", u.key].value >= abs(rows["lrp_net", u.key].value) for u in ctx.index.units)
        assert ctx.loaded.model.model.layers[0].self_attn.q_proj.weight.grad is None


def test_architectures_without_rules_are_refused(context):
    with context("deepseek_v2") as ctx, pytest.raises(UserError, match="no relevance rule"):
        Lrp().plan(ctx)
