"""The evaluation engine of all searches: whole allocations run on the real model, as cheaply as exactness allows.

Quantised weights are made once (`CandidateWeights`) and swapped by pointer; candidates are sorted so that those with the
same first layers follow one another, and blocks that a candidate shares with the one before are not computed again; the
original's logits of a batch are computed once for all candidates. All candidates of a call see the same text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.candidate_weights import CandidateWeights
from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.prefix import PrefixRunner, Recording
from bitatlas.analysis.schema import Format, QuantUnit, Scores, Spent, UserError

__all__ = ["Evaluator"]

_POOLS = ("all", "learn", "judge")


class Evaluator:
    """An `analysis.schema.Objective`: KL of allocations, and slopes around one, on minibatches of a text.

    Args:
        loaded: the model with its original weights; they are in place again after every call.
        units, formats: the axes of a choice.
        tokens: (S, T) int64, the pool of sequences. Every other one is the pool ``"judge"``, the rest ``"learn"``.
        batch_tokens: tokens of one forward pass.
        logits_bytes: the original's logits kept between calls.
        storage, ram_bytes, folder, disk_bytes: of `CandidateWeights`.
    """

    def __init__(
        self, loaded: LoadedModel, units: Sequence[str], formats: Sequence[Format], tokens: np.ndarray, *,
        batch_tokens: int = 2048, logits_bytes: int = 1 << 30, storage: torch.dtype = torch.float32,
        ram_bytes: int = 4 << 30, folder: str | Path | None = None, disk_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.loaded = loaded
        self.weights = CandidateWeights(
            loaded, units, formats, storage=storage, ram_bytes=ram_bytes, folder=folder, disk_bytes=disk_bytes
        )
        self.spent = Spent()
        self._tokens = np.ascontiguousarray(tokens, np.int64)
        self._batch = max(1, batch_tokens // self._tokens.shape[1])
        self._runner = PrefixRunner(loaded, loaded.index.n_layers)
        self._logits: OrderedDict[tuple[tuple[int, ...], int], Tensor] = OrderedDict()
        self._logits_limit = logits_bytes
        found = [loaded.handle(u).unit for u in units]
        self._block = np.array([_first_block(u, loaded.index.n_layers) for u in found])  # (U,)
        params = np.array([u.params for u in found], np.float64)
        # (L + 1,) share of the weights in the blocks from l on.
        self._share = np.array(
            [params[self._block >= b].sum() / params.sum() for b in range(loaded.index.n_layers + 1)]
        )

    def minibatch(self, tokens: int, seed: int, pool: str = "all") -> list[tuple[tuple[int, ...], int]]:
        """Batches (sequence numbers, length) of exactly ``tokens`` tokens: distinct sequences, the last cut short.

        A pool with fewer tokens is used whole.

        Raises:
            UserError: a half is asked for and there is only one sequence.
        """
        count, length = self._tokens.shape
        numbers = {"all": np.arange(count), "learn": np.arange(0, count, 2), "judge": np.arange(1, count, 2)}[
            pool
        ]
        if not len(numbers):
            raise UserError("searching needs at least two sequences of text", found="1", fix="more tokens")
        tokens = max(1, min(tokens, len(numbers) * length))
        rng = np.random.default_rng([seed, _POOLS.index(pool)])
        picked = rng.permutation(numbers)[: -(-tokens // length)].tolist()
        whole = picked[: tokens // length]
        out = [(tuple(whole[i : i + self._batch]), length) for i in range(0, len(whole), self._batch)]
        return out + [((n,), tokens % length) for n in picked[len(whole) :]]

    @torch.no_grad()
    def scores(self, choices: np.ndarray, tokens: int, seed: int, pool: str = "all") -> Scores:
        """KL of (N, U) choices; equal choices are run once."""
        order = np.argsort(self._block, kind="stable")
        unique, back = np.unique(np.atleast_2d(choices)[:, order], axis=0, return_inverse=True)
        unique = unique[:, np.argsort(order)]  # sorted by the first layers first
        kl: list[np.ndarray] = []
        lengths: list[int] = []
        for numbers, length in self.minibatch(tokens, seed, pool):
            ids = self.ids(numbers, length)
            original = self._original(numbers, length)
            batch = np.empty((len(unique), len(numbers)))
            before: Recording | None = None
            with self._placing() as put:
                for n, choice in enumerate(unique):
                    put(choice)
                    at = 0 if n == 0 else self._first_change(unique[n - 1], choice)
                    before = self._run(ids, before, at)
                    batch[n] = token_kl(original, before.logits).mean(1).numpy()
            kl.append(batch)
            lengths += [length] * len(numbers)
        self.spent = self.spent.plus(Spent(evaluations=len(unique)))
        return Scores(np.concatenate(kl, 1)[back.reshape(-1)], np.array(lengths, np.int64))

    def slopes(
        self, choice: np.ndarray, tokens: int, seed: int, pool: str = "all"
    ) -> tuple[np.ndarray, float]:
        """First-order change of the KL in nats per token towards every format, and the KL at ``choice``.

        ``<grad_W KL, Q_new - Q_now>``: one backward pass orders all single changes (RCO, arXiv 2605.00649).
        """
        batches = self.minibatch(tokens, seed, pool)
        total = sum(len(numbers) * length for numbers, length in batches)
        value, units = 0.0, self.weights.units
        with self.loaded.requires_grad(units):
            for numbers, length in batches:
                original = self._original(numbers, length)
                target = torch.log_softmax(original, -1)
                with self._placing() as put, torch.enable_grad():
                    put(choice)
                    ids = self.ids(numbers, length)
                    found = torch.log_softmax(self.loaded.logits(ids), -1)
                    loss = (target.exp() * (target - found)).sum() / total
                    loss.backward()
                value += float(loss.detach())
                size = len(numbers) * length
                self.spent = self.spent.plus(Spent(size, size, size, 0))
            first = np.zeros((len(units), len(self.weights.formats)))
            for i, unit in enumerate(units):
                gradient = self.loaded.handle(unit).grad()
                if gradient is not None:
                    first[i] = self._against(i, int(choice[i]), gradient)
        self.spent = self.spent.plus(Spent(evaluations=1))
        return first, value

    @torch.no_grad()
    def distances(self, choice: np.ndarray) -> np.ndarray:
        """(U, F) squared distance of a unit's weights in a format from those that ``choice`` gives it."""
        return np.array([self._against(i, int(here), None) for i, here in enumerate(choice)])

    def _against(self, unit: int, here: int, gradient: Tensor | None) -> np.ndarray:
        """(F,) <gradient, change> of a unit's changes of format; |change|^2 without a gradient."""
        now = self.weights.get(unit, here)
        out = np.zeros(len(self.weights.formats))
        for j in range(len(out)):
            if j != here:
                change = (self.weights.get(unit, j) - now).float()
                out[j] = float((change * (change if gradient is None else gradient)).sum())
        return out

    def ids(self, numbers: tuple[int, ...], length: int) -> Tensor:
        """(B, length) token ids of a batch."""
        return torch.from_numpy(self._tokens[list(numbers), :length])

    def _original(self, numbers: tuple[int, ...], length: int) -> Tensor:
        """(B, T, V) logits of the original model; its weights must be in place."""
        key = (numbers, length)
        found = self._logits.get(key)
        if found is None:
            with torch.no_grad():
                ids = self.ids(numbers, length)
                found = (
                    self._runner.record(ids).logits if self._runner.exact is None else self.loaded.logits(ids)
                )
            size = found.numel() * found.element_size()
            self.spent = self.spent.plus(Spent(ids.numel(), 0, ids.numel(), 0))
            held = sum(t.numel() * t.element_size() for t in self._logits.values())
            while self._logits and held + size > self._logits_limit:
                old = self._logits.popitem(last=False)[1]
                held -= old.numel() * old.element_size()
            if size <= self._logits_limit:
                self._logits[key] = found
        else:
            self._logits.move_to_end(key)
        return found

    def _run(self, ids: Tensor, before: Recording | None, at: int) -> Recording:
        """A recorded run with the weights in place, the blocks before ``at`` as in ``before``."""
        reused = before is not None and at > 0 and bool(self._runner.exact)
        share = self._share[at] if reused else 1.0
        self.spent = self.spent.plus(Spent(ids.numel(), 0, ids.numel() * float(share), 0))
        return self._runner.again(
            before if before is not None else Recording(ids, (), ids), at if reused else 0
        )

    def _first_change(self, one: np.ndarray, other: np.ndarray) -> int:
        different = self._block[one != other]
        return int(different.min()) if len(different) else self.loaded.index.n_layers

    @contextmanager
    def _placing(self) -> Iterator[_Placer]:
        """A function that puts a choice (U,) into the model; the originals come back at the end, whatever happens."""
        placer = _Placer(self.loaded, self.weights)
        try:
            yield placer
        finally:
            placer.restore()


