"""The evaluation engine against `verify_many` and against differences of the KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Scores
from bitatlas.analysis.verify import verify_many
from bitatlas.kernels.formats import expand_formats
from bitatlas.kernels.reference import quantize_dequantize

FORMATS = expand_formats("int2-g64,int3-g64,int4-g64,int8-g64")
T, S = 24, 7


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def case(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> dict[str, Any]:
    index = index_model(tiny_checkpoint(request.param))
    tokens = np.random.default_rng(0).integers(3, 200, (S, T))
    rng = np.random.default_rng(1)
    choices = rng.integers(0, 4, (5, len(index.units)))
    choices[1] = choices[0]  # twice the same
    last = [i for i, u in enumerate(index.units) if u.layer == index.n_layers - 1]
    choices[2] = choices[0]
    choices[2, last] = 3 - choices[0, last]  # the first layers are shared
    return {"index": index, "loaded": LoadedModel.open(index), "tokens": tokens, "choices": choices}


def engine(case: dict[str, Any], **options: Any) -> Evaluator:
    return Evaluator(
        case["loaded"], case["index"].unit_keys(), FORMATS, case["tokens"], batch_tokens=3 * T, **options
    )


def named(case: dict[str, Any], choice: np.ndarray) -> dict[str, str]:
    return {u: FORMATS[j].name for u, j in zip(case["index"].unit_keys(), choice)}


def test_scores_are_what_verify_measures(case: dict[str, Any]):
    evaluator, choices = engine(case), case["choices"]
    before = {k: v.clone() for k, v in case["loaded"].model.state_dict().items()}
    scores = evaluator.scores(choices, S * T, 0)
    numbers = [n for batch, _ in evaluator.minibatch(S * T, 0) for n in batch]
    assert sorted(numbers) == list(range(S))
    found = verify_many(
        case["loaded"], case["index"], {str(i): named(case, c) for i, c in enumerate(choices)}, case["tokens"][numbers]
    )  # fmt: skip
    for i in range(len(choices)):
        np.testing.assert_allclose(scores.kl[i], found[str(i)].kl_sequences, rtol=2e-3, atol=1e-7)
        assert scores.mean[i] == pytest.approx(found[str(i)].kl_mean, rel=1e-3)
        assert scores.stderr[i] == pytest.approx(found[str(i)].kl_stderr, rel=1e-2)
    assert (scores.kl[0] == scores.kl[1]).all()
    after = case["loaded"].model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_tokens_are_counted_to_the_last_one(case: dict[str, Any]):
    evaluator, choices = engine(case), case["choices"]
    tokens = 2 * T + 5
    scores = evaluator.scores(choices, tokens, 3)
    assert scores.tokens.tolist() == [T, T, 5]
    # Four different candidates, and the original once.
    assert evaluator.spent.forward_tokens == 5 * tokens
    assert evaluator.spent.evaluations == 4
    assert 0 < evaluator.spent.computed_tokens < 5 * tokens  # one candidate shares all but the last layer
    evaluator.scores(choices[:1], tokens, 3)
    assert evaluator.spent.forward_tokens == 6 * tokens  # the original's logits were kept
    evaluator.slopes(choices[0], tokens, 3)
    assert evaluator.spent.backward_tokens == tokens
    assert evaluator.spent.forward_equivalents == 7 * tokens + 2 * tokens


def test_minibatches_depend_on_seed_and_pool_only(case: dict[str, Any]):
    one, other = engine(case), engine(case)
    assert one.minibatch(60, 5) == other.minibatch(60, 5) != one.minibatch(60, 6)
    learn, judge = ({n for b, _ in one.minibatch(10**9, 0, p) for n in b} for p in ("learn", "judge"))
    assert learn | judge == set(range(S))
    assert not learn & judge


def test_memory_limits_change_no_number(case: dict[str, Any], tmp_path: Path):
    expected = engine(case).scores(case["choices"], 3 * T, 1).kl
    size = max(u.params for u in case["index"].units) * 4
    folder = tmp_path / "weights"
    for options in (
        {"ram_bytes": 0, "logits_bytes": 0},
        {"ram_bytes": 2 * size, "folder": folder, "disk_bytes": 3 * size},
        {"ram_bytes": 0, "folder": folder, "disk_bytes": 1 << 30},
    ):
        evaluator = engine(case, **options)
        assert (evaluator.scores(case["choices"], 3 * T, 1).kl == expected).all()
        assert evaluator.weights.ram_bytes <= options["ram_bytes"]
    files = list(folder.glob("*"))
    assert files
    assert all(f.suffix == ".safetensors" for f in files)
    assert sum(f.stat().st_size for f in files) == evaluator.weights.disk_bytes
    files[0].write_bytes(b"damaged")
    again = engine(case, ram_bytes=0, folder=folder, disk_bytes=1 << 30)
    assert (again.scores(case["choices"], 3 * T, 1).kl == expected).all()
    assert again.weights.quantised <= 1  # the rest came from disk
    half = engine(case, storage=torch.bfloat16).scores(case["choices"], 3 * T, 1).kl
    np.testing.assert_allclose(half, expected, rtol=0.2, atol=1e-5)


def test_slopes_are_the_derivative_of_the_kl(case: dict[str, Any]):
    evaluator, choice, keys = engine(case), case["choices"][3], case["index"].unit_keys()
    numbers = [n for batch, _ in evaluator.minibatch(3 * T, 2, "learn") for n in batch]
    first, value = evaluator.slopes(choice, 3 * T, 2, "learn")
    far = evaluator.distances(choice)
    rows = np.arange(len(choice))
    assert (first[rows, choice] == 0).all()
    assert value == pytest.approx(evaluator.scores(choice, 3 * T, 2, "learn").mean[0], rel=1e-4)
    loaded, ids = case["loaded"], torch.from_numpy(case["tokens"][numbers])
    weights = {u: quantize_dequantize(loaded.handle(u).get(), FORMATS[j]) for u, j in zip(keys, choice)}
    original = loaded.logits(ids)

    def kl(unit: str, change: torch.Tensor, t: float) -> float:
        with torch.no_grad(), loaded.swapped({**weights, unit: weights[unit] + t * change}):
            return float(token_kl(original, loaded.logits(ids)).mean())

    for i in np.argsort(-np.abs(first[:, 0]))[:3]:
        change = quantize_dequantize(loaded.handle(keys[i]).get(), FORMATS[0]) - weights[keys[i]]
        assert far[i, 0] == pytest.approx(float(change.pow(2).sum()), rel=1e-5)
        # So short a step that no token changes its experts: across such a change the KL has no derivative.
        numeric = (kl(keys[i], change, 0.002) - kl(keys[i], change, -0.002)) / 0.004
        assert first[i, 0] == pytest.approx(numeric, rel=0.05, abs=1e-6)


def test_paired_difference_is_tighter_than_two_errors():
    rng = np.random.default_rng(0)
    common = rng.normal(1, 0.3, 40)
    scores = Scores(np.stack([common + 0.02, common + rng.normal(0, 0.01, 40)]), np.full(40, 8))
    mean, error = scores.difference(0, 1)
    assert mean == pytest.approx(scores.mean[0] - scores.mean[1])
    assert error == pytest.approx(np.std(scores.kl[0] - scores.kl[1], ddof=1) / np.sqrt(40))
    assert error < 0.1 * scores.stderr[0]
