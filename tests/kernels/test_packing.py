from __future__ import annotations

import pytest
import torch

from bitatlas.kernels.formats import FORMATS
from bitatlas.kernels.packing import gather_stream, pack_codes, pack_stream, unpack_codes, unpack_stream
from bitatlas.kernels.reference import quantize

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def naive_words(values: list[int], bits: int) -> list[int]:
    """Bit by bit, with Python's own integers; words as signed 32-bit."""
    stream = 0
    for j, value in enumerate(values):
        for bit in range(bits):
            stream |= ((value >> bit) & 1) << (j * bits + bit)
    count = -(-len(values) * bits // 32)
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 32), (5, 33), (4, 64), (1, 95), (7, 129)])
def test_pack_is_the_naive_bit_stream_and_round_trips(bits: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + shape[1])
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    codes[0, -1] = (1 << bits) - 1
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [naive_words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_ones_survive(bits: int) -> None:
    codes = torch.full((2, 67), (1 << bits) - 1, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 67), codes)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind == "int"])
def test_bytes_are_what_the_format_says(name: str) -> None:
    fmt, rows, cols = FORMATS[name], 5, 147
    q = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)), fmt)
    packed = pack_codes(q.codes, fmt.bits)
    assert packed.numel() * 4 == fmt.code_bytes(rows, cols)
    assert q.scales.numel() * 2 == fmt.scale_bytes(rows, cols)
    if q.zeros is None:
        assert fmt.zero_bytes(rows, cols) == 0
    else:
        zeros = pack_stream(q.zeros, fmt.bits)
        assert zeros.numel() * 4 == fmt.zero_bytes(rows, cols)
        assert torch.equal(unpack_stream(zeros, fmt.bits, q.zeros.numel()).view_as(q.zeros), q.zeros)


def test_views_and_empty_matrices() -> None:
    codes = torch.arange(48, dtype=torch.uint8).view(8, 6).T % 8  # not contiguous
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 8), codes)
    column = (
        torch.arange(33, dtype=torch.uint8).view(33, 1).T % 8
    )  # one row of stride 1, "contiguous" as it is
    assert pack_codes(column, 3).tolist() == [naive_words(column[0].tolist(), 3)]
    assert torch.equal(unpack_codes(pack_codes(column, 3), 3, 33), column)
    one = pack_codes(torch.arange(66, dtype=torch.uint8).view(2, 33) % 8, 3)[:1].T.contiguous().T
    assert torch.equal(unpack_codes(one, 3, 33), torch.arange(33, dtype=torch.uint8).view(1, 33) % 8)
    empty = torch.zeros(0, 5, dtype=torch.uint8)
    assert unpack_codes(pack_codes(empty, 3), 3, 5).shape == (0, 5)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        pack_codes(torch.full((1, 3), 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8"):
        pack_codes(torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match="need"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.int32), 3, 5)
    with pytest.raises(ValueError, match="bits"):
        pack_codes(torch.zeros(1, 3, dtype=torch.uint8), 9)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gather_reads_single_values(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (77,), dtype=torch.uint8)
    index = torch.tensor([[0, 76, 5], [31, 32, 33]])
    assert torch.equal(gather_stream(pack_stream(values, bits), bits, index), values[index])