class _Placer:
    """Swaps only the units that differ from what is in the model."""

    def __init__(self, loaded: LoadedModel, weights: CandidateWeights) -> None:
        self._loaded, self._weights = loaded, weights
        self._before: dict[str, Tensor] = {}
        self._now: dict[int, int] = {}

    def __call__(self, choice: np.ndarray) -> None:
        for i, fmt in enumerate(choice.tolist()):
            if self._now.get(i) == fmt:
                continue
            unit = self._weights.units[i]
            handle = self._loaded.handle(unit)
            if i not in self._now:
                self._before[unit] = handle.exchange(self._weights.get(i, fmt))
            else:
                if not self._weights.kept(i, fmt):
                    handle.exchange(self._before[unit])  # quantising starts from the original
                weight = self._weights.get(i, fmt)
                if handle.expert >= 0 or handle.transposed or handle.half:
                    handle.set(weight)  # a part of a parameter: nobody needs what was there
                else:
                    handle.exchange(weight)
            self._now[i] = fmt

    def restore(self) -> None:
        for unit, weight in self._before.items():
            self._loaded.handle(unit).exchange(weight)
        self._before.clear()
        self._now.clear()


def _first_block(unit: QuantUnit, blocks: int) -> int:
    """The first block to compute again when this unit changes."""
    if unit.layer >= 0:
        return unit.layer
    return blocks if unit.role == "head" else 0
