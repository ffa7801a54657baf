"""Damage is measured for the quantiser that will be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.quantising import UnitQuantizer
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format


@pytest.mark.parametrize("quantizer", ["gptq", "awq", "mse"])
def test_flips_are_those_of_the_quantiser(quantizer, tiny_checkpoint, tmp_path):
    index = index_model(tiny_checkpoint("qwen3_moe"))
    text = CalibrationSet.of(np.random.default_rng(0).integers(1, 250, (12, 10)))
    settings = {"quantizer": quantizer, "flip_sequences": 3, "flips": 9}
    fmt = parse_format("int2-g32")
    with MeasureContext(index, [fmt], settings=settings, calibration=text) as ctx:
        rows = [r for r in run_metric(get_metric("kl_flip"), ctx, tmp_path) if r.count]
        loaded = ctx.loaded
        made = UnitQuantizer.over(quantizer, loaded, text.tokens, dict.fromkeys(index.unit_keys(), fmt.name))
        ids = torch.from_numpy(text.tokens[:3])
        assert rows
        for r in rows[:4]:
            weight = made.effective(r.unit, loaded.handle(r.unit).get(), fmt)
            with torch.no_grad():
                original = loaded.logits(ids)
                with loaded.swapped({r.unit: weight}):
                    want = float(token_kl(original, loaded.logits(ids)).mean())
            assert r.value == pytest.approx(want, rel=0.02, abs=1e-7)


def test_another_quantiser_is_another_run_and_wrong_ones_are_refused(tiny_checkpoint):
    index = index_model(tiny_checkpoint("qwen3_moe"))
    with (
        MeasureContext(index, [parse_format("int2-g32")], settings={"quantizer": "magic"}) as ctx,
        pytest.raises(UserError, match="no quantizer"),
    ):
        ctx.prepare()
    for name in ("kl_flip", "fisher_projection", "hawq_trace", "expert_error"):
        assert get_metric(name).SETTINGS["quantizer"] == "rtn"
