"""Text sampled from the model: seeded, of the right shape, and distributed as the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.self_text import sample_from_model


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return LoadedModel.open(index_model(tiny_checkpoint("llama")))


def test_seeded_and_of_whole_sequences(loaded):
    a, again, other = (sample_from_model(loaded, 50, 9, seed) for seed in (0, 0, 1))
    assert a.tokens.shape == (6, 9)
    assert a.digest == again.digest != other.digest
    np.testing.assert_array_equal(a.tokens, again.tokens)
    assert a.tokens.max() < loaded.index.vocab_size
    assert (a.source, a.settings["mode"]) == ("self", "self")


def test_sampled_from_the_models_own_distribution(loaded):
    """Mean surprise of the sampled tokens equals the mean entropy of the distributions they came from."""
    found = sample_from_model(loaded, 4000, 20, 3)
    ids = torch.from_numpy(found.tokens)
    log_p = torch.log_softmax(loaded.logits(ids).double(), -1)[:, :-1]
    skip = 1 if found.settings["bos"] else 0  # the first token after BOS is uniform
    surprise = -log_p.gather(-1, ids[:, 1:, None])[:, skip:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)[:, skip:]
    gap = (surprise - entropy).flatten()
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / gap.numel() ** 0.5


def test_a_context_calibrates_on_the_model(tiny_checkpoint):
    with MeasureContext(index_model(tiny_checkpoint("llama")), text="self", tokens=40, seq_len=10) as ctx:
        assert ctx.calibration.tokens.shape == (4, 10)
        assert ctx.calibration.source == "self"
