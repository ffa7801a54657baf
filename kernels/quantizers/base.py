"""The contract of a quantiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

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


class Quantizer(ABC):
    """Codes for one unit. Made anew for every unit; may be called on blocks of its rows, in any order."""

    NAME: ClassVar[str]  # = file name
    TITLE: ClassVar[str]
    SOURCE: ClassVar[str]
    NEEDS_INPUTS: ClassVar[bool] = False  # calibration text has to be run through the model

    def __init__(self, inputs: InputStats | None = None) -> None:
        self.inputs = inputs

    @abstractmethod
    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Quantise rows of the unit, (rows, cols).

        Raises:
            UserError: NaN or Inf in the weight.
        """
