"""Fixtures of the app's tests: synthetic studies, a data folder with them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bitatlas.analysis.schema import ModelIndex
from bitatlas.app.studies import Study
from bitatlas.app.tasks import describing, solving
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store


def _load() -> ModuleType:
    if "app_fakes" not in sys.modules:
        spec = importlib.util.spec_from_file_location("app_fakes", Path(__file__).with_name("fakes.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules["app_fakes"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["app_fakes"])
    return sys.modules["app_fakes"]


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """tests/app/fakes.py."""
    return _load()


@pytest.fixture(scope="session")
def dense(fakes) -> Study:
    """Thirty layers, seven roles, one format-dependent metric and one that is not."""
    index = fakes.dense_index()
    return Study(
        index, {"fisher_projection": fakes.damage_table(index), "alphaq_alpha": fakes.alpha_table(index)}
    )


@pytest.fixture(scope="session")
def moe(fakes) -> Study:
    """48 layers of 128 experts: 18 432 expert units."""
    index = fakes.moe_index()
    return Study(index, {"fisher_projection": fakes.damage_table(index)})


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    """An empty data folder of its own, in the environment."""
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BITATLAS_MODEL_ROOTS", str(tmp_path))
    return Home.default()


@pytest.fixture
def index(home, fakes, monkeypatch) -> ModelIndex:
    """A small dense model with two finished runs in the store; the solving tasks find it under any name."""
    index: ModelIndex = fakes.dense_index(6, "dense-6")
    fakes.fill(Store(home), index)
    for module in (solving, describing):
        monkeypatch.setattr(module, "register", lambda model: index)
    return index


@pytest.fixture(scope="session")
def _filled_once(tmp_path_factory, fakes) -> tuple[Path, list[str]]:
    home = Home(tmp_path_factory.mktemp("filled") / "home")
    store = Store(home)
    indexes = [fakes.dense_index(6, "dense-6"), fakes.moe_index(4, 8, "moe-4x8")]
    for index in indexes:
        fakes.fill(store, index)
    return home.root, [f"{i.name}@{i.digest[:8]}" for i in indexes]


@pytest.fixture
def filled(home, _filled_once) -> list[str]:
    """Two small finished studies in the store; returns the labels, as in the study picker."""
    folder, labels = _filled_once
    shutil.copytree(folder, home.root)
    return labels
