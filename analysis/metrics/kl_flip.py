"""Measured KL of single flips: one unit quantised, everything else original. The truth that other metrics are judged by.

A flip in layer l costs only the blocks from l on (`analysis.prefix`), tested equal to the whole forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitatlas.analysis.calibration import spread
from bitatlas.analysis.divergence import KlReference, token_kl
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.schema import DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.prefix import PrefixRunner, Recording

__all__ = ["KlFlip", "resume_at"]

_STEP_TOKENS = 8192  # forward tokens of one step
_BATCH_TOKENS = 1024


class KlFlip(Metric):
    """KL(original || one unit quantised), nats per token, on the first calibration sequences. ``count`` = sequences.

    Settings:
        flip_sequences: how many sequences; 0 = all.
        flips: how many (unit, format) pairs; 0 = all. Drawn by the seed, as many of each format, spread evenly
            over the units in model order.
        cache_gib: RAM for the recorded run of the original model.
    """

    NAME = "kl_flip"
    TITLE = "Measured KL of single flips"
    UNIT = "nats/token"
    SOURCE = "ZeroQ (Cai et al. 2020), eq. 4: KL with only one layer quantised"
    NEEDS = "forwards"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("kl_flip",)
    VERSION = 2
    SETTINGS: ClassVar = {"flip_sequences": 16, "flips": 0, "cache_gib": 3.0, "quantizer": "rtn"}
    LIMITS: ClassVar = {"flip_sequences": (0, math.inf)}

    def __init__(self) -> None:
        self._state: tuple[MeasureContext, _Originals] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of flips of one layer, ``layer 3 flips 0-7``."""
        if not ctx.formats:
            raise UserError("measured flips need formats", fix="--formats int{2,3,4}-g64")
        per_step = max(1, _STEP_TOKENS // self._tokens(ctx))
        out: list[str] = []
        for layer, pairs in self._pairs(ctx).items():
            for start in range(0, len(pairs), per_step):
                out.append(f"layer {layer} flips {start}-{min(start + per_step, len(pairs)) - 1}")
        return out

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Flips of one layer, as rows."""
        words = key.split()
        layer = int(words[1])
        first, last = (int(n) for n in words[3].split("-"))
        pairs = self._pairs(ctx)[layer][first : last + 1]
        originals = self._originals(ctx)
        kl: list[list[np.ndarray]] = [[] for _ in pairs]
        for recording, reference in originals:
            for i, (unit, f) in enumerate(pairs):
                with ctx.loaded.swapped({unit.key: ctx.candidate(unit, ctx.formats[f])}):
                    logits = originals.runner.resume(recording, resume_at(unit, ctx))
                kl[i].append(reference.kl(logits).mean(1).numpy())
        rows = []
        for (unit, f), batches in zip(pairs, kl):
            each = np.concatenate(batches)  # (sequences,)
            error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")
            rows.append(
                DamageRow(self.NAME, unit.key, ctx.formats[f].name, float(each.mean()), error, len(each),
                          originals.noise)
            )  # fmt: skip
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """A flip in layer l counts for the share of the blocks from l on."""
        pairs = self._pairs(ctx)
        layers = max(ctx.index.n_layers, 1)
        whole = sum(len(p) * (1.0 if layer < 0 else (layers - layer) / layers) for layer, p in pairs.items())
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * ctx.index.params,
            forward_tokens=int(self._tokens(ctx) * (1 + whole)),
            quantised=sum(u.params for p in pairs.values() for u, _ in p),
        )

    def _pairs(self, ctx: MeasureContext) -> dict[int, list[tuple[QuantUnit, int]]]:
        """Layer -> flips (unit, position of the format).

        What a flip measures does not hang on the others, so a sample drawn by an older rule stays as good, and `VERSION`.
        """
        units, formats = ctx.index.units, range(len(ctx.formats))
        every = [(unit, f) for unit in units for f in formats]
        wanted = int(self.option(ctx, "flips"))
        if 0 < wanted < len(every):
            rng = ctx.rng("kl_flip", "flips")
            shares = wanted // len(formats) + (np.arange(len(formats)) < wanted % len(formats))
            chosen = {
                (units[u].key, f)
                for f, share in enumerate(shares.tolist())
                for u in spread(len(units), share, rng).tolist()
            }
            every = [(unit, f) for unit, f in every if (unit.key, f) in chosen]
        out: dict[int, list[tuple[QuantUnit, int]]] = {}
        for unit, f in every:
            out.setdefault(unit.layer, []).append((unit, f))
        return out

    def _tokens(self, ctx: MeasureContext) -> int:
        made = ctx.__dict__.get("calibration")
        sequences, length = (
            made.tokens.shape if made is not None else (-(-ctx.tokens // ctx.seq_len), ctx.seq_len)
        )
        wanted = int(self.option(ctx, "flip_sequences"))
        return length * (min(wanted, sequences) if wanted > 0 else sequences)

    def _originals(self, ctx: MeasureContext) -> _Originals:
        if self._state is None or self._state[0] is not ctx:
            from bitatlas.analysis.prefix import PrefixRunner

            wanted = int(self.option(ctx, "flip_sequences"))
            tokens = ctx.calibration.tokens[: wanted if wanted > 0 else None]
            limit = int(float(self.option(ctx, "cache_gib")) * 2**30)
            runner = PrefixRunner(ctx.loaded, ctx.index.n_layers)
            self._state = ctx, _Originals(runner, tokens, limit)
        return self._state[1]


class _Originals:
    """Recorded runs of the original model, batch by batch; kept while they fit into ``limit`` bytes."""

    def __init__(self, runner: PrefixRunner, tokens: np.ndarray, limit: int) -> None:
        self.runner = runner
        size = max(1, _BATCH_TOKENS // tokens.shape[1])
        self._batches = [torch.from_numpy(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self._kept: dict[int, tuple[Recording, KlReference]] = {}
        self._left = limit
        # The floor: the same sequence computed in another batch layout, where only the summation order differs.
        ids = self._batches[0]
        alone = ids[:1] if len(ids) > 1 else ids.expand(2, -1)
        first, again = runner.record(ids), runner.record(alone)
        self.noise = float(token_kl(first.logits[:1], again.logits[:1]).mean())

    def __iter__(self) -> Iterator[tuple[Recording, KlReference]]:
        for i, ids in enumerate(self._batches):
            found = self._kept.get(i)
            if found is None:
                recording = self.runner.record(ids)
                found = recording, KlReference(recording.logits)
                size = recording.nbytes + found[1].nbytes
                if size <= self._left:
                    self._kept[i] = found
                    self._left -= size
            yield found


def resume_at(unit: QuantUnit, ctx: MeasureContext) -> int:
    """First block to compute again: the unit's own; the head alone needs none; an embedding needs all."""
    if unit.layer >= 0:
        return unit.layer
    return ctx.index.n_layers if unit.role == "head" else 0
