"""One pass with doubled keys equals decoding token by token through the real packed cache."""

from __future__ import annotations

import pytest
import torch

from bitatlas.analysis.kv.readers import GradientReader, PlanReader
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.kv import KvLayout, parse_pair
from bitatlas.kernels.kv.cache import PackedKvCache, attention_layers

LAYOUT = KvLayout(block=4, residual=3)


def decode(loaded, plan, ids):
    """Logits of every position, one token at a time."""
    cache = PackedKvCache(loaded.model.config, plan, LAYOUT)
    with torch.no_grad():
        steps = [
            loaded.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return torch.cat(steps, 1)


# Soft caps and sinks, sliding windows, learned positions, latent attention, a layer without a cache.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_one_pass_equals_decoding(tiny_checkpoint, family):
    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    ids = torch.randint(1, 250, (2, 27), generator=torch.Generator().manual_seed(5))
    layers = attention_layers(PackedKvCache(loaded.model.config, {}))
    names = ["kv2-channel/kv4-token", "kv4-token/kv2-token"]
    plan = {layer: parse_pair(names[i % 2]) for i, layer in enumerate(layers)}
    plan.pop(next(iter(plan))) if len(plan) > 2 else None
    before = loaded.logits(ids)
    with loaded.cached(PlanReader(plan, LAYOUT)), torch.no_grad():
        got = loaded.logits(ids)
    want = decode(loaded, plan, ids)
    torch.testing.assert_close(got, want.float(), rtol=0, atol=3e-4 * float(want.std()) + 1e-5)
    # Early queries see no packed key; later ones do.
    assert (got - before)[:, LAYOUT.block + LAYOUT.residual + 1 :].abs().max() > 1e-3 * before.std()
    assert torch.equal(loaded.logits(ids), before)


def test_gradients_are_those_of_what_later_queries_read(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    ids = torch.randint(1, 250, (1, 19), generator=torch.Generator().manual_seed(5))
    weight = torch.randn(19, 300, generator=torch.Generator().manual_seed(6)) / 300
    reader = GradientReader(LAYOUT)
    with loaded.cached(reader):
        score = (loaded.logits(ids)[0] * weight).sum()
        score.backward()
    k, v = reader.gradients(1)
    assert torch.count_nonzero(k[0, :, 16:]) == 0  # never packed within 19 tokens
    shift = torch.randn(k.shape, generator=torch.Generator().manual_seed(7))

    class Shifted(PlanReader):
        step = 0.0

        def read(self, layer, k, v):
            return super().read(layer, k, v) if layer != 1 else self.moved(k, v)

        def moved(self, k, v):
            from bitatlas.analysis.kv.tap import KvRead

            return KvRead(k + self.step * shift, v - self.step * shift, k, v)

    ends = []
    for step in (1e-2, -1e-2):
        moved = Shifted({}, LAYOUT)
        moved.step = step
        with loaded.cached(moved), torch.no_grad():
            ends.append(float((loaded.logits(ids)[0] * weight).double().sum()))
    slope = (ends[0] - ends[1]) / 2e-2
    assert float(((k - v) * shift).sum()) == pytest.approx(slope, rel=2e-2)
    reader.clear()
    assert torch.count_nonzero(reader.gradients(1)[0]) == 0
