"""One quantiser for a whole allocation: the packer, verify and the metrics all take their weights from here.

So what verify judges is what is packed: the same statistics, the same folds, the same blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.folding import Fold, Folding, confirmed, exact_scale, find_folds
from bitatlas.analysis.input_stats import InputSource
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import QuantUnit, parse_format
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format
from bitatlas.kernels.packed.matrix import quantised_matrix, quantised_weight
from bitatlas.kernels.quantizers import Quantizer, get_quantizer
from bitatlas.kernels.quantizers.awq import EXPONENTS, channel_scale, output_errors
from bitatlas.kernels.reference import Quantized

__all__ = ["UnitQuantizer", "search_folding"]

Weight = Callable[[QuantUnit], Tensor]


def search_folding(
    loaded: LoadedModel, source: InputSource, formats: Mapping[str, str], gamma: Callable[[str], Tensor],
    weight: Weight,
) -> Folding:  # fmt: skip
    """AWQ's scale of every fold that the model confirms, for units in the given formats.

    Args:
        loaded: the original model.
        source: statistics of its units' inputs.
        formats: unit key -> format name.
        gamma: kept tensor in its stored dtype, by name.
        weight: a unit's (rows, cols) float32.
    """
    units = {u.key: u for u in loaded.index.units}
    found = []
    for fold in confirmed(loaded, find_folds(loaded.index)):
        scale = _best(fold, units, source, formats, weight)
        if scale is None:
            continue
        touched = (*fold.consumers, *((fold.producer,) if fold.producer else ()))
        if any(parse_format(formats[u]).kind == "float" for u in touched):
            # Weights that are stored as they are stay exact under powers of two, and only then.
            scale = torch.exp2(scale.log2().round())
        found.append((fold, exact_scale(fold, scale, gamma(fold.gamma) if fold.gamma else None)))
    return Folding(found)


def _best(
    fold: Fold, units: Mapping[str, QuantUnit], source: InputSource, formats: Mapping[str, str], weight: Weight
) -> Tensor | None:  # fmt: skip
    """(size,) scale with the least error, None where nothing is rounded or no token came by."""
    parts = [(units[u], parse_format(formats[u])) for u in fold.consumers]
    parts = [(u, fmt) for u, fmt in parts if fmt.kind != "float"]
    stats = {u.key: source.get(u.key) for u, _ in parts}
    reached = [s for s in stats.values() if s is not None and s.tokens]
    if not reached:
        return None
    total = torch.stack([s.hessian.diagonal() for s in reached]).sum(0) / sum(s.tokens for s in reached)
    scales = [channel_scale(fold.gathered(total), e) for e in EXPONENTS]
    spread = [fold.spread(s) for s in scales]
    errors = np.zeros(len(scales))
    for unit, fmt in parts:
        inputs = stats[unit.key]
        if inputs is not None and inputs.tokens:
            errors += output_errors(weight(unit), fmt, inputs, spread)
    return scales[int(errors.argmin())] if np.isfinite(errors).all() else None


class UnitQuantizer:
    """What units become under one quantiser.

    Args:
        name: in `kernels.quantizers.QUANTIZERS`.
        source: statistics of the units' inputs, for quantisers that need them.
        folding: scales that are folded into the model before rounding.
    """

    def __init__(self, name: str, source: InputSource | None = None, folding: Folding | None = None) -> None:
        self.name, self.kind, self.source = name, get_quantizer(name), source
        self.folding = folding or Folding()
        if self.kind.NEEDS_INPUTS and source is None:
            raise UserError(f"{name} needs a calibration text", found="none was named",
                            fix="--calibration FILE (text or JSONL), or --quantizer mse")  # fmt: skip

    @classmethod
    def over(
        cls, name: str, loaded: LoadedModel, tokens: np.ndarray | None, formats: Mapping[str, str],
        gamma: Callable[[str], Tensor] | None = None, source: InputSource | None = None,
    ) -> UnitQuantizer:  # fmt: skip
        """For an allocation of a model in memory (original weights in place).

        Args:
            tokens: (S, T) calibration tokens, or None.
            formats: unit key -> format name; AWQ's scales depend on them.
            gamma: kept tensors as stored; read from the checkpoint by default.
            source: statistics that are there already.

        Raises:
            UserError: an unknown quantiser, or calibration text is needed and missing.
        """
        kind = get_quantizer(name)
        if tokens is None or not (kind.NEEDS_INPUTS or kind.TAKES_INPUTS):
            return cls(name)
        source = source or InputSource(loaded, tokens, loaded.index.units)
        if not kind.FOLDS:
            return cls(name, source)
        return cls(name, source, _searched(loaded, source, formats, gamma))

    def instance(self, unit: str, fmt: Format) -> Quantizer:
        """The quantiser for one unit, which is to be applied to `prepared` weights."""
        inputs = self.source.get(unit) if self.source is not None and fmt.kind != "float" else None
        columns = self.folding.columns(unit)
        return self.kind(inputs if inputs is None or columns is None else inputs.scaled(columns))

    def prepared(self, unit: str, weight: Tensor) -> Tensor:
        """(rows, cols) weight with the scales folded in."""
        return self.folding.apply(unit, weight)

    def codes(self, unit: str, weight: Tensor, fmt: Format) -> Quantized:
        """What is packed of a (rows, cols) weight, unpacked: for containers other than ours."""
        prepared, one = self._ready(unit, weight, fmt)
        return quantised_matrix(prepared, fmt, one)

    def effective(self, unit: str, weight: Tensor, fmt: Format) -> Tensor:
        """(rows, cols) float32: what stands in for the original weight after packing, folds undone."""
        prepared, one = self._ready(unit, weight, fmt)
        return self.folding.undo(unit, quantised_weight(prepared, fmt, one))

    def _ready(self, unit: str, weight: Tensor, fmt: Format) -> tuple[Tensor, Quantizer]:
        """`prepared`, and the `instance` told what it needs of the whole weight."""
        prepared, one = self.prepared(unit, weight), self.instance(unit, fmt)
        if fmt.per_tensor:
            one.largest = prepared.abs().amax()
        return prepared, one


def _searched(
    loaded: LoadedModel, source: InputSource, formats: Mapping[str, str], gamma: Callable[[str], Tensor] | None
) -> Folding:  # fmt: skip
    def weight(unit: QuantUnit) -> Tensor:
        return loaded.handle(unit.key).get().float().cpu()  # codes are chosen on the CPU, as in packing

    if gamma is not None:
        return search_folding(loaded, source, formats, gamma, weight)
    from bitatlas.analysis.weights import WeightReader

    with WeightReader(loaded.index) as reader:
        return search_folding(loaded, source, formats, reader.kept, weight)
