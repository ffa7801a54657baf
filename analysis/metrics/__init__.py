"""The table of metrics. A new one is a new file here and one line in `METRICS`; its order is the menus' order."""

from __future__ import annotations

import difflib

from bitatlas.analysis.metrics.activation_error import ActivationError
from bitatlas.analysis.metrics.activation_magnitude import ActivationMagnitude
from bitatlas.analysis.metrics.alphaq import AlphaQ
from bitatlas.analysis.metrics.awq_stats import AwqStats
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.metrics.block_influence import BlockInfluence
from bitatlas.analysis.metrics.camera_energy import CameraEnergy
from bitatlas.analysis.metrics.cka import Cka
from bitatlas.analysis.metrics.coactivation import Coactivation
from bitatlas.analysis.metrics.delta_ce import DeltaCe
from bitatlas.analysis.metrics.ekfac import EKFac
from bitatlas.analysis.metrics.expert_error import ExpertError
from bitatlas.analysis.metrics.fisher_diag import FisherDiag
from bitatlas.analysis.metrics.fisher_projection import FisherProjection
from bitatlas.analysis.metrics.gptq_error import GptqError
from bitatlas.analysis.metrics.hawq_eigenvalue import HawqEigenvalue
from bitatlas.analysis.metrics.hawq_trace import HawqTrace
from bitatlas.analysis.metrics.kfac import KFac
from bitatlas.analysis.metrics.kl_flip import KlFlip
from bitatlas.analysis.metrics.kv_error import KvError
from bitatlas.analysis.metrics.kv_fisher import KvFisher
from bitatlas.analysis.metrics.kv_flip import KvFlip
from bitatlas.analysis.metrics.kv_output import KvOutput
from bitatlas.analysis.metrics.lim import Lim
from bitatlas.analysis.metrics.logit_gram import LogitGram
from bitatlas.analysis.metrics.lrp import Lrp
from bitatlas.analysis.metrics.massive_activations import MassiveActivations
from bitatlas.analysis.metrics.mixllm_salience import MixllmSalience
from bitatlas.analysis.metrics.prune import Prune
from bitatlas.analysis.metrics.quantmoe_outlier import QuantMoeOutlier
from bitatlas.analysis.metrics.routing import Routing
from bitatlas.analysis.metrics.slim_salience import SlimSalience
from bitatlas.analysis.metrics.spectral import Spectral
from bitatlas.analysis.metrics.taylor import Taylor
from bitatlas.analysis.metrics.topk_flip import TopkFlip
from bitatlas.analysis.metrics.weight_error import WeightError
from bitatlas.analysis.metrics.zd import Zd
from bitatlas.kernels.errors import UserError

__all__ = ["METRICS", "Cost", "Metric", "StepResult", "get_metric", "metric_of_value"]

_TABLE: tuple[type[Metric], ...] = (
    FisherProjection,
    KlFlip,
    LogitGram,
    FisherDiag,
    KFac,
    EKFac,
    DeltaCe,
    HawqTrace,
    HawqEigenvalue,
    WeightError,
    ActivationError,
    GptqError,
    AwqStats,
    ActivationMagnitude,
    MassiveActivations,
    SlimSalience,
    MixllmSalience,
    Taylor,
    Lrp,
    Prune,
    AlphaQ,
    Spectral,
    QuantMoeOutlier,
    Lim,
    BlockInfluence,
    Cka,
    Zd,
    Routing,
    Coactivation,
    ExpertError,
    CameraEnergy,
    KvOutput,
    KvFisher,
    KvFlip,
    KvError,
    TopkFlip,
)

METRICS: dict[str, type[Metric]] = {metric.NAME: metric for metric in _TABLE}


def get_metric(name: str) -> Metric:
    """A metric, ready to run, by its name or by that of a value it emits.

    Raises:
        UserError: no such metric; the message names the nearest ones.
    """
    wanted = name.strip().lower().replace("-", "_")
    owner = wanted if wanted in METRICS else metric_of_value(wanted)
    if owner:
        return METRICS[owner]()
    near = difflib.get_close_matches(wanted, METRICS, n=3, cutoff=0.4)
    raise UserError(
        f"there is no metric called {name!r}",
        found=f"nearest: {', '.join(near) or 'none'}",
        fix=f"one of {', '.join(METRICS)}; `bitatlas metrics` describes them",
    )


def metric_of_value(value: str) -> str:
    """Name of the metric whose run emits ``value`` (``weight_error_rel`` -> ``weight_error``), "" when none."""
    return next((name for name, m in METRICS.items() if value in m.EMITS), "")
