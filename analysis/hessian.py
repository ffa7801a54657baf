"""Second derivatives of the mean next-token loss: products with the Hessian and with its Gauss-Newton part.

Double backward needs the unfused attention, which is chosen for the time being. Everything works on a retained graph,
so that a product costs about one and a half backward passes through the layers from the first unit on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.fisher.probes import score_gradient
from bitatlas.analysis.metrics.base import Cost
from bitatlas.analysis.schema import QuantUnit, UserError

if TYPE_CHECKING:
    from bitatlas.analysis.loaded import LoadedModel
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["Curvature", "curvature", "hessian_batches", "hessian_cost", "probe_groups"]


class Curvature:
    """Derivatives at some units, on some sequences; made by `curvature`.

    Attributes:
        known: (U,) bool, whether any token reached the unit.
    """

    def __init__(self, loaded: LoadedModel, units: Sequence[str], params: list[Tensor], ids: Tensor) -> None:
        self._handles = [loaded.handle(u) for u in units]
        self._params = params
        self._at = {id(p): i for i, p in enumerate(params)}
        logits = loaded.logits(ids)[:, :-1].flatten(0, 1)  # (N, V)
        self._logits = logits
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten().to(logits.device))
        self._gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        detached = [g.detach() for g in self._gradients]
        self.known = np.array([bool(self.view(i, detached).abs().sum() > 0) for i in range(len(units))])

    def view(self, i: int, tensors: Sequence[Tensor]) -> Tensor:
        """(rows, cols) of unit ``i`` in tensors shaped like the parameters."""
        return self._handles[i].view(tensors[self._at[id(self._handles[i].param)]])

    def vectors(self, of: dict[int, Tensor]) -> list[Tensor]:
        """Tensors shaped like the parameters, zero outside the units given: unit number -> (rows, cols)."""
        out = [torch.zeros_like(p) for p in self._params]
        for i, value in of.items():
            self.view(i, out).copy_(value)
        return out

    def product(self, v: list[Tensor]) -> Sequence[Tensor]:
        """H v."""
        return torch.autograd.grad(
            self._gradients, self._params, v, retain_graph=True, materialize_grads=True
        )

    @cached_property
    def _pushed(self) -> tuple[Tensor, Sequence[Tensor]]:
        """A dummy u and J^T u with its graph in u; differentiating that once more gives J v."""
        u = torch.zeros_like(self._logits, requires_grad=True)
        return u, torch.autograd.grad(
            self._logits, self._params, u, create_graph=True, materialize_grads=True
        )

    def gauss_newton(self, v: list[Tensor]) -> Sequence[Tensor]:
        """G v, G = 1/N sum J_t^T (diag p - p p^T) J_t: the Fisher information of the same positions, exactly."""
        u, pulled = self._pushed
        (jv,) = torch.autograd.grad(pulled, u, v, retain_graph=True)  # (N, V)
        p = torch.softmax(self._logits.detach(), -1)
        weighted = p * jv
        weighted = (weighted - p * weighted.sum(-1, keepdim=True)) / len(p)
        return torch.autograd.grad(
            self._logits, self._params, weighted, retain_graph=True, materialize_grads=True
        )

    def fisher_traces(self, generator: torch.Generator) -> list[float]:
        """An unbiased estimate of the trace of G's block of every unit, all from one backward pass."""
        v = score_gradient(self._logits, "signs", generator)
        got = torch.autograd.grad(self._logits, self._params, v, retain_graph=True, materialize_grads=True)
        n = len(self._logits)
        return [float(self.view(i, got).double().square().sum()) / n for i in range(len(self._handles))]


@contextmanager
def curvature(loaded: LoadedModel, units: Sequence[str], ids: Tensor) -> Iterator[Curvature]:
    """Derivatives with respect to these units, of the mean loss over ids (B, T)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), loaded.requires_grad(units) as params, torch.enable_grad():
        yield Curvature(loaded, units, list(params), ids)


def hessian_batches(ctx: MeasureContext, tokens: int, batches: int) -> list[Tensor]:
    """(B, T) ids of ``batches`` disjoint sets of at least ``tokens`` tokens, from the calibration text."""
    all_ids = ctx.calibration.tokens
    size = max(1, tokens // all_ids.shape[1])
    if size * batches > len(all_ids) and batches > 1:
        raise UserError(
            "the calibration text has too few sequences for so many batches",
            found=f"{len(all_ids)} sequences, {batches} batches of {size}",
            fix="raise --tokens, or lower hessian_batches or hessian_tokens",
        )
    return [torch.from_numpy(all_ids[b * size : (b + 1) * size]) for b in range(batches)]


def probe_groups(units: Sequence[QuantUnit], group: str | int) -> dict[str, tuple[QuantUnit, ...]]:
    """Step key -> units that share a probe.

    Args:
        group: ``unit``; ``layer``; or n >= 2: layers 0, n, 2 n ... together, 1, n + 1 ... and so on, so that
            neighbours, which are coupled most, are never in one probe. Embedding and head are always alone.

    Raises:
        UserError: something else; one probe for all layers would drown the small blocks in the noise of the others.
    """
    stride = group if isinstance(group, int) and not isinstance(group, bool) and group >= 2 else 0
    if not stride and group not in ("unit", "layer"):
        raise UserError("unknown probe group", found=str(group), fix="layer, unit, or a number from 2 on")
    groups: dict[str, list[QuantUnit]] = {}
    for u in units:
        name = f"layers {u.layer % stride} mod {stride}" if stride else f"layer {u.layer}"
        groups.setdefault(u.key if group == "unit" or u.layer < 0 else name, []).append(u)
    return {key: tuple(found) for key, found in groups.items()}


def hessian_cost(
    ctx: MeasureContext, groups: dict[str, tuple[QuantUnit, ...]], tokens: int, passes: float
) -> Cost:
    """Cost of ``passes`` backward-equivalents in every group; a graph reaches from the group to the loss only."""
    layers = max(ctx.index.n_layers, 1)
    share = sum(
        1.0 if u[0].layer < 0 else (layers - min(x.layer for x in u)) / layers for u in groups.values()
    )
    return Cost(
        steps=len(groups),
        bytes_read=2 * 2 * ctx.index.params,  # once into the model, once for the errors
        forward_tokens=tokens * len(groups),
        backward_tokens=int(tokens * share * passes),
        quantised=len(ctx.formats) * ctx.index.params,
    )
