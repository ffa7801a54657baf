"""Logit-difference Gram: cross-layer terms from forward passes alone.

Every single flip is run once, as in `kl_flip`. With u = ln q - ln p its change of the logits and z = sqrt(p) (u - E_p u), half of
<z, z> per token is the flip's KL to second order and <z_i, z_j> the term by which two flips together differ from their sum. Each u is a
finite difference, so what is not linear inside one flip is in it (2-bit weights, changed routes of experts). z is as long as the
vocabulary times the text, so only a count sketch of it is kept (Charikar et al. 2002): random signs, folded into buckets, which keeps
inner products. `analysis.gram` scores whole allocations from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.gram import pack_flips
from bitatlas.analysis.metrics.base import StepResult
from bitatlas.analysis.metrics.kl_flip import KlFlip, resume_at
from bitatlas.analysis.schema import DamageRow

if TYPE_CHECKING:
    from bitatlas.analysis.divergence import KlReference
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["LogitGram"]


class LogitGram(KlFlip):
    """Half the variance of the logit difference, nats per token. ``count`` = sequences.

    Settings: those of `kl_flip`, and ``sketch``: numbers kept of each sequence for each flip.
    """

    NAME = "logit_gram"
    TITLE = "Logit-difference Gram"
    UNIT = "nats/token"
    SOURCE = "second-order KL in logit form, 1/2 Var_p(u); cross terms of finite differences as in CLADO (Deng et al. 2025), from single flips"
    EMITS = ("logit_gram",)
    VERSION = 1
    SETTINGS: ClassVar = {**KlFlip.SETTINGS, "sketch": 256}

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Flips of one layer: rows, and arrays sketch (flips, R), own (flips,), flips (names), tokens."""
        words = key.split()
        first, last = (int(n) for n in words[3].split("-"))
        pairs = self._pairs(ctx)[int(words[1])][first : last + 1]
        originals, size = self._originals(ctx), int(self.option(ctx, "sketch"))
        sketches: list[list[Tensor]] = [[] for _ in pairs]
        halves: list[list[Tensor]] = [[] for _ in pairs]
        for batch, (recording, reference) in enumerate(originals):
            fold = _Fold(ctx, batch, recording.logits.shape, size)
            for i, (unit, f) in enumerate(pairs):
                with ctx.loaded.swapped({unit.key: ctx.candidate(unit, ctx.formats[f])}):
                    logits = originals.runner.resume(recording, resume_at(unit, ctx))
                sketch, half = fold(reference, logits)
                sketches[i].append(sketch)
                halves[i].append(half)
        rows, own, tokens = [], [], 0
        for (unit, f), parts in zip(pairs, halves):
            each = torch.cat(parts).numpy()  # (S, T)
            tokens = each.size
            mean = each.mean(1)
            error = float(mean.std(ddof=1) / len(mean) ** 0.5) if len(mean) > 1 else float("nan")
            own.append(float(mean.mean()))
            rows.append(DamageRow(self.NAME, unit.key, ctx.formats[f].name, own[-1], error, len(mean), originals.noise))  # fmt: skip
        arrays = {
            "sketch": np.stack([torch.cat(s).reshape(-1).numpy() for s in sketches]), "own": np.array(own), "tokens": np.array(tokens),
            "flips": pack_flips([(unit.key, ctx.formats[f].name) for unit, f in pairs]),
        }  # fmt: skip
        return StepResult(rows, arrays)


class _Fold:
    """Count sketch of a batch of (B, T, V): one row of ``size`` numbers for each sequence, the same for every flip."""

    def __init__(self, ctx: MeasureContext, batch: int, shape: torch.Size, size: int) -> None:
        generator = torch.Generator().manual_seed(ctx.random_seed(LogitGram.NAME, batch))
        self.sequences, self.length, vocab = shape
        self.size = size
        self.signs = torch.randint(0, 2, (vocab,), generator=generator).float() * 2 - 1
        # Each position turns the buckets by its own amount and sign, so that positions with alike z do not add up.
        positions = self.sequences * self.length
        self.sign = torch.randint(0, 2, (positions, 1), generator=generator).float() * 2 - 1
        shift = torch.randint(0, size, (positions, 1), generator=generator)
        self.at = (torch.arange(size)[None] + shift) % size

    def __call__(self, reference: KlReference, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B, size) float32 sketch; (B, T) float64 half of <z, z>."""
        out = torch.empty(self.sequences * self.length, self.size)
        half = torch.empty(self.sequences * self.length, dtype=torch.float64)
        pad = -len(self.signs) % self.size
        for part, z in reference.difference(logits):
            z = z.cpu()
            half[part] = z.square().sum(-1, dtype=torch.float64) / 2
            folded = torch.nn.functional.pad(z * self.signs, (0, pad)).reshape(len(z), -1, self.size).sum(1)
            out[part] = folded.gather(1, self.at[part]) * self.sign[part]
        return out.reshape(self.sequences, self.length, self.size).sum(1), half.reshape(
            self.sequences, self.length
        )
