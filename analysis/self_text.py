"""Calibration without data: sequences sampled from the model itself.

ZeroQ (Cai et al. 2020) calibrates on inputs made from the model; for language models LLM-QAT (Liu et al. 2023, section 3.1) samples text:
a random first token, then the model's own next-token distribution.
"""

from __future__ import annotations

import numpy as np
import torch

from bitatlas.analysis.calibration import SELF, CalibrationSet
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.errors import UserError

__all__ = ["sample_from_model"]

_AT_ONCE = 32  # sequences; their cached keys and values are held together


@torch.no_grad()
def sample_from_model(loaded: LoadedModel, tokens: int, seq_len: int, seed: int = 0) -> CalibrationSet:
    """(S, T) ids with S x T >= ``tokens``, drawn by ``seed``; the same on the same machine.

    Sequences open with the tokenizer's BOS token where it has one that it opens texts with; the next token is uniform over
    the vocabulary, the others are sampled from the model's whole distribution at temperature 1.

    Raises:
        UserError: the model hands out no finite distribution.
    """
    count = -(-tokens // seq_len)
    generator = torch.Generator().manual_seed(seed)
    vocab = loaded.index.vocab_size or loaded.model.get_input_embeddings().weight.shape[0]
    bos = _bos(loaded)
    out = []
    for start in range(0, count, _AT_ONCE):
        n = min(_AT_ONCE, count - start)
        first = torch.randint(0, vocab, (n, 1), generator=generator)
        ids = torch.cat([torch.full((n, 1), b, dtype=torch.int64) for b in bos] + [first], 1)[:, :seq_len]
        cache, fresh = None, ids
        while ids.shape[1] < seq_len:
            answer = loaded.model(input_ids=fresh.to(loaded.device), past_key_values=cache, use_cache=True)
            p = torch.softmax(answer.logits[:, -1, :vocab].double().cpu(), -1)
            if not torch.isfinite(p).all():
                raise UserError("the model's next-token distribution is not finite", fix="calibrate on a text instead of --calibration self")  # fmt: skip
            chosen = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, chosen], 1)
            cache = answer.past_key_values
            fresh = chosen if cache is not None else ids
        out.append(ids.numpy())
    settings = {"mode": SELF, "seed": seed, "seq_len": seq_len, "bos": bool(bos), "model": loaded.index.digest[:20]}  # fmt: skip
    return CalibrationSet.of(np.concatenate(out), SELF, settings)


def _bos(loaded: LoadedModel) -> list[int]:
    """The BOS token where the tokenizer opens a text with it; a model without a usable tokenizer samples all the same."""
    try:
        tokenizer = loaded.tokenizer
    except UserError:
        return []
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []
