"""Library, the inside of a model, and the cost of a run."""

from __future__ import annotations

import pytest

from bitatlas.analysis.schema import UserError, expand_formats, parse_format
from bitatlas.app.studies import MetricInfo, StudyInfo
from bitatlas.app.views import inside, library
from bitatlas.app.views.run import RunRequest, cost_table, estimate_view
from bitatlas.app.views.words import count, duration, metric_unit, params, short_bytes


def _info(name, *metrics):
    return StudyInfo(name * 8, name, f"/m/{name}", "LlamaForCausalLM", 211, 3_000_000, 0, metrics)


def test_titles_are_answers():
    assert library.build([], {}).title == "No model here yet"
    assert library.build([_info("a"), _info("b")], {}).title == "2 models, nothing measured yet"
    measured = _info("b", MetricInfo("weight_error", ("int4-g64",), 0.5))
    view = library.build([_info("a"), measured], {"bbbbbbbb": "changed"})
    assert view.title == "1 of 2 models measured; b knows 1 metric"
    assert view.subtitle.endswith("1 measured on a checkpoint that is no longer there")
    assert view.columns["coverage"] == [0.0, 0.5]
    assert view.columns["freshness"] == ["not checked", "checkpoint has changed"]


def test_inside_adds_up(dense):
    view = inside.build(dense.index)
    assert sum(view.columns["units"]) == len(dense.index.units)
    assert sum(view.columns["share"]) == pytest.approx(1.0)
    row = view.columns["role"].index("down")
    assert view.columns["shape"][row] == "96 x 256"
    assert view.columns["int4-g64"][row] == short_bytes(30 * parse_format("int4-g64").payload_bytes(96, 256))


def test_inside_tells_experts_apart(moe):
    view = inside.build(moe.index)
    assert view.columns["units"][view.columns["role"].index("down (experts)")] == 48 * 128
    assert "128 experts a layer, 2 at a time" in view.subtitle


def _request(**changes):
    base = {"metrics": ("weight_error",), "bits": ("4", "2"), "group": "64", "symmetric": False, "calibration": "", "tokens": 8192, "seq_len": 128, "seed": 0}  # fmt: skip
    return RunRequest(**{**base, **changes})


@pytest.mark.parametrize(("group", "symmetric"), [("64", False), ("channel", True), ("32", True)])
def test_the_form_names_real_formats(group, symmetric):
    request = _request(group=group, symmetric=symmetric)
    assert tuple(f.name for f in expand_formats(request.pattern)) == request.formats
    assert [parse_format(f).bits for f in request.formats] == [2, 4]
    assert _request(bits=("3",)).pattern == "int3-g64"


@pytest.mark.parametrize("changes", [{"metrics": ()}, {"bits": ()}, {"tokens": 64}])
def test_an_incomplete_form_says_so(changes):
    with pytest.raises(UserError):
        _request(**changes).check()


def test_options_of_the_form():
    assert _request().pairs == ()
    request = _request(options='draws=4 answer_marker="<|im_start|> x"', per_document=True)
    assert request.pairs == ("draws=4", "answer_marker=<|im_start|> x")
    assert request.text_mode == "document"
    with pytest.raises(UserError, match="options"):
        _request(options='draws="4').check()


def test_cost_in_words():
    rows = [{"metric": "a", "steps": 3, "bytes_read": 2**21, "forward_tokens": 100, "backward_tokens": 50, "seconds": 70.0},
            {"metric": "b", "steps": 1, "bytes_read": 0, "forward_tokens": 0, "backward_tokens": 0, "seconds": 20.0}]  # fmt: skip
    view = estimate_view("demo", rows)
    assert view.title == "Measuring 2 metrics on demo takes about 2 min"
    assert view.subtitle == "4 steps, each safe once it is done · 150 tokens through the model · 2.0 MiB read"
    loading = {
        "metric": "loading",
        "steps": 0,
        "bytes_read": 0,
        "forward_tokens": 0,
        "backward_tokens": 0,
        "seconds": 10.0,
    }
    assert estimate_view("demo", [loading, rows[0]]).title == "Measuring a on demo takes about 1 min"
    assert cost_table(rows)["about"] == ["1 min", "20 s"]


def test_words():
    assert [duration(s) for s in (0.2, 8, 200, 7200, 7800, float("nan"))] == ["1 s", "8 s", "3 min", "2 h", "2 h 10 min", "unknown"]  # fmt: skip
    assert [params(n) for n in (12, 820_000, 134_500_000, 30.5e9)] == ["12", "820 k", "134 M", "30.5 B"]
    assert [short_bytes(n) for n in (512, 2**23, 22.4 * 2**30)] == ["512 B", "8.0 MiB", "22.4 GiB"]
    assert [count(1, "unit"), count(1024, "unit"), count(2, "match", "es")] == [
        "1 unit",
        "1,024 units",
        "2 matches",
    ]


def test_units_are_those_of_the_metrics():
    from bitatlas.analysis.metrics import METRICS  # loads torch, which the views must not

    for metric in METRICS.values():
        values = {name: metric_unit(name) for name in metric.EMITS}
        assert values.get(metric.NAME, metric.UNIT) in (metric.UNIT, "power-law exponent")
        assert not set(values) & set(values.values())
