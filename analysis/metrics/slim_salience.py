"""SliM-LLM: which groups of columns carry a unit, and what moving bits between them gains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.capture import layer_groups
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.activation_error import InputMoments, collect_moments
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, unknown_rows
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["GroupBits", "SlimSalience", "group_bits", "group_salience", "output_kl"]

_DAMPING = 0.01
_GROUP = 128  # where the format has one scale a row
_FLOOR = 1e-6


class SlimSalience(Metric):
    """Salience of groups of input columns, and the damage left when bits go where it is.

        S_g = sum over rows i and columns j of group g of w_ij^2 / U_jj^2,   H'^-1 = U^T U
        slim_salience(b) = min over k of KL(softmax(y_k) || softmax(y)),   k = 1 .. groups/2 - 1

    SliM-LLM (arXiv 2405.14917), salience-determined bit allocation, as its code does it. y_k: the unit's outputs
    with the k least salient groups at b - 1 bits and the k most salient ones at b + 1, rounded to nearest, so that
    the average stays b; the KL is over output features, mean over up to ``slim_tokens`` calibration tokens, clamped at
    1e-6 as in the code. ``slim_uniform`` is the same KL with all groups at b, which the method never considers;
    ``slim_raised`` = k / groups at the minimum, 0 and the uniform KL where a unit has fewer than 4 groups or the
    format is a cast. ``slim_concentration`` = max_g S_g / mean_g S_g in the format's own groups of the first format.

    The groups' saliences stay in the step's arrays as ``salience/UNIT/GROUP_SIZE``, their bits as ``bits/UNIT/FORMAT``.
    H' is H = sum x x^T / n plus 0.01 of its mean diagonal. Looked-up embeddings and unreached experts are unknown.
    """

    NAME = "slim_salience"
    TITLE = "SliM-LLM group salience"
    UNIT = "nats over output features"
    SOURCE = "SliM-LLM (arXiv 2405.14917), salience-determined bit allocation"
    NEEDS = "activations"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = ("slim_salience", "slim_uniform", "slim_raised", "slim_concentration")
    VERSION = 1
    SETTINGS = {"moment_bytes": 1 << 30, "batch_tokens": 2048, "slim_tokens": 256}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Groups of layers whose second moments fit into ``moment_bytes``."""
        return list(layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes"))))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """One pass over the text for a group of layers, then every unit in every format and every k."""
        units = layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes")))[key]
        share = int(self.option(ctx, "slim_tokens")) / max(ctx.calibration.size, 1)
        length = ctx.calibration.tokens.shape[1]
        samples: dict[str, list[Tensor]] = {}

        def sample(unit: str, x: Tensor, sequence: np.ndarray, weight: Tensor | None) -> None:
            batch = length * len(np.unique(sequence))  # tokens of the batch that reached the unit's block
            wanted = min(len(x), max(1, round(share * batch)))
            samples.setdefault(unit, []).append(x[torch.linspace(0, len(x) - 1, wanted).long()].float())

        sketches = {u.key: torch.zeros(u.cols, 1) for u in units}
        batch_tokens = int(self.option(ctx, "batch_tokens"))
        moments = collect_moments(ctx, units, sketches, False, batch_tokens, also=sample)
        owner = {id(m): key for key, m in moments.items()}
        rows: list[DamageRow] = []
        arrays: dict[str, np.ndarray] = {}
        for unit in units:
            found = moments.get(unit.key)
            names = [f.name for f in ctx.formats]
            if found is None or not found.count:
                rows += [r for m in self.EMITS[:3] for r in unknown_rows(m, unit.key, names)]
                rows += unknown_rows(self.EMITS[3], unit.key, [NO_FORMAT])
                continue
            x = torch.cat(samples[owner[id(found.leader or found)]])
            rows += self._rows(ctx, unit, found, x, arrays)
        return StepResult(rows, arrays)

    def _rows(
        self, ctx: MeasureContext, unit: QuantUnit, found: InputMoments, x: Tensor, arrays: dict[str, np.ndarray]
    ) -> list[DamageRow]:  # fmt: skip
        weight = ctx.weight(unit).to(x.device)
        columns = column_salience(weight, found.matrix(), found.count)
        rows = []
        for f, fmt in enumerate(ctx.formats):
            size = min(fmt.group_size or _GROUP, unit.cols)
            salience = group_salience(columns, size)
            arrays[f"salience/{unit.key}/{size}"] = salience.numpy()
            best = group_bits(weight, x, salience, size, fmt)
            arrays[f"bits/{unit.key}/{fmt.name}"] = best.bits
            for name, value, spread in (
                ("slim_salience", best.kl, best.stderr),
                ("slim_uniform", best.uniform, best.uniform_stderr),
                ("slim_raised", best.raised / len(salience), float("nan")),
            ):
                rows.append(DamageRow(name, unit.key, fmt.name, value, spread, found.count))
            if f == 0:
                spiked = float(salience.max() / salience.mean())
                rows.append(DamageRow("slim_concentration", unit.key, NO_FORMAT, spiked, count=found.count))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, a second moment and its inverse per input, every weight rounded at three widths per format."""
        n, units = ctx.calibration_tokens, [u for u in ctx.index.units if u.role != "embed"]
        share = ctx.index.top_k / ctx.index.n_experts if ctx.index.n_experts else 1.0
        gram = sum(2.0 * n * u.cols**2 * (share if u.expert >= 0 else 1) + 3.0 * u.cols**3 for u in units)
        sampled = min(n, int(self.option(ctx, "slim_tokens")))
        outputs = sum(6.0 * sampled * u.params for u in units) * len(ctx.formats)
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=n,
            flops=gram + outputs,
            quantised=3 * sum(u.params for u in units) * len(ctx.formats),
        )


