"""Bytes of the cache counted against tensors, and the rules of the 16-bit window."""

from __future__ import annotations

import pytest
import torch

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv import KV_FORMATS, KvLayout, parse_kv_format, parse_pair
from bitatlas.kernels.kv.quantize import pack_kv, quantize_dequantize_kv, quantize_kv


@pytest.mark.parametrize("name", [n for n in KV_FORMATS if n != "kv16"])
@pytest.mark.parametrize("dim", [6, 24, 64])
def test_packed_bytes_are_those_of_the_tensors_and_decode_to_the_reference(name, dim):
    fmt, block = KV_FORMATS[name], 8
    x = torch.randn(2, 3, 24, dim, generator=torch.Generator().manual_seed(dim)) * 5 + 2
    packed = pack_kv(x, fmt, block)
    assert packed.nbytes == 2 * fmt.packed_bytes(24, 3, dim, block)
    codes, scale, low = quantize_kv(x, fmt, block)
    # Element by element, from the definition.
    for b, h, t, d in [(0, 0, 0, 0), (1, 2, 23, dim - 1), (0, 1, 9, dim // 2)]:
        at = (b, h, t, 0) if fmt.axis == "token" else (b, h, t // block, d)
        group = (
            x[b, h, t] if fmt.axis == "token" else x[b, h, t // block * block : t // block * block + block, d]
        )
        assert low[at] == group.min().half()
        assert float(scale[at]) == pytest.approx(
            float(group.max() - group.min()) / (2**fmt.bits - 1), rel=5e-3
        )
        want = float(codes[b, h, t, d]) * float(scale[at]) + float(low[at])
        assert float(packed.dequantize()[b, h, t, d]) == pytest.approx(want, rel=1e-6)
        assert abs(want - float(x[b, h, t, d])) <= 0.51 * float(scale[at]) + 2e-3 * abs(float(low[at]))


def test_dropping_and_extending_keep_the_values():
    x = torch.randn(1, 2, 16, 10)
    for name in ("kv4-token", "kv2-channel"):
        fmt = parse_kv_format(name)
        whole = pack_kv(x, fmt, 4)
        joined = pack_kv(x[:, :, :8], fmt, 4).extend(pack_kv(x[:, :, 8:], fmt, 4))
        assert torch.equal(joined.dequantize(), whole.dequantize())
        assert torch.equal(joined.drop(8).dequantize(), whole.dequantize()[:, :, 8:])
        assert joined.drop(8).nbytes == fmt.packed_bytes(8, 2, 10, 4)


def test_a_ragged_block_stays_at_16_bits():
    x = torch.randn(1, 1, 11, 6)
    got = quantize_dequantize_kv(x, parse_kv_format("kv2-token"), 4)
    assert torch.equal(got[:, :, 8:], x[:, :, 8:].bfloat16().float())
    assert not torch.equal(got[:, :, :8], x[:, :, :8].bfloat16().float())
    assert torch.equal(quantize_dequantize_kv(x, parse_kv_format("kv16"), 4), x.bfloat16().float())


def test_the_window_moves_in_whole_blocks():
    layout = KvLayout(block=8, residual=5)
    for tokens in range(60):
        packed, plain = layout.split(tokens)
        assert packed % 8 == 0
        assert packed + plain == tokens
        assert plain >= min(tokens, 5)
        assert plain < 5 + 8
        inside, same = layout.split(tokens, window=20)
        assert same == plain
        assert min(tokens, 20) <= inside + plain <= max(20, 13) + 8
    fmt = parse_kv_format("kv4-channel")
    assert layout.layer_bytes(fmt, 40, 2, 16) == 2 * (32 * 16 // 2 + 4 * 16 * 4) + 8 * 2 * 16 * 2
    assert layout.layer_bytes(parse_kv_format("kv16"), 40, 2, 16, window=20) == 20 * 2 * 16 * 2


def test_names():
    assert parse_pair("kv8-channel/kv4-token").name == "kv8-channel/kv4-token"
    assert parse_pair("kv16").v.bits == 16
    with pytest.raises(UserError, match="no KV format"):
        parse_pair("kv3-token")
    with pytest.raises(UserError, match="window"):
        KvLayout(block=0)
