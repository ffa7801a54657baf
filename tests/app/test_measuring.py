"""What a request for a measurement is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitatlas.analysis.metrics import METRICS
from bitatlas.app.tasks.measuring import measure_params


def test_a_new_version_of_a_metric_is_another_request(
    tmp_path: Path, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    model = tiny_checkpoint("llama")

    def asked() -> dict[str, object]:
        return measure_params(
            model,
            "weight_error",
            formats="int4-g32",
            calibration=None,
            tokens=64,
            seq_len=16,
            seed=0,
            settings=None,
        )

    before = asked()
    assert before == asked()
    assert "versions" not in before  # as it was asked when there was nothing else
    monkeypatch.setattr(METRICS["weight_error"], "VERSION", 2)
    assert asked() == before | {"versions": {"weight_error": 2}}
