"""The measuring rule: how many copies rotate, how many samples are taken, and that contestants take turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpu_timing import Contestant, Machine, Timing, measure

H100 = Machine("H100", "cpu", cache=50 << 20, memory=64 << 30)


@pytest.mark.parametrize("nbytes", [1, 1 << 20, 17 << 20, 134 << 20])
def test_64_copies_or_more_and_more_than_four_times_the_cache(nbytes: int) -> None:
    copies = H100.copies(nbytes, 4)
    assert copies >= 64
    assert copies * nbytes > 4 * H100.cache


def test_fewer_copies_only_where_64_do_not_fit() -> None:
    copies = H100.copies(1 << 30, 4)
    assert copies == 16
    assert copies * (1 << 30) > 4 * H100.cache
    with pytest.raises(MemoryError):
        H100.copies(20 << 30, 4)


def test_contestants_take_turns_and_every_copy_is_used() -> None:
    seen: list[tuple[str, int]] = []
    machine = replace(H100, samples=200)
    crowd = {n: Contestant(lambda i, n=n: seen.append((n, i)), 3, 1) for n in "ab"}
    times = measure(machine, crowd)
    turn = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert seen == turn * 200
    assert all(t.samples == 200 for t in times.values())


def test_percentiles() -> None:
    t = Timing.of([float(x) for x in range(101)])
    assert (t.p20, t.p50, t.p80, t.samples) == (20, 50, 80, 101)
    assert Timing.of([3.0]) == Timing(3, 3, 3, 1)
