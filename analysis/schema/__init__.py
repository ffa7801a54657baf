"""The nouns every other folder speaks. Torch-free: solvers, cache, scan and the pages import this alone.

Damage is KL(original || quantised) in nats per token unless a metric says otherwise. Bits per weight are
effective (scales and zeros counted). Budgets are bytes.
"""

from bitatlas.analysis.schema.allocation import (
    ALLOCATION_SCHEMA,
    MEASURED_KL,
    Allocation,
    Budget,
    Frontier,
    null_nan,
    resolve_pins,
)
from bitatlas.analysis.schema.damage import (
    KL_DAMAGES,
    NO_FORMAT,
    SMALL_MATTERS,
    SOLVE_BY_DEFAULT,
    SOLVE_WITH,
    DamageRow,
    Provenance,
    SensitivityTable,
)
from bitatlas.analysis.schema.kv import KV_DAMAGES, KvTable, is_kv_metric, kv_layer, kv_unit
from bitatlas.analysis.schema.model import KeptTensor, KvGeometry, ModelIndex, QuantUnit, TieGroup
from bitatlas.analysis.schema.scores import Objective, Scores, Spent
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import FORMATS, Format, expand_formats, parse_format
from bitatlas.kernels.kv.formats import (
    KV16,
    KV_FORMATS,
    KvFormat,
    KvLayout,
    KvPair,
    parse_kv_format,
    parse_pair,
)

__all__ = [
    "ALLOCATION_SCHEMA",
    "FORMATS",
    "KV16",
    "KL_DAMAGES",
    "KV_DAMAGES",
    "KV_FORMATS",
    "MEASURED_KL",
    "NO_FORMAT",
    "SMALL_MATTERS",
    "SOLVE_BY_DEFAULT",
    "SOLVE_WITH",
    "Allocation",
    "Budget",
    "DamageRow",
    "Format",
    "Frontier",
    "KeptTensor",
    "KvFormat",
    "KvGeometry",
    "KvLayout",
    "KvPair",
    "KvTable",
    "ModelIndex",
    "Objective",
    "Provenance",
    "QuantUnit",
    "Scores",
    "SensitivityTable",
    "Spent",
    "TieGroup",
    "UserError",
    "expand_formats",
    "is_kv_metric",
    "kv_layer",
    "kv_unit",
    "null_nan",
    "parse_format",
    "parse_kv_format",
    "parse_pair",
    "resolve_pins",
]