def column_salience(weight: Tensor, second: Tensor, count: int) -> Tensor:
    """(cols,) float64: sum over rows of w^2 / U_jj^2 from the sum of x x^T over ``count`` tokens."""
    h = second.double().cpu() / count
    mean = float(h.diagonal().mean())
    h.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True).diagonal()  # U_jj
    return weight.double().cpu().square().sum(0) / factor.square()


def group_salience(columns: Tensor, size: int) -> Tensor:
    """(groups,) sums of the columns' salience; the last group may be ragged."""
    padded = torch.nn.functional.pad(columns, (0, -len(columns) % size))
    return padded.reshape(-1, size).sum(1)


@dataclass(frozen=True, slots=True)
class GroupBits:
    """The best split of bits over the groups of a unit.

    Attributes:
        bits: (groups,) int16; raised: how many have one more (and as many one less).
        kl, stderr: mean over tokens at the split; uniform, uniform_stderr: with no group moved.
    """

    bits: np.ndarray
    raised: int
    kl: float
    stderr: float
    uniform: float
    uniform_stderr: float


def group_bits(weight: Tensor, x: Tensor, salience: Tensor, size: int, fmt: Format) -> GroupBits:
    """Salience-determined bit allocation: the double pointer over k.

    Args:
        weight: (rows, cols); x: (n, cols) inputs; salience: (groups,).
    """
    y = x @ weight.T  # (n, rows)
    bits = np.full(len(salience), fmt.bits, np.int16)
    moved = quantize_dequantize(weight, fmt)
    output = x @ moved.T
    first = output_kl(output, y)
    uniform = _mean(first)
    best = GroupBits(bits, 0, *uniform, *uniform)
    if fmt.kind != "int" or len(salience) < 4:
        return best
    order = torch.argsort(salience, stable=True).tolist()
    # One rounding per neighbour width; a group's columns are its own in either.
    wide = {step: quantize_dequantize(weight, replace(fmt, bits=fmt.bits + step)) for step in (-1, 1)}
    least = float("inf")
    for k in range(1, len(order) // 2):
        for group, step in ((order[k - 1], -1), (order[-k], 1)):
            at = slice(group * size, (group + 1) * size)
            output = output + x[:, at] @ (wide[step][:, at] - moved[:, at]).T
            bits = bits.copy()
            bits[group] += step
        kl, spread = _mean(output_kl(output, y))
        if kl < least:
            least = kl
            best = GroupBits(bits, k, kl, spread, *uniform)
    return best


def output_kl(quantised: Tensor, original: Tensor) -> Tensor:
    """(n,) KL(softmax(quantised) || softmax(original)) over the features, both clamped at 1e-6 as in the published code."""
    q = torch.softmax(quantised.double(), -1).clamp_min(_FLOOR)
    p = torch.softmax(original.double(), -1).clamp_min(_FLOOR)
    return (q * (q / p).log()).sum(-1)


def _mean(kl: Tensor) -> tuple[float, float]:
    """Mean over tokens and its standard error. The clamp can push a sum of nothing below 0."""
    n = len(kl)
    return max(float(kl.mean()), 0.0), float(kl.std() / n**0.5) if n > 1 else float("nan")
