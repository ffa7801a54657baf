"""The packed cache: bytes as counted, values as the reference says, every family generates."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv import KvLayout, parse_pair
from bitatlas.kernels.kv.cache import PackedKvCache, PackedKvLayer, attention_layers
from bitatlas.kernels.kv.quantize import quantize_dequantize_kv

LAYOUT = KvLayout(block=4, residual=3)


def model_of(checkpoints, family, **changes):
    kind, settings = (checkpoints.FAMILIES | checkpoints.MORE)[family]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(settings | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("pair", ["kv4-channel/kv2-token", "kv16/kv8-token", "kv2-token/kv16"])
def test_a_layer_holds_what_the_layout_says(pair):
    formats = parse_pair(pair)
    layer = PackedKvLayer(formats, LAYOUT)
    k, v = torch.randn(2, 3, 21, 10), torch.randn(2, 3, 21, 6)
    seen = 0
    for size in (5, 1, 1, 9, 1, 4):
        new = slice(seen, seen + size)
        keys, values = layer.update(k[:, :, new], v[:, :, new])
        for got, x, fmt in ((keys, k, formats.k), (values, v, formats.v)):
            packed = LAYOUT.packed(seen) if fmt.axis != "none" else 0
            want = torch.cat([quantize_dequantize_kv(x[:, :, :packed], fmt, 4),
                              x[:, :, packed : seen + size].bfloat16().float()], 2)  # fmt: skip
            assert torch.equal(got, want)
        seen += size
        counted = LAYOUT.layer_bytes(formats.k, seen, 3, 10) + LAYOUT.layer_bytes(formats.v, seen, 3, 6)
        assert layer.nbytes == 2 * counted
    assert layer.get_seq_length() == 21
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.update(k[:, :, :1], v[:, :, :1])[0][0, :, 20], k[1, :, 20].bfloat16().float())
    with pytest.raises(RuntimeError, match="cropped"):
        layer.crop(-2)
    layer.reset()
    assert layer.nbytes == 0


def test_a_sliding_layer_lets_go_of_old_blocks():
    formats, window = parse_pair("kv4-channel/kv4-token"), 9
    layer = PackedKvLayer(formats, LAYOUT, window)
    k = torch.randn(1, 2, 40, 8)
    for t in range(40):
        length, offset = layer.get_mask_sizes(1)
        keys, _ = layer.update(k[:, :, t : t + 1], k[:, :, t : t + 1])
        assert (keys.shape[2], offset) == (length, t + 1 - length)
        assert length == min(t + 1, window)
        assert (
            layer.nbytes == 2 * LAYOUT.layer_bytes(formats.k, t + 1, 2, 8, window) or formats.k != formats.v
        )
        counted = sum(LAYOUT.layer_bytes(f, t + 1, 2, 8, window) for f in formats)
        assert layer.nbytes == counted


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "opt", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]
)
def test_every_family_generates_and_8_bits_change_little(checkpoints, family):
    model = model_of(checkpoints, family)
    plain = DynamicCache(config=model.config)
    layers = attention_layers(plain)
    assert len(layers) == (1 if family == "qwen3_next" else model.config.num_hidden_layers)
    ids = torch.randint(1, 250, (2, 30), generator=torch.Generator().manual_seed(3))
    cache = PackedKvCache(model.config, dict.fromkeys(layers, parse_pair("kv8-token/kv8-token")), LAYOUT)
    with torch.no_grad():
        model(ids[:, :25], past_key_values=cache, use_cache=True)
        got = model(ids[:, 25:], past_key_values=cache, use_cache=True).logits
        want = model(ids).logits[:, 25:]
    assert (got - want).abs().max() < 0.05 * want.std()
    assert cache.nbytes > 0
    fresh = PackedKvCache(model.config, dict.fromkeys(layers, parse_pair("kv4-channel/kv2-token")), LAYOUT)
    out = model.generate(
        ids[:1], max_new_tokens=9, min_new_tokens=9, do_sample=False, past_key_values=fresh, pad_token_id=0
    )
    assert out.shape == (1, 39)
    assert fresh.get_seq_length(max(layers)) == 38


def test_a_layer_without_a_cache_is_named(checkpoints):
    model = model_of(checkpoints, "qwen3_next")
    with pytest.raises(UserError, match="layer 0 keeps no K/V"):
        PackedKvCache(model.config, {0: parse_pair("kv4-token")})
