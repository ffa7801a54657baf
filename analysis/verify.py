"""Verification: an allocation run for real on held-out text, against the original model.

Step by step (a step = a few sequences), so that a job can stop and go on. In a step the original logits of a batch
are computed once and every allocation is compared with them; nothing of vocabulary size outlives a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import batch_noise, token_kl, token_nll, top1_changed
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.quantising import UnitQuantizer
from bitatlas.analysis.schema import KvLayout, KvPair, ModelIndex, UserError, parse_format
from bitatlas.kernels.quantizers import get_quantizer

__all__ = ["Verifier", "VerifyResult", "verify_allocation", "verify_many"]

_MIN_TOKENS = 2


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What an allocation does to the model. KL(original || quantised) in nats per token.

    Attributes:
        kl_mean, kl_stderr: mean over tokens; standard error over sequences (NaN for one sequence).
        kl_p50, kl_p99: quantiles over tokens.
        top1_flips: share of positions whose most likely token changed.
        ppl_before, ppl_after: perplexity on the text's own next tokens.
        noise_floor: mean KL of the original model against itself, the same sequence in a batch and alone:
            what the arithmetic's order of summation alone does.
        tokens, sequences: how much text.
        kl_sequences: (S,) mean KL of every sequence, in order.
    """

    kl_mean: float
    kl_stderr: float
    kl_p50: float
    kl_p99: float
    top1_flips: float
    ppl_before: float
    ppl_after: float
    noise_floor: float
    tokens: int
    sequences: int
    kl_sequences: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "kl_sequences": list(self.kl_sequences)}


