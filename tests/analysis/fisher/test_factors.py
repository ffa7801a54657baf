"""Both ends of every product against the gradients of the weights; K-FAC's trace against the written-out formula."""

from __future__ import annotations

import pytest
import torch

from bitatlas.analysis.fisher.factors import FactorPass, Factors, Moment, basis_of, kfac_values
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.products import watch_products


@pytest.mark.parametrize("family", ["llama_tied", "phi3", "gpt2", "qwen2_moe", "gpt_oss", "llama4"])
def test_products_add_up_to_the_gradient_of_the_weight(tiny_checkpoint, family):
    """Fused halves, transposed and interleaved experts, a tied embedding: sum of d x^T is the weight's gradient."""
    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    keys = loaded.index.unit_keys()
    ids = torch.arange(9) * 7 + 1  # no padding token, whose row gets no gradient
    v = torch.randn(9, loaded.index.vocab_size, generator=torch.Generator().manual_seed(0))
    with loaded.requires_grad(keys) as params, torch.enable_grad():
        logits = loaded.logits(ids[None])[0]
        grads = torch.autograd.grad(logits, params, v[:, : logits.shape[1]], materialize_grads=True)
    of = {id(p): g for p, g in zip(params, grads)}
    seen: dict[str, torch.Tensor] = {}
    found = {k: torch.zeros(loaded.handle(k).get().shape) for k in keys}

    def on_input(units, x):
        seen.update({(u, x.is_floating_point()): x for u in units})

    def on_output(unit, delta, lookup):
        x = seen[unit, not lookup]
        if lookup:
            found[unit].index_add_(0, x, delta)
        else:
            found[unit] += delta.T @ x

    with torch.enable_grad(), watch_products(loaded, keys, on_input, on_output):
        again = loaded.logits(ids[None])[0]
        torch.testing.assert_close(again, logits.detach(), rtol=1e-4, atol=1e-5)
        again.backward(v[:, : logits.shape[1]])
    for k in keys:
        handle = loaded.handle(k)
        want = handle.view(of[id(handle.param)])
        torch.testing.assert_close(found[k], want, rtol=1e-3, atol=1e-5, msg=k)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())


def moment(x, buckets, widest=99, sketch=8):
    m = Moment(x.shape[1], widest, sketch, buckets, torch.device("cpu"))
    for i, row in enumerate(x):
        m.add(row[None], i % buckets, i)
    return m


@pytest.mark.parametrize("widest", [99, 6, 0])
def test_trace_and_its_buckets_equal_the_formula(widest):
    """Dense, one side mixed, both sides mixed; the mixtures' own moments stand in for the exact ones."""
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(40, 5, generator=g), torch.randn(40, 7, generator=g)
    error = torch.randn(7, 5, generator=g)
    f = Factors(inputs=moment(x, 4, widest), outputs=moment(d, 4, widest))

    def whole(m, b):
        k = m.kept[b].double()
        return k if m.dense else k.T @ k

    a = [whole(f.inputs, b) for b in range(4)]
    gs = [whole(f.outputs, b) for b in range(4)]
    e = error.double()
    if widest == 99:
        torch.testing.assert_close(sum(a), (x.T @ x).double(), rtol=1e-5, atol=1e-5)

    def trace(g_sum, a_mean):
        return float(torch.trace(g_sum @ e @ a_mean @ e.T))

    def value(weights):
        n = sum(w * 10 for w in weights)
        return trace(sum(w * x for w, x in zip(weights, gs)), sum(w * x for w, x in zip(weights, a)) / n)

    def mixtures(
        weights,
    ):  # all buckets of a mixed side are mixed together, which is the same in expectation only
        return value(weights)

    got = kfac_values(f, error)
    assert float(got.sum()) == pytest.approx(value([1.0] * 4), rel=1e-4)
    for b in range(4):
        bumped = [1.0] * 4
        bumped[b] += 1e-4
        slope = (value(bumped) - value([1.0] * 4)) / 1e-4
        assert float(got[b]) == pytest.approx(slope, rel=2e-2, abs=1e-2 * abs(float(got.sum())))


def test_mixtures_are_unbiased():
    g = torch.Generator().manual_seed(2)
    x, error = torch.randn(30, 12, generator=g), torch.randn(12, 4, generator=g)
    m = Moment(12, 4, 4000, 1, torch.device("cpu"))
    m.add(x, 0, 7)
    mixed = float(((m.kept[0] @ error) ** 2).sum())
    assert mixed == pytest.approx(float(((x @ error) ** 2).sum()), rel=0.1)


def test_a_lookup_counts_its_rows():
    g = torch.Generator().manual_seed(3)
    counts = torch.tensor([[3.0, 0, 1], [0, 2.0, 4]], dtype=torch.float64)
    d, error = torch.randn(10, 4, generator=g), torch.randn(3, 4, generator=g)
    f = Factors(counts=counts, lookup_outputs=moment(d, 2))
    got = kfac_values(f, error)
    gram = (d.T @ d).double()
    e = error.double()
    want = sum(float(counts[:, v].sum() / 10 * (e[v] @ gram @ e[v])) for v in range(3))
    assert float(got.sum()) == pytest.approx(want, rel=1e-5)


def test_moments_of_experts_and_shared_inputs(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("qwen2_moe")))
    units = loaded.index.units
    passes = FactorPass(loaded, [u.key for u in units], "signs", widest=64, sketch=5, buckets=2)
    ids = torch.arange(11) * 9
    routed: dict[str, int] = {}
    inputs: dict[str, torch.Tensor] = {}

    def count(key, x, token, weight):
        routed[key], inputs[key] = len(token), x.clone()

    with loaded.capture(count):
        loaded.logits(ids[None])
    passes.run(ids, [3, 4], 1)
    assert passes.tokens.tolist() == [0.0, 22.0]
    for u in units:
        f = passes.factors[u.key]
        if u.expert >= 0 and u.key not in routed:
            assert f.inputs is None
            continue
        if u.role == "embed":
            assert f.counts is not None
            assert int(f.counts.sum()) == 11
            continue
        assert f.inputs is not None
        assert f.outputs is not None
        assert int(f.inputs.count.sum()) == routed[u.key]
        assert int(f.outputs.count.sum()) == 2 * routed[u.key]
        torch.testing.assert_close(f.inputs.kept[1], inputs[u.key].T @ inputs[u.key], rtol=1e-4, atol=1e-5)
    by_role = {u.role: passes.factors[u.key] for u in units if u.layer == 0}
    assert by_role["q"].inputs is by_role["k"].inputs is by_role["v"].inputs
    assert by_role["q"].inputs is not by_role["o"].inputs
    head = next(passes.factors[u.key] for u in units if u.role == "head")
    assert head.outputs is not None
    assert head.outputs.kept.shape == (2, 5, loaded.index.vocab_size)
    left, right = basis_of(head)
    assert left is None
    assert right is not None
    second = right.T @ head.inputs.total() @ right
    torch.testing.assert_close(second, torch.diag(second.diagonal()), rtol=1e-3, atol=1e-3)
