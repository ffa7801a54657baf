"""The measuring rule for GPU kernels: contestants replayed from CUDA graphs in turn, weights rotating, the median of 200.

A graph holds one call for each copy of a contestant's weights. There are 64 copies or more, together more than four times
the level-2 cache; fewer only where 64 do not fit into memory. A sample is one replay over its calls, so that the launch of
the graph is spread over all of them. `Machine.dry` has the
same contestants run on the CPU, once, to know that they do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Contestant", "Machine", "Run", "Timing", "measure"]

Run = Callable[[int], Any]
"""Does the work with the copy of this number."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to time: its run, its copies, and the bytes that one call has to read or write."""

    run: Run
    copies: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: 20th, 50th and 80th percentile of the samples."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """From microseconds."""
        cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
        return cls(cuts[1], statistics.median(samples), cuts[7], len(samples))


@dataclass(frozen=True, slots=True)
class Machine:
    """What is measured on.

    Attributes:
        name: of the GPU; device: ``cuda`` or ``cpu``.
        cache: bytes of the level-2 cache; memory: bytes that all contestants of a case may take.
        least: copies at least; samples: replays of each contestant.
    """

    name: str
    device: str
    cache: int
    memory: int
    least: int = 64
    samples: int = 200

    @classmethod
    def gpu(cls, samples: int = 200) -> Machine:
        """The first GPU."""
        about = torch.cuda.get_device_properties(0)
        return cls(about.name, "cuda", about.L2_cache_size, about.total_memory * 4 // 5, samples=samples)

    @classmethod
    def dry(cls) -> Machine:
        """The CPU and Triton's interpreter; its times mean nothing."""
        return cls("dry", "cpu", 1, 1 << 30, least=2, samples=1)

    def copies(self, nbytes: int, contestants: int) -> int:
        """How many copies of ``nbytes`` one of so many contestants rotates.

        Raises:
            MemoryError: what is needed to get past the cache does not fit.
        """
        needed = max(4 * self.cache // max(nbytes, 1) + 1, 2)
        room = self.memory // contestants // max(nbytes, 1)
        if room < needed:
            raise MemoryError(f"{needed} copies of {nbytes} bytes are needed, {room} fit")
        return min(max(self.least, needed), room)

    def clock(self, one: Contestant) -> Callable[[], float]:
        """A function that takes one sample: microseconds of a call, the mean over the copies."""
        return _graph_clock(one) if self.device == "cuda" else _plain_clock(one)


def _plain_clock(one: Contestant) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for i in range(one.copies):
            one.run(i)
        return (time.perf_counter() - start) * 1e6 / one.copies

    return sample


def _graph_clock(one: Contestant) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(one.copies, 3)):
            one.run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(one.copies):
            one.run(i)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / one.copies

    return sample


def measure(machine: Machine, contestants: Mapping[str, Contestant]) -> dict[str, Timing]:
    """Time of one call of each contestant, all of them taking turns; the first turn on a GPU only warms up."""
    clocks = {name: machine.clock(one) for name, one in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    warm = 1 if machine.device == "cuda" else 0
    for turn in range(machine.samples + warm):
        for name, sample in clocks.items():
            us = sample()
            if turn >= warm:
                samples[name].append(us)
    return {name: Timing.of(s) for name, s in samples.items()}
