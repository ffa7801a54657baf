"""The C path of packing against the torch path, bit by bit; for this processor and without its wide instructions."""

from __future__ import annotations

import operator
from functools import reduce

import pytest
import torch

from bitatlas.kernels import cpu_packing, packing

pytestmark = pytest.mark.skipif(cpu_packing.library() is None, reason="no C compiler here")
PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-bmi2")


@pytest.mark.parametrize("flags", [(), PLAIN], ids=["native", "plain"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_torch_bit_by_bit(flags: tuple[str, ...], bits: int) -> None:
    lib = cpu_packing.library(*flags)
    if lib is None:
        pytest.skip("these flags are for x86")
    generator = torch.Generator().manual_seed(bits)
    for rows, cols in ((1, 1), (1, 7), (3, 8), (2, 31), (5, 33), (4, 64), (3, 95), (2, 129), (1, 1025)):
        codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)
        words = packing.packed_words(cols, bits)
        want = packing._pack(codes, bits, words)
        # Words around the result must be left alone, and what was there before must not shine through.
        room = torch.full((rows + 2, words), -1, dtype=torch.int32)
        seen = cpu_packing.pack(codes, bits, room[1:-1], lib)
        assert torch.equal(room[1:-1], want), (rows, cols)
        assert bool((room[[0, -1]] == -1).all())
        assert seen == reduce(operator.or_, codes.flatten().tolist())
        assert torch.equal(cpu_packing.unpack(want, bits, cols, lib), codes)
        assert torch.equal(packing._unpack(want, bits, cols), codes)


def test_rows_apart_and_columns_apart() -> None:
    wide = torch.arange(5 * 40, dtype=torch.uint8).view(5, 40) % 8
    for codes in (wide[:, 3:36], wide.T, wide[2:3, ::2]):
        words = packing.packed_words(codes.shape[1], 3)
        out = torch.empty(codes.shape[0], words, dtype=torch.int32)
        cpu_packing.pack(codes, 3, out)
        assert torch.equal(out, packing._pack(codes, 3, words))


def test_switched_off_is_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.full((2, 9), 8, dtype=torch.uint8)
    assert cpu_packing.available(codes)
    for _ in range(2):
        with pytest.raises(ValueError, match="codes up to 8 do not fit"):
            packing.pack_codes(codes, 3)
        monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    assert not cpu_packing.available(codes)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_seen_anywhere(odd: float) -> None:
    w = torch.randn(37)
    w[:3] = torch.tensor([torch.finfo(torch.float32).max, 1e-45, -0.0])
    assert cpu_packing.finite(w)
    for at in range(37):
        assert not cpu_packing.finite(torch.where(torch.arange(37) == at, odd, w))
    assert cpu_packing.finite(torch.empty(0))
