"""CKA and CCA: how alike what goes into a block and what comes out of it are, up to a linear map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.prefix import needed_blocks, stream_before, stream_behind
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import sequence_steps, sequences_of

__all__ = ["Cka", "canonical_mean", "linear_cka"]

_STEPS = 8
_MOST = 128
_RANK = 1e-10  # directions with less than this share of the largest variance are noise


class Cka(Metric):
    """Similarity of representations around a block.

        cka = ||C_xy||_F^2 / (||C_xx||_F ||C_yy||_F),   cca = mean singular value of C_xx^-1/2 C_xy C_yy^-1/2

    x: the residual stream into the block, y: out of it, C: covariances over tokens. ``cca_output`` is cca with y = the
    output of the last block. CPTQuant's CMPQ (Nanda et al. 2024) sorts layers by canonical correlation; linear CKA
    (Kornblith et al. 2019, arXiv 1905.00414) is the steadier of the two. 1 means that the block changes nothing
    that a linear map could not undo, so **smaller** is more important. CCA needs about 10 tokens per dimension: wider
    streams are projected on random directions, at most 128 and at most a tenth of the tokens, the same for all blocks,
    for both scores. The values stand at every unit of the block. Standard error: leaving out one step of
    sequences at a time (jackknife). ``count`` is tokens.
    """

    NAME = "cka"
    TITLE = "CKA and CCA"
    UNIT = "similarity"
    SOURCE = "CPTQuant CMPQ (Nanda et al. 2024); Kornblith et al. 2019 (arXiv 1905.00414)"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("cka", "cca", "cca_output")
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """At most eight chunks of sequences: each leaves covariances behind."""
        return sequence_steps(ctx, -(-ctx.sequences // _STEPS) * ctx.seq_len)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Sums over tokens of the L + 1 streams: mean (L+1, p), own (L+1, p, p), next, last (L, p, p), count.

        Raises:
            UserError: the architecture is not a plain stack of blocks.
        """
        first, tokens = sequences_of(ctx, key)
        blocks = needed_blocks(ctx.loaded.model, ctx.index.n_layers)
        sums: dict[str, np.ndarray] = {}
        for one in tokens:
            streams = [s @ _directions(ctx, s.shape[1]) for s in _streams(ctx, blocks, one)]  # (T, p) each
            found = {
                "mean": torch.stack([s.sum(0) for s in streams]),
                "own": torch.stack([s.T @ s for s in streams]),
                "next": torch.stack([x.T @ y for x, y in zip(streams, streams[1:])]),
                "last": torch.stack([y.T @ streams[-1] for y in streams[1:]]),
            }
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.numpy()
        return StepResult(arrays=sums | {"count": np.array([float(tokens.size)])})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Scores from all tokens, and with each step left out."""
        steps = [{n: parts[k][n] for n in ("mean", "own", "next", "last", "count")} for k in self.plan(ctx)]
        total = {name: np.sum([s[name] for s in steps], axis=0) for name in steps[0]}
        values = _scores(total)  # (3, L)
        n = len(steps)
        spread = np.full(values.shape, np.nan)
        if n > 1:
            left = np.stack([_scores({k: total[k] - s[k] for k in total}) for s in steps])
            spread = np.sqrt((n - 1) / n * np.square(left - left.mean(0)).sum(0))
        count = int(total["count"][0])
        return [
            DamageRow(name, u.key, NO_FORMAT, float(values[i, u.layer]), float(spread[i, u.layer]), count)
            for u in ctx.index.units
            if u.layer >= 0
            for i, name in enumerate(self.EMITS)
        ]

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            flops=6.0 * ctx.index.n_layers * ctx.calibration_tokens * _MOST**2,
        )


def _streams(ctx: MeasureContext, blocks: nn.ModuleList, one: np.ndarray) -> list[Tensor]:
    """(T, d) float64 of one sequence: into the first block, then out of each."""
    found: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(stream_before(args, kwargs)[0].double().cpu())

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found.append(stream_behind(out)[0].double().cpu())

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.no_grad():
            ctx.loaded.logits(torch.from_numpy(one[None]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _directions(ctx: MeasureContext, width: int) -> Tensor:
    """(d, p) the directions looked along: all, or random ones where they are too many."""
    p = min(width, _MOST, max(2, ctx.calibration.size // 10))
    if p == width:
        return torch.eye(width, dtype=torch.float64)
    return torch.from_numpy(ctx.rng("cka", width).standard_normal((width, p)) / p**0.5)


def _scores(sums: dict[str, np.ndarray]) -> np.ndarray:
    """(3, L) cka, cca, cca_output."""
    n, mean = float(sums["count"][0]), sums["mean"] / float(sums["count"][0])
    own = sums["own"] / n - mean[:, :, None] * mean[:, None, :]
    following = sums["next"] / n - mean[:-1, :, None] * mean[1:, None, :]
    last = sums["last"] / n - mean[1:, :, None] * mean[-1][None, None, :]
    return np.array(
        [
            [linear_cka(c, own[i], own[i + 1]) for i, c in enumerate(following)],
            [canonical_mean(c, own[i], own[i + 1]) for i, c in enumerate(following)],
            [canonical_mean(c, own[i + 1], own[-1]) for i, c in enumerate(last)],
        ]
    )


def linear_cka(cross: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA from covariances; NaN where a side is constant."""
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.linalg.norm(cross) ** 2) / scale if scale > 0 else float("nan")


def canonical_mean(cross: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Mean canonical correlation from covariances, over the directions in which both sides vary."""
    left, right = _whitener(x), _whitener(y)
    if not left.shape[1] or not right.shape[1]:
        return float("nan")
    found = np.linalg.svd(left.T @ cross @ right, compute_uv=False)
    return float(np.clip(found, 0.0, 1.0).mean())


def _whitener(c: np.ndarray) -> np.ndarray:
    """(p, r): C^-1/2 on the directions with variance."""
    values, vectors = np.linalg.eigh(c)
    kept = values > _RANK * max(float(values[-1]), 0.0)
    return vectors[:, kept] / np.sqrt(values[kept])
