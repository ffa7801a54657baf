"""What a metric is: a plan of restartable steps, their results, and a reduction. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bitatlas.analysis.schema import DamageRow, QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["Cost", "Metric", "Parts", "StepResult", "UnitMetric", "chunks_by_layer", "unknown_rows"]

Parts = Mapping[str, Mapping[str, np.ndarray]]
"""Step key -> the arrays that step left behind; read from disk on access, one at a time."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step found.

    Attributes:
        rows: finished values, if the step can already tell them.
        arrays: what `Metric.finish` needs to reduce, None when it needs nothing.
    """

    rows: list[DamageRow] = field(default_factory=list)
    arrays: dict[str, np.ndarray] | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes, in units that do not depend on the machine.

    Attributes:
        steps: restartable steps.
        bytes_read: checkpoint bytes read.
        forward_tokens, backward_tokens: tokens through the whole model, forwards and backwards.
        flops: matrix arithmetic beside those passes (second moments, decompositions), floating point operations.
        quantised: weights rounded to a format, each format counted.
        seconds: the estimate for this machine, NaN until `cost.estimate` has filled it in.
    """

    steps: int
    bytes_read: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    flops: float = 0.0
    quantised: int = 0
    seconds: float = float("nan")


class Metric(ABC):
    """A damage measure. One file each, named after `NAME`, one line in the table of the package.

    The runner calls `plan` once, `step` for every key (any order, any process, possibly twice after a
    kill), saves what a step returns, and calls `finish` over everything that was saved. A step must
    therefore depend on nothing but ``ctx`` and its key, and draw random numbers from `MeasureContext.rng`.
    """

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    UNIT: ClassVar[str]
    SOURCE: ClassVar[str]
    NEEDS: ClassVar[Literal["weights", "activations", "gradients", "forwards"]]
    ADDITIVE: ClassVar[bool]
    PER_FORMAT: ClassVar[bool]
    EMITS: ClassVar[tuple[str, ...]]
    VERSION: ClassVar[int] = 1
    SUBJECT: ClassVar[Literal["weights", "kv"]] = "weights"
    """What its units are: the checkpoint's, or the layers of the KV cache (`metrics.kv_common`)."""
    SETTINGS: ClassVar[Mapping[str, Any]] = {}
    """Options of this metric with their defaults; JSON-able, part of the run key."""
    LIMITS: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Where an option's default does not tell what it may be: (least, most) of a number, or all words of a text. Else a
    number is at least 0, and a whole number whose default is positive at least 1 (`metrics.settings`)."""

    @abstractmethod
    def plan(self, ctx: MeasureContext) -> list[str]:
        """Step keys: deterministic, unique, some seconds of work each.

        Raises:
            UserError: this metric cannot be measured here (a dense model has no routing).
        """

    @abstractmethod
    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Measures one key of the plan."""

    def step_after(self, ctx: MeasureContext, key: str, parts: Parts) -> StepResult:
        """The same, for a metric whose later steps build on earlier ones: ``parts`` holds those that are done.

        The runner goes through the plan in its order, so that a key may rely on the keys before it.
        """
        return self.step(ctx, key)

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Rows that need all steps together; none by default. ``parts`` holds every key of the plan."""
        return []

    def keep(self, ctx: MeasureContext, parts: Parts) -> dict[str, np.ndarray]:
        """Small arrays that stay with the finished run, in the store and in shipped studies; none by default."""
        return {}

    @abstractmethod
    def cost(self, ctx: MeasureContext) -> Cost:
        """What a run takes; headers and settings only, nothing is loaded."""

    def unit_keys(self, ctx: MeasureContext) -> tuple[str, ...]:
        """Units that the rows may be about."""
        return ctx.index.unit_keys()

    def option(self, ctx: MeasureContext, name: str) -> Any:
        """The value of a setting: the context's, else this metric's default."""
        return ctx.settings.get(name, self.SETTINGS[name])


class UnitMetric(Metric):
    """A metric of the weights alone that looks at one unit after the other.

    It says what one look finds (`look`) and how the looks of a step become one result (`gather`); so several
    such metrics can share each read of a weight (`measure.run_together`). A huge unit is read block by block
    through `MeasureContext.blocks`.
    """

    NEEDS: ClassVar[Literal["weights", "activations", "gradients", "forwards"]] = "weights"

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per layer, more for a large one."""
        return list(chunks_by_layer(ctx.index.units))

    def units_of(self, ctx: MeasureContext, key: str) -> tuple[QuantUnit, ...]:
        """Units of a step, in order; the same for every metric of this kind."""
        return chunks_by_layer(ctx.index.units)[key]

    @abstractmethod
    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Everything about one unit; arrays have a first axis along which those of several units are joined."""

    def gather(self, looks: Sequence[StepResult]) -> StepResult:
        """The step's result: rows behind each other, arrays joined along their first axis."""
        names = (looks[0].arrays or {}) if looks else {}
        arrays = {n: np.concatenate([(look.arrays or {})[n] for look in looks]) for n in names}
        return StepResult([r for look in looks for r in look.rows], arrays or None)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Looks at each unit of the step once."""
        return self.gather([self.look(ctx, u) for u in self.units_of(ctx, key)])


def chunks_by_layer(
    units: Sequence[QuantUnit], max_params: int = 1 << 26
) -> dict[str, tuple[QuantUnit, ...]]:
    """Units in steps: one layer each, cut where a layer holds more than ``max_params`` weights.

    Returns:
        step key (``layer 3``, ``layer 3 part 1``, ``outside the layers``) -> units, in index order.
    """
    layers: dict[int, list[list[QuantUnit]]] = {}
    sizes: dict[int, int] = {}
    for unit in units:
        chunks = layers.setdefault(unit.layer, [[]])
        sizes[unit.layer] = sizes.get(unit.layer, 0) + unit.params
        if sizes[unit.layer] > max_params and chunks[-1]:
            chunks.append([])
            sizes[unit.layer] = unit.params
        chunks[-1].append(unit)
    out: dict[str, tuple[QuantUnit, ...]] = {}
    for layer, chunks in layers.items():
        name = f"layer {layer}" if layer >= 0 else "outside the layers"
        for i, chunk in enumerate(chunks):
            out[name if len(chunks) == 1 else f"{name} part {i}"] = tuple(chunk)
    return out


def unknown_rows(metric: str, unit: str, formats: Iterable[str]) -> list[DamageRow]:
    """Rows that say "not measured" (an expert that no token reached): NaN with count 0."""
    return [DamageRow(metric, unit, fmt, float("nan")) for fmt in formats]
