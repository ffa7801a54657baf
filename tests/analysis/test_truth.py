"""Whole allocations measured from kept distributions equal two plain forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import KlReference, token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.trust import decode_choice, encode_choice
from bitatlas.analysis.truth import AllocationTruth
from bitatlas.kernels.formats import expand_formats
from bitatlas.kernels.reference import quantize_dequantize


def test_one_exponential_is_enough():
    generator = torch.Generator().manual_seed(0)
    p = 4 * torch.randn((3, 7, 301), generator=generator)
    for scale in (1e-3, 0.1, 3.0):
        q = p + scale * torch.randn(p.shape, generator=generator) + 5.0
        exact = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
        want = (exact[0].exp() * (exact[0] - exact[1])).sum(-1)
        torch.testing.assert_close(KlReference(p).kl(q, chunk=4), want, rtol=1e-3, atol=1e-9)
    assert float(KlReference(p).kl(p).abs().max()) < 1e-11


def test_ratios_beyond_the_float_range_are_clamped():
    p = torch.zeros(1, 5)
    p[0, 0] = -200.0
    q = torch.zeros(1, 5)
    q[0, 0] = 100.0
    torch.testing.assert_close(KlReference(p).kl(q), token_kl(p, q), rtol=1e-4, atol=0)
    assert torch.isfinite(KlReference(p).kl(q)).all()


@pytest.mark.parametrize("cache_gib", [4.0, 0.0])
def test_whole_allocations(tiny_checkpoint, cache_gib):
    index = index_model(tiny_checkpoint("qwen3_moe"))
    loaded = LoadedModel.open(index)
    formats = expand_formats("int2-g32,int4-g32,bf16")
    tokens = np.random.default_rng(0).integers(0, 250, (5, 11))
    truth = AllocationTruth(loaded, index.unit_keys(), formats, tokens, batch_tokens=24, cache_gib=cache_gib)
    before = {u: loaded.handle(u).get().clone() for u in index.unit_keys()}
    choices = np.random.default_rng(1).integers(0, 3, (2, len(index.units)))
    original = torch.log_softmax(loaded.logits(torch.from_numpy(tokens)).double(), -1)
    for choice in choices:
        weights = {u: quantize_dequantize(before[u], formats[f]) for u, f in zip(before, choice)}
        with loaded.swapped(weights):
            q = torch.log_softmax(loaded.logits(torch.from_numpy(tokens)).double(), -1)
        want = (original.exp() * (original - q)).sum(-1).mean(1)
        np.testing.assert_allclose(truth.kl(choice), want.numpy(), rtol=1e-3, atol=1e-9)
    assert all(torch.equal(loaded.handle(u).get(), w) for u, w in before.items())
    assert 0 <= truth.noise() < 1e-9
    np.testing.assert_array_equal(decode_choice(encode_choice(choices[0])), choices[0])
