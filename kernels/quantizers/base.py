"""The contract of a quantiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import Quantized

__all__ = ["InputStats", "Quantizer"]


@dataclass(frozen=True, slots=True)
class InputStats:
    """What is known of a unit's inputs.

    Attributes:
        hessian: (cols, cols) float32, sum over tokens of x xᵀ.
        tokens: how many tokens were summed; 0 for an expert that was never chosen.
    """

    hessian: Tensor
    tokens: int

    @property
    def mean_square(self) -> Tensor:
        """(cols,) mean square of each input; NaN without tokens."""
        return self.hessian.diagonal() / (self.tokens or float("nan"))

    def scaled(self, scale: Tensor) -> InputStats:
        """The same of x / ``scale`` (cols,)."""
        return InputStats(self.hessian / torch.outer(scale, scale).to(self.hessian), self.tokens)


class Quantizer(ABC):
    """Codes for one unit. Made anew for every unit; may be called on blocks of its rows, in any order."""

    NAME: ClassVar[str]  # = file name
    TITLE: ClassVar[str]
    SOURCE: ClassVar[str]
    NEEDS_INPUTS: ClassVar[bool] = False  # calibration text has to be run through the model
    TAKES_INPUTS: ClassVar[bool] = False  # calibration text is used where there is one
    FOLDS: ClassVar[bool] = False  # scales are folded into the layers before, see `analysis.folding`

    def __init__(self, inputs: InputStats | None = None) -> None:
        self.inputs = inputs
        # The largest |w| of the whole unit, from whoever hands over its rows in blocks: for one scale per tensor.
        self.largest: Tensor | None = None
        self.loss: float | None = (
            None  # the layer's output error per token so far, where the quantiser knows it
        )

    @classmethod
    def takes_stored(cls, fmt: Format) -> bool:
        """Whether 16-bit weights may come as they are stored, unchecked: it sees every one, and refuses NaN and Inf."""
        return False

    @property
    def importance(self) -> Tensor | None:
        """(cols,) mean square of each input, None where nothing is known."""
        return self.inputs.mean_square if self.inputs is not None and self.inputs.tokens else None

    @abstractmethod
    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Quantise rows of the unit, (rows, cols).

        Raises:
            UserError: NaN or Inf in the weight.
        """
