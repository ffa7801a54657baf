"""What a request for a measurement is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitatlas.analysis.metrics import METRICS
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app.tasks import estimating, measuring
from bitatlas.app.tasks.measuring import measure_params
from bitatlas.app.tasks.searching import submit_search
from bitatlas.app.tasks.truth import submit_random_allocations, truth
from bitatlas.app.tasks.verifying import submit_verify
from bitatlas.app.work.checkpoint import unchanged
from bitatlas.app.work.measure import MeasureWork
from bitatlas.cache.paths import Home


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("word " * 4000)
    return path


def test_a_new_version_of_a_metric_is_another_request(
    home: Home, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_sequences_longer_than_the_model_reads(
    home: Home, text: Path, tmp_path: Path, tiny_checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Learned positions end: no job. Rotary ones go on: a note, beside the request and in the job's log."""

    def asked(model: Path, metric: str, seq_len: int) -> dict[str, object]:
        return measure_params(model, metric, formats="int4-g32", calibration=text, tokens=1024, seq_len=seq_len,
                              seed=0, settings=None)  # fmt: skip

    gpt2, llama = tiny_checkpoint("gpt2"), tiny_checkpoint("llama")
    with pytest.raises(UserError, match="positions"):
        asked(gpt2, "fisher", 257)
    for ask in (
        lambda: submit_random_allocations(gpt2, text=text, seq_len=257),
        lambda: truth(gpt2, text=text, seq_len=257),
        lambda: submit_verify(gpt2, _plan(gpt2, tmp_path), text=text, seq_len=257),
        lambda: submit_verify(gpt2, _plan(gpt2, tmp_path), text=text, seq_len=16, quantizer="gptq", calibration=text),
        lambda: submit_search(gpt2, solver="evopress", bits=4.0, formats="int{2,4}-g32", calibration=text, seq_len=257),
    ):  # fmt: skip
        with pytest.raises(UserError, match="positions"):
            ask()
    assert asked(gpt2, "weight_error", 257)["seq_len"] == 0  # reads no text
    assert not caplog.records
    asked(llama, "fisher", 256)
    assert not caplog.records
    params = asked(llama, "fisher", 257)
    assert "257 tokens a sequence" in caplog.text
    caplog.clear()
    unchanged(params)
    assert "257 tokens a sequence" in caplog.text


def _plan(model: Path, folder: Path) -> Path:
    index = index_model(model)
    plan = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), "int4-g32"), 1, 0, 4.0)
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return path


def test_what_a_metric_refuses_is_no_job(home: Home, text: Path, tiny_checkpoint) -> None:

    def asked(metric: str, **settings: object) -> dict[str, object]:
        return measure_params(tiny_checkpoint("llama"), metric, formats="int4-g32", calibration=text, tokens=256,
                              seq_len=64, seed=0, settings=settings)  # fmt: skip

    for metric, settings, words in (
        ("hawq_trace", {"max_probes": 0}, "max_probes"),
        ("hawq_trace", {"probe_group": 1}, "probe group"),
        ("prune", {"prune_share": 1.5}, "between 0 and 1"),
        ("fisher", {"score": "guesses"}, "score"),
        ("routing", {}, "expert"),  # a dense model
    ):
        with pytest.raises(UserError, match=words):
            asked(metric, **settings)
    assert asked("fisher", draws=1)["settings"] == {"draws": 1}


