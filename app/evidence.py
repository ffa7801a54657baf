"""Why a unit is sensitive: its weight, read on demand from the checkpoint, and the inputs that a metric has seen."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.schema import ModelIndex, UserError
from bitatlas.app import studies
from bitatlas.app.views import unit_inputs
from bitatlas.app.views.unit import Evidence

__all__ = ["MOST_WEIGHTS", "input_evidence", "weight_evidence"]

MOST_WEIGHTS = 1 << 26
"""A page answers within seconds; larger units wait for the ``spectral`` metric."""


def weight_evidence(index: ModelIndex, unit: int, bins: int = 101) -> Evidence:
    """Histogram, moments, spectrum and tail fit of one unit. Loads torch.

    Raises:
        UserError: the checkpoint is gone, or the unit has too many weights for a page.
    """
    u = index.units[unit]
    if u.params > MOST_WEIGHTS:
        raise UserError("this unit is too large to look into on a page", found=f"{u.params:,} weights, at most {MOST_WEIGHTS:,}",
                        fix=f"bitatlas measure {index.path} --metric spectral")  # fmt: skip
    from bitatlas.analysis.power_law import fit_power_law
    from bitatlas.analysis.spectra import gram_eigenvalues
    from bitatlas.analysis.weights import WeightReader

    with WeightReader(index) as reader:
        weight = reader.get(u)
    flat = weight.numpy().ravel()
    counts, edges = np.histogram(flat, bins)
    z = (flat - flat.mean()) / max(float(flat.std()), 1e-30)
    eigenvalues = gram_eigenvalues(weight).numpy()
    fit = fit_power_law(eigenvalues)
    return Evidence(
        counts, edges, eigenvalues, fit.alpha, fit.sigma, fit.xmin, fit.tail,
        float((z.astype(np.float64) ** 4).mean() - 3), float((np.abs(z) > 6).mean()),
    )  # fmt: skip


def input_evidence(study: studies.Study, unit: int) -> unit_inputs.InputsView | None:
    """Histogram of a unit's inputs from the newest run that kept one; None when none did.

    Raises:
        UserError: the run's file is damaged.
    """
    run = study.runs.get(unit_inputs.METRIC)
    return unit_inputs.build(studies.open_store().arrays(run.run), unit) if run else None
