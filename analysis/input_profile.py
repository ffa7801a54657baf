"""How large the inputs of every unit are, sequence by sequence: one pass for all metrics that ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.prefix import decoder_blocks
from bitatlas.analysis.sequences import sequences_of

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["BIN_EDGES", "MASSIVE_FACTOR", "MASSIVE_VALUE", "PROFILE", "input_profile"]

MASSIVE_VALUE = 100.0
MASSIVE_FACTOR = 1000.0
BIN_EDGES = 2.0 ** (np.arange(-60, 49) / 3)
"""(109,) edges of the histogram of |x|: three bins an octave from 1e-6 to 65 536, whatever the model, so that counts add up."""
PROFILE = ("tokens", "mean_top", "mean_variance", "max_variance", "square", "top", "median", "massive")
"""What is kept of the (n, cols) inputs x of a unit in one sequence:

n; mean over channels of max |x|; mean and maximum over channels of the variance over tokens; mean over tokens of
||x||^2; max |x|; median |x|; how many |x| are above 100 and at least 1000 times the median."""


def input_profile(ctx: MeasureContext, key: str) -> dict[str, np.ndarray]:
    """Name of `PROFILE` -> (B, U) float64 of a step of sequences, NaN (0 for counts) where no token came.

    ``stream`` is (B, L): massive values in what every block puts out, NaN where the model is no stack of blocks.
    ``histogram`` is (U, 110) uint32, all sequences of the step together: |x| below, between and from the last of the
    `BIN_EDGES` on (a bin holds its lower edge). Units that share an input (q, k, v) are looked at once. Steps of one
    process that ask again get what was found.
    """
    made: dict[str, dict[str, np.ndarray]] = ctx.scratch.setdefault("input profile", {})
    if key in made:
        return made[key]
    _, tokens = sequences_of(ctx, key)
    position = {u.key: i for i, u in enumerate(ctx.index.units)}
    out = {name: np.full((len(tokens), len(position)), np.nan) for name in PROFILE}
    out["tokens"][:] = 0.0
    out["massive"][:] = 0.0
    histogram = np.zeros((len(position), len(BIN_EDGES) + 1), np.uint32)
    recent: list[tuple[Tensor, tuple[np.ndarray, np.ndarray, np.ndarray]]] = []

    def watch(unit: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        found = next(
            (old for seen, old in recent if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape),
            None,
        )
        if found is None:
            sequence = (token.cpu() // tokens.shape[1]).numpy()
            some = np.unique(sequence)
            rows = np.stack([_describe(x[torch.from_numpy(sequence == s)]) for s in some])
            found = some, rows, _histogram(x)
            recent.append((x, found))
            del recent[:-4]  # holding an input keeps its address from being used again
        for i, name in enumerate(PROFILE):
            out[name][found[0], position[unit]] = found[1][:, i]
        histogram[position[unit]] += found[2]

    out["stream"] = np.full((len(tokens), max(ctx.index.n_layers, 1)), np.nan)
    with torch.no_grad(), ctx.loaded.capture(watch), _stream(ctx, out["stream"]):
        ctx.loaded.logits(torch.from_numpy(tokens))
    made[key] = out | {"histogram": histogram}
    return made[key]


@contextmanager
def _stream(ctx: MeasureContext, found: np.ndarray) -> Iterator[None]:
    """Counts the massive values behind every block into ``found`` (B, L)."""

    def watch(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            y = (out[0] if isinstance(out, tuple) else out).detach().float().abs().flatten(1)  # (B, T d)
            found[:, layer] = _massive(y, y.median(1, keepdim=True).values).sum(1).cpu().numpy()

        return hook

    blocks = decoder_blocks(ctx.loaded.model, ctx.index.n_layers) or ()
    hooks = [m.register_forward_hook(watch(i)) for i, m in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _massive(magnitude: Tensor, median: Tensor) -> Tensor:
    return (magnitude > MASSIVE_VALUE) & (magnitude >= MASSIVE_FACTOR * median)


def _histogram(x: Tensor) -> np.ndarray:
    """(110,) uint32 counts of |x| by `BIN_EDGES`."""
    edges = torch.from_numpy(BIN_EDGES).to(x.device, torch.float32)
    bins = torch.bucketize(x.float().abs().flatten(), edges, right=True)
    return torch.bincount(bins, minlength=len(BIN_EDGES) + 1).cpu().numpy().astype(np.uint32)


def _describe(x: Tensor) -> np.ndarray:
    """The values of `PROFILE` for (n, cols) inputs."""
    x = x.float()
    magnitude = x.abs()
    variance = x.var(0, correction=0)
    median = magnitude.median()
    return np.array([
        len(x), float(magnitude.amax(0).mean()), float(variance.mean()), float(variance.max()),
        float(x.square().sum(dtype=torch.float64)) / len(x), float(magnitude.max()), float(median),
        float(_massive(magnitude, median).sum()),
    ])  # fmt: skip