class Verifier:
    """Compares allocations with the original model on the same text.

    Args:
        loaded: the model with its original weights; they are in place again after every step.
        index: its units.
        tokens: (S, T) int64.
        allocations: label -> (unit key -> format name), every unit present.
        batch_tokens: tokens of one forward pass.
        step_tokens: tokens of one step.
        weights_gib: RAM for quantised weights kept between steps; beyond it they are quantised again.
        quantizer: how codes are chosen, as in packing.
        calibration: (S, T) int64 tokens for quantisers that need the units' inputs.
        packed: label -> logits (B, T, V) of token ids (B, T): models that are there already, judged beside the allocations.
        kv: label -> (layer -> formats of K and V, rules of the window) where the cache is not at 16 bits: every position
            reads K and V as a decoding step would (`analysis.kv.tap`). Models of ``packed`` read their cache themselves;
            named here, the text is checked to be long enough for it.

    Raises:
        UserError: an allocation does not name exactly the units of the index, or there is no text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        index: ModelIndex,
        tokens: np.ndarray,
        allocations: Mapping[str, Mapping[str, str]],
        *,
        batch_tokens: int = 1024,
        step_tokens: int = 2048,
        weights_gib: float = 4.0,
        quantizer: str = "rtn",
        calibration: np.ndarray | None = None,
        packed: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        kv: Mapping[str, tuple[Mapping[int, KvPair], KvLayout]] | None = None,
    ) -> None:
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < _MIN_TOKENS:
            raise UserError("there is no text to verify on", found=f"tokens of shape {tokens.shape}")
        keys = set(index.unit_keys())
        for label, formats in allocations.items():
            wrong = keys.symmetric_difference(formats)
            if wrong:
                raise UserError(f"the allocation {label!r} is for another model",
                                found=f"{len(wrong)} units differ, such as {min(wrong)}")  # fmt: skip
        self._loaded, self._index = loaded, index
        self._tokens = np.ascontiguousarray(tokens, np.int64)
        self.allocations = {k: dict(v) for k, v in allocations.items()}
        self._kv = {label: plan for label, plan in (kv or {}).items() if plan[0]}
        for _, layout in self._kv.values():
            if layout.packed(tokens.shape[1] - 1) == 0:
                raise UserError(
                    "the sequences are too short to see the quantised KV cache",
                    found=f"{tokens.shape[1]} tokens, and the newest {layout.residual} to {layout.residual + layout.block - 1} stay at 16 bits",
                    fix=f"--seq-len {4 * (layout.residual + layout.block)} or more",
                )
        self._batch = max(1, batch_tokens // tokens.shape[1])
        self._per_step = max(self._batch, step_tokens // tokens.shape[1])
        self._limit = int(weights_gib * 2**30)
        self._kept: dict[tuple[str, str, str], Tensor] = {}
        self._kept_bytes = 0
        self._quantizer, self._calibration = get_quantizer(quantizer), calibration
        if self._quantizer.NEEDS_INPUTS and calibration is None:
            raise UserError(f"{quantizer} needs a calibration text", found="none was named",
                            fix="--calibration FILE (text or JSONL)")  # fmt: skip
        self._packed = dict(packed or {})
        self._sources: dict[str, UnitQuantizer] = {}

    def steps(self) -> list[str]:
        """Step keys."""
        n = len(self._tokens)
        return [f"sequences {i}-{min(i + self._per_step, n) - 1}" for i in range(0, n, self._per_step)]

    @torch.no_grad()
    def run(self, step: str) -> dict[str, np.ndarray]:
        """One step.

        Returns:
            kl (A, B, T) float32, changed (A, B, T) bool, nll (1 + A, B, T - 1) float32 with the original
            first, noise (1,) float64.
        """
        first, last = (int(n) for n in step.split()[1].split("-"))
        batches = [
            torch.from_numpy(self._tokens[i : min(i + self._batch, last + 1)])
            for i in range(first, last + 1, self._batch)
        ]
        kl: list[list[np.ndarray]] = []
        changed: list[list[np.ndarray]] = []
        nll: list[list[np.ndarray]] = []
        noise = float("nan")
        for i, ids in enumerate(batches):
            original = self._loaded.logits(ids)
            if i == 0:
                noise = batch_noise(self._loaded.logits, ids, original)
            kl.append([])
            changed.append([])
            nll.append([token_nll(original, ids).float().numpy()])
            for label, formats in self.allocations.items():
                with self._loaded.swapped(self._weights(label, formats)), self._cache(label):
                    logits = self._loaded.logits(ids)
                self._judge(ids, original, logits, kl[-1], changed[-1], nll[-1])
            for model in self._packed.values():
                self._judge(ids, original, model(ids), kl[-1], changed[-1], nll[-1])
        return {
            "kl": np.concatenate([np.stack(x) for x in kl], 1),
            "changed": np.concatenate([np.stack(x) for x in changed], 1),
            "nll": np.concatenate([np.stack(x) for x in nll], 1),
            "noise": np.array([noise]),
        }

    @staticmethod
    def _judge(
        ids: Tensor,
        original: Tensor,
        logits: Tensor,
        kl: list[np.ndarray],
        changed: list[np.ndarray],
        nll: list[np.ndarray],
    ) -> None:
        kl.append(token_kl(original, logits).float().numpy())
        changed.append(top1_changed(original, logits).numpy())
        nll.append(token_nll(logits, ids).float().numpy())

    def results(self, parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, VerifyResult]:
        """Label -> result, from the arrays of all steps (step key -> arrays)."""
        steps = [parts[key] for key in self.steps()]
        kl = np.concatenate([p["kl"] for p in steps], 1).astype(np.float64)  # (A, S, T)
        changed = np.concatenate([p["changed"] for p in steps], 1)
        nll = np.concatenate([p["nll"] for p in steps], 1).astype(np.float64)
        noise = float(np.mean([p["noise"][0] for p in steps]))
        out: dict[str, VerifyResult] = {}
        for i, label in enumerate([*self.allocations, *self._packed]):
            each = kl[i].mean(1)  # (S,)
            n = len(each)
            p50, p99 = np.quantile(kl[i], [0.5, 0.99])
            out[label] = VerifyResult(
                kl_mean=float(kl[i].mean()),
                kl_stderr=float(each.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
                kl_p50=float(p50),
                kl_p99=float(p99),
                top1_flips=float(changed[i].mean()),
                ppl_before=float(np.exp(nll[0].mean())),
                ppl_after=float(np.exp(nll[i + 1].mean())),
                noise_floor=noise,
                tokens=int(kl[i].size),
                sequences=n,
                kl_sequences=tuple(float(x) for x in each),
            )
        return out

    def results_now(self) -> dict[str, VerifyResult]:
        """All steps, in this process."""
        return self.results({step: self.run(step) for step in self.steps()})

    def _cache(self, label: str) -> Any:
        """Reads K and V in the formats of an allocation; nothing to do at 16 bits."""
        if label not in self._kv:
            return nullcontext()
        from bitatlas.analysis.kv.readers import PlanReader

        return self._loaded.cached(PlanReader(*self._kv[label]))

    def _weights(self, label: str, formats: Mapping[str, str]) -> dict[str, Tensor]:
        """Quantised weights of an allocation, by the quantiser that packing uses."""
        # Folded scales hang on the formats of the whole allocation, other codes on the unit's own alone.
        owner = label if self._quantizer.FOLDS else ""
        out = {}
        for key, name in formats.items():
            found = self._kept.get((owner, key, name))
            if found is None:
                found = self._source(owner, formats).effective(
                    key, self._loaded.handle(key).get().cpu(), parse_format(name)
                )
                size = found.numel() * found.element_size()
                if self._kept_bytes + size <= self._limit:
                    self._kept[owner, key, name] = found
                    self._kept_bytes += size
            out[key] = found
        return out

    def _source(self, owner: str, formats: Mapping[str, str]) -> UnitQuantizer:
        if owner not in self._sources:
            # Statistics of the inputs are those of the original model, for every allocation.
            shared = next((s.source for s in self._sources.values()), None)
            self._sources[owner] = UnitQuantizer.over(
                self._quantizer.NAME, self._loaded, self._calibration, formats, source=shared
            )
        return self._sources[owner]


def verify_many(
    loaded: LoadedModel,
    index: ModelIndex,
    allocations: Mapping[str, Mapping[str, str]],
    tokens: np.ndarray,
    **options: Any,
) -> dict[str, VerifyResult]:
    """All steps of a `Verifier` in this process: label -> result; ``options`` as there."""
    return Verifier(loaded, index, tokens, allocations, **options).results_now()


def verify_allocation(
    loaded: LoadedModel, index: ModelIndex, formats: Mapping[str, str], tokens: np.ndarray,
    kv: tuple[Mapping[int, KvPair], KvLayout] | None = None, **options: Any,
) -> VerifyResult:  # fmt: skip
    """`verify_many` for one allocation."""
    plans = {"allocation": kv} if kv else None
    return verify_many(loaded, index, {"allocation": formats}, tokens, kv=plans, **options)["allocation"]
