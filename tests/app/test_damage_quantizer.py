"""Solving on damage that was measured under one quantiser or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import UserError
from bitatlas.app import tasks
from bitatlas.app.cli_io import emit
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

METRIC, ASKED = "kl_flip", {"metric": "kl_flip", "solver": "hull", "bits": 6.0}


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # fmt: skip
    """A model with a run under gptq, and a newer one of another damage that says nothing, hence rtn."""
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    folder = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96)
    index, store = index_model(folder), Store(Home.default())
    store.put_model(index)
    for seed, run, settings in ((1, "first", {"quantizer": "gptq"}), (2, "second", {})):
        table = replace(fakes.damage_table(index, METRIC, seed=seed), floor=0.0)
        assert np.isfinite(table.damage).all()
        store.begin_run(run, index.digest, METRIC, settings=settings, formats=table.formats)
        store.write_step(run, "all", fakes.rows(table))
        store.finish_run(run)
    return folder


def test_the_quantiser_chooses_the_run_and_is_said(model: Path, fakes, capsys) -> None:
    asked = ASKED | {"formats": ",".join(fakes.FORMATS)}
    found = {name: tasks.solve(model, **asked, quantizer=name) for name in ("", "rtn", "gptq")}
    runs = {name: a.provenance.settings["run"] for name, a in found.items()}
    assert runs == {"": "second", "rtn": "second", "gptq": "first"}
    assert found["gptq"].predicted != found["rtn"].predicted
    said = {name: tasks.describe_allocation(a) for name, a in found.items()}
    assert {name: d["quantizer"] for name, d in said.items()} == {"": "rtn", "rtn": "rtn", "gptq": "gptq"}
    for name, words in (("gptq", "hull on kl_flip with gptq)"), ("rtn", "hull on kl_flip)")):
        emit(said[name], False, "allocation")
        assert words in capsys.readouterr().out


def test_a_quantiser_that_was_not_measured_says_how(model: Path, fakes) -> None:
    asked = ASKED | {"formats": ",".join(fakes.FORMATS)}
    with pytest.raises(UserError, match="kl_flip has not been measured with awq") as caught:
        tasks.solve(model, **asked, quantizer="awq")
    assert "--set quantizer=awq" in caught.value.fix
    with pytest.raises(UserError, match="no quantizer called 'foo'"):
        tasks.solve(model, **asked, quantizer="foo")
