"""Data sets as calibration text: the library stands in, the network never does unless it is named."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app import dataset_text
from bitatlas.app.tasks.measuring import calibration_file, file_digest


@pytest.fixture
def library(monkeypatch, home):
    """A `datasets` module that notes how it was asked."""
    asked = []

    def load_dataset(name, config=None, *, split):
        asked.append((name, config, split, os.environ.get("HF_DATASETS_OFFLINE")))
        if (name, config) != ("wiki", "raw"):
            raise FileNotFoundError(name)
        return [{"text": "one"}, {"text": "  "}, {"text": "two"}]

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    return asked


def test_read_once_offline(library):
    path = calibration_file("/models/x", "datasets:wiki/raw:test")
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["one", "two"]
    assert library[-1] == ("wiki", "raw", "test", "1")
    assert "HF_DATASETS_OFFLINE" not in os.environ
    n = len(library)
    assert calibration_file("/models/x", "datasets:wiki/raw:test") == path
    assert len(library) == n


def test_the_network_only_when_named(library):
    dataset_text.dataset_file("download-datasets:wiki/raw")
    assert library[-1][3] is None


def test_what_is_wrong(library, monkeypatch):
    with pytest.raises(UserError, match="could not be read") as caught:
        dataset_text.dataset_file("datasets:gone")
    assert "download-datasets:gone" in caught.value.fix
    with pytest.raises(UserError, match="no field 'body'"):
        dataset_text.dataset_file("datasets:wiki/raw:train:body")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the `datasets` library"):
        dataset_text.dataset_file("datasets:other")


def test_self_is_no_file(home):
    path = calibration_file("/models/x", "self")
    assert str(path) == file_digest(path) == "self"
    with pytest.raises(UserError, match="no such eval text"):
        calibration_file("/models/x", "self", "eval")
