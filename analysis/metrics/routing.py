"""Routing: how often, and with what weight, the router sends tokens to each expert."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.kernels.errors import UserError

__all__ = ["Routing"]

_BATCH_TOKENS = 2048


class Routing(Metric):
    """Traffic of every routed expert, the same value for each of the expert's units.

        routing_count = tokens sent to the expert, routing_frequency = routing_count / N,
        routing_weight = mean routing weight of those tokens

    The two significance factors of MC-MoE (arXiv 2410.06270, eq. 5: frequency phi and weight w). A count of
    zero is a fact and stays zero; the mean weight of an expert that no token reached is unknown (NaN).
    The standard error is the spread over sequences. Not a damage: it says how far the others can be trusted.
    """

    NAME = "routing_count"
    TITLE = "Expert routing"
    UNIT = "tokens"
    SOURCE = "MC-MoE (arXiv 2410.06270), eq. 5: access frequency and routing weight"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("routing_count", "routing_frequency", "routing_weight")
    VERSION = 1
