from __future__ import annotations

import pytest
import torch

from bitatlas.kernels.formats import FORMATS, parse_format
from bitatlas.kernels.packed import matrix as module
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_quantized
from bitatlas.kernels.packed.modules import PackedEmbedding, PackedLinear
from bitatlas.kernels.reference import quantize, quantize_dequantize

_FLOAT = {"bf16": torch.bfloat16, "fp16": torch.float16}


def packed(weight: torch.Tensor, name: str) -> PackedMatrix:
    fmt = parse_format(name)
    tensors = {"weight": weight.to(_FLOAT[name])} if name in _FLOAT else pack_quantized(quantize(weight, fmt))
    return PackedMatrix(fmt, *weight.shape, tensors)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_dequantises_exactly_like_the_reference(name: str) -> None:
    weight = torch.randn(45, 147, generator=torch.Generator().manual_seed(3))
    m, want = packed(weight, name), quantize_dequantize(weight, parse_format(name))
    assert torch.equal(m.dequantize(), want)
    assert torch.equal(m.dequantize(32, 40), want[32:40])
    ids = torch.tensor([44, 0, 7, 7, 31])
    assert torch.equal(m.take_rows(ids), want[ids])
    assert m.nbytes == parse_format(name).payload_bytes(45, 147)


def test_blocks_are_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 1000)  # 32 rows of 30 columns at a time
    weight = torch.randn(101, 30)
    m = packed(weight, "int3-g32")
    blocks = list(m.blocks())
    assert len(blocks) == 4
    assert torch.equal(torch.cat(blocks), m.dequantize())


def test_changing_the_models_dtype_does_not_touch_the_scales() -> None:
    weight = torch.randn(8, 64) * 1e-3
    m = packed(weight, "int4-g32")
    before = m.dequantize()
    assert torch.equal(m.to(torch.bfloat16).dequantize(), before)


def test_linear_and_embedding() -> None:
    weight, bias, x = torch.randn(33, 50), torch.randn(33), torch.randn(2, 5, 50)
    layer = PackedLinear(packed(weight, "int5-channel"), bias)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + bias)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    table = PackedEmbedding(packed(weight, "int6-g32-sym"), torch.float32, scale=torch.tensor(3.0))
    ids = torch.tensor([[1, 32], [0, 1]])
    assert torch.equal(table(ids), table.weight[ids] * 3)
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_wrong_buffers_are_refused() -> None:
    fmt = parse_format("int4-g32")
    tensors = pack_quantized(quantize(torch.randn(4, 64), fmt))
    with pytest.raises(ValueError, match="codes"):
        PackedMatrix(fmt, 5, 64, tensors)