def test_a_measurement_takes_the_gpu_that_holds_the_model(
    home: Home, text: Path, tiny_checkpoint, on_gpu
) -> None:
    """Where it computes is no part of what it is; the model's dtype is."""

    def work(metric: str = "fisher", **options: str) -> MeasureWork:
        params = measure_params(
            tiny_checkpoint("llama"), metric, formats="int4-g32", calibration=text, tokens=64, seq_len=16,
            seed=0, settings=None, **options,
        )  # fmt: skip
        return MeasureWork(params, home)

    def run_of(w: MeasureWork) -> str:
        return w.run_of(next(iter(w.metrics.values())))

    alone = work()
    assert alone.context.device == "cpu"
    with on_gpu():
        there = work()
        assert there.context.device == "cuda"
        assert there.context.loaded.device.type == "cuda"
        assert work(device="cpu").context.device == "cpu"
        assert work("weight_error").context.device == "cpu"
    with on_gpu(memory=1000):
        assert work().context.device == "cpu"  # it would not fit
    assert alone.params == there.params
    assert run_of(alone) == run_of(there) == run_of(work(device="cpu"))
    half = work(dtype="bfloat16")
    assert run_of(half) != run_of(alone)
    assert half.context.loaded.model.dtype is torch.bfloat16
    assert half.runs()[0]["settings"] == {"model_dtype": "bfloat16"}
    assert run_of(work("weight_error", dtype="bfloat16")) == run_of(work("weight_error"))
    with pytest.raises(UserError, match="no GPU"):
        _ = work(device="cuda").context
    for word in ("tpu", "auto"):
        with pytest.raises(UserError):
            work(**{"device": word} if word == "tpu" else {"dtype": word})


def test_a_job_of_many_metrics_has_a_short_title(
    home: Home, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(measuring, "submit", lambda kind, params, title: titles.append(title) or "job")
    model = tiny_checkpoint("llama")
    for metric in ("weight_error,alphaq", "weight_error,alphaq,spectral,quantmoe_outlier"):
        measuring.submit_measure(model, metric, formats="int4-g32")
    assert titles == ["measure weight_error, alphaq of llama", "measure 4 metrics of llama"]


def test_the_steps_of_dear_metrics_weigh_more(home: Home, text: Path, tiny_checkpoint) -> None:
    params = measure_params(tiny_checkpoint("llama"), "weight_error,hawq_trace", formats="int4-g32", calibration=text,
                            tokens=256, seq_len=64, seed=0, settings=None)  # fmt: skip
    work = MeasureWork(params, home)
    by_metric = {
        name: {w for k, w in zip(work.plan(), work.weights()) if k.startswith(name)} for name in work.metrics
    }
    assert all(len(found) == 1 for found in by_metric.values())
    assert by_metric["hawq_trace"].pop() > 5 * by_metric["weight_error"].pop() > 0


def test_a_setting_with_its_metric_before_it_is_the_same_request(
    home: Home, text: Path, tiny_checkpoint
) -> None:
    def asked(setting: str):
        return measure_params(tiny_checkpoint("qwen3_moe"), "expert_error", formats="int4-g32", calibration=text, tokens=256, seq_len=32,
                              seed=0, settings={setting: "gptq"})  # fmt: skip

    assert asked("expert_error.quantizer") == asked("quantizer")


def test_an_estimate_knows_the_request(home: Home, tiny_checkpoint) -> None:
    model = tiny_checkpoint("llama")

    def asked(metric: str = "fisher_diag", **options: object) -> list[dict[str, object]]:
        return estimating.estimate(model, metric, formats="int4-g32", tokens=256, seq_len=64, **options)

    plain, more = asked(), asked(settings={"draws": 6})
    assert [r["metric"] for r in plain] == ["loading", "fisher_diag"]
    assert more[1]["backward_tokens"] == 3 * plain[1]["backward_tokens"]
    assert asked(settings={"fisher_diag.draws": 6})[1]["backward_tokens"] == more[1]["backward_tokens"]
    total = estimating.estimate_total(more)
    assert total["seconds"] == pytest.approx(sum(r["seconds"] for r in more))
    assert total["steps"] == more[1]["steps"]
    assert asked(calibration="self")[0]["forward_tokens"] == 256
    assert plain[0]["forward_tokens"] == 0 < plain[0]["bytes_read"]
    assert asked("weight_error")[0]["bytes_read"] == 0  # runs no model
    every = asked("all")
    assert estimating.estimate_total(every)["seconds"] == pytest.approx(sum(r["seconds"] for r in every if not r["skipped"]))  # fmt: skip
    for options in ({"settings": {"draws": 0}}, {"calibration": "/no/such/text"}, {"text_mode": "odd"}):
        with pytest.raises(UserError):
            asked(**options)
    for metric in ("fisher_diag", "all"):
        for size in ({"tokens": 0, "seq_len": 64}, {"tokens": 256, "seq_len": 1}):
            with pytest.raises(UserError, match="must be at least 2"):
                estimating.estimate(model, metric, formats="int4-g32", **size)
