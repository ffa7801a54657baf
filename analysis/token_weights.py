"""Which positions count, and how much: all alike, answers only, or by the attention they receive.

A weight w_t belongs to the prediction made at position t: a Fisher score times sqrt(w_t) gives sum_t w_t KL_t / sum_t w_t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitatlas.analysis.schema import UserError

if TYPE_CHECKING:
    from bitatlas.analysis.loaded import LoadedModel
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["TOKEN_SETTINGS", "answer_mask", "attention_mass", "token_weights"]

TOKEN_SETTINGS: Mapping[str, Any] = {"tokens": "all", "answer_marker": "", "answer_end": "", "least_weight": 1.0,
                                     "most_weight": 3.0}  # fmt: skip
"""Settings of every metric that takes token weights.

tokens: ``all``, ``answer`` (only what follows ``answer_marker`` is predicted, up to ``answer_end`` where one is
    given) or ``attention`` (RSQ, arXiv 2503.01820: attention mass received, scaled to least_weight ... most_weight
    within a sequence).
"""


def token_weights(ctx: MeasureContext, settings: Mapping[str, Any], loaded: LoadedModel) -> np.ndarray | None:
    """(S, T) float32 weights of the calibration positions, None when all count alike.

    Raises:
        UserError: an unknown rule, no marker, no answer in the text, a model whose attention cannot be seen.
    """
    rule = str(settings["tokens"])
    if rule == "all":
        return None
    if rule == "attention":
        low, high = float(settings["least_weight"]), float(settings["most_weight"])
        if not 0 <= low <= high or high == 0:
            raise UserError("attention weights need 0 <= least_weight <= most_weight", found=f"{low}, {high}")
        key = f"attention mass {low} {high}"
        if key not in ctx.scratch:
            rows = [
                _scaled(attention_mass(loaded, torch.from_numpy(s)), low, high)
                for s in ctx.calibration.tokens
            ]
            ctx.scratch[key] = np.array(rows, np.float32)
        found: np.ndarray = ctx.scratch[key]
        return found
    if rule != "answer":
        raise UserError("unknown rule for the tokens", found=rule, fix="tokens=all, answer or attention")
    marker = str(settings["answer_marker"])
    if not marker.strip():
        raise UserError(
            "answers are found by what stands before them",
            found="no answer_marker",
            fix='--set answer_marker="<|im_start|>assistant"',
        )
    names = {
        int(i): str(loaded.tokenizer.decode([int(i)], skip_special_tokens=False))
        for i in np.unique(ctx.calibration.tokens)
    }
    rows = [
        answer_mask([names[int(i)] for i in s], marker, str(settings["answer_end"]))
        for s in ctx.calibration.tokens
    ]
    weights = np.array(rows, np.float32)
    if not weights.any():
        raise UserError("no answer in the calibration text", found=f"{marker!r} occurs in no sequence",
                        fix="another answer_marker, or longer sequences")  # fmt: skip
    return weights


def answer_mask(pieces: Sequence[str], marker: str, end: str = "") -> np.ndarray:
    """(T,) 1 where the next token belongs to an answer.

    Args:
        pieces: text of each token; spaces and line breaks are ignored everywhere, since tokenizers differ in them.
        marker: an answer begins behind it.
        end: and ends before it, before the next marker, or with the sequence.
    """
    bare = ["".join(p.split()) for p in pieces]
    starts = np.cumsum([0, *map(len, bare)])
    text, marker, end = "".join(bare), "".join(marker.split()), "".join(end.split())
    answer = np.zeros(len(pieces), bool)
    at = text.find(marker)
    while at >= 0:
        begin = at + len(marker)
        at = text.find(marker, begin)
        ends = [x for x in (at, text.find(end, begin) if end else -1) if x >= 0]
        stop = min(ends, default=len(text))
        answer |= (starts[:-1] >= begin) & (starts[:-1] < stop)
    out = np.zeros(len(pieces), np.float32)
    out[:-1] = answer[1:]
    return out


@torch.no_grad()
def attention_mass(loaded: LoadedModel, ids: torch.Tensor) -> np.ndarray:
    """(T,) attention that each position of one sequence receives, summed over queries, mean over heads and layers.

    Raises:
        UserError: no layer shows its attention weights.
    """
    model, length = loaded.model, len(ids)
    total, layers = np.zeros(length), 0

    def watch(module: Any, args: Any, output: Any) -> None:
        nonlocal layers
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, torch.Tensor) and part.dim() == 4 and part.shape[-2:] == (length, length):
                total[:] += part[0].double().sum(1).mean(0).cpu().numpy()
                layers += 1
                return

    before = getattr(model.config, "_attn_implementation", None)
    hooks = [
        m.register_forward_hook(watch) for m in model.modules() if "attention" in type(m).__name__.lower()
    ]
    try:
        if before not in (None, "eager"):
            model.set_attn_implementation("eager")
        loaded.logits(ids.unsqueeze(0))
    finally:
        for hook in hooks:
            hook.remove()
        if before not in (None, "eager"):
            model.set_attn_implementation(before)
    if not layers:
        raise UserError("this model's attention weights cannot be seen", found=type(model).__name__,
                        fix="tokens=all or tokens=answer")  # fmt: skip
    return total / layers


def _scaled(mass: np.ndarray, low: float, high: float) -> np.ndarray:
    """Min-max scaled to low ... high, then to a mean of 1 (RSQ, section 3.3)."""
    spread = mass.max() - mass.min()
    r = low + (high - low) * ((mass - mass.min()) / spread if spread > 0 else np.ones_like(mass))
    return np.asarray(r / r.mean())
