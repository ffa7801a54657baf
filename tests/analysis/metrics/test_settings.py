"""Options that cannot be are refused by name, with what was found and the default."""

from __future__ import annotations

import pytest

from bitatlas.analysis.metrics import METRICS
from bitatlas.analysis.metrics.settings import check_settings, plain_settings
from bitatlas.kernels.errors import UserError


@pytest.mark.parametrize(
    ("metric", "name", "value", "wanted"),
    [
        ("hawq_trace", "max_probes", 0, "whole number from 1 on"),
        ("prune", "prune_sequences", 0, "whole number from 1 on"),
        ("fisher_projection", "draws", "abc", "whole number from 1 on"),
        ("fisher_projection", "draws", 0, "whole number from 1 on"),
        ("fisher_projection", "draws", 1.5, "whole number from 1 on"),
        ("fisher_projection", "draws", True, "whole number from 1 on"),
        ("fisher_projection", "draws", None, "whole number from 1 on"),
        ("fisher_projection", "front_tokens", -1, "whole number from 0 on"),
        ("fisher_projection", "gradient_bytes", float("inf"), "whole number from 0 on"),
        ("fisher_projection", "tokens", "some", "one of all, answer, attention"),
        ("fisher_projection", "dtype", "int8", "one of .*bfloat16"),
        ("fisher_projection", "answer_marker", ["a"], "a text"),
        ("kl_flip", "cache_gib", float("nan"), "number from 0 on"),
        ("kl_flip", "cache_gib", "1GB", "number from 0 on"),
        ("alphaq", "size_factor", "no", "true or false"),
        ("mixllm_salience", "mixllm_top", 2, "number from 0 to 1"),
        ("kv_fisher", "score", "guesses", "one of signs, labels"),
        ("kl_flip", "quantizer", "magic", None),
        ("kl_flip", "flipps", 3, None),
    ],
)
def test_refused(metric, name, value, wanted):
    with pytest.raises(UserError, match=wanted) as raised:
        check_settings([METRICS[metric]], {name: value})
    assert raised.value.found
    if wanted:
        assert name in raised.value.what
        assert f"--set {name}=" in raised.value.fix


def test_taken():
    check_settings([METRICS["fisher_projection"]], {"draws": 3, "gradient_bytes": 2e9, "front_tokens": 0, "dtype": "bfloat16"})  # fmt: skip
    check_settings([METRICS["hawq_trace"]], {"probe_group": 2, "trace_tol": 1, "quantizer": "gptq"})
    check_settings([METRICS["kl_flip"], METRICS["alphaq"]], {"flip_sequences": 0, "size_factor": False})
    # Where metrics that share a name differ, each has its say.
    with pytest.raises(UserError, match="prune"):
        check_settings([METRICS["fisher_diag"], METRICS["prune"]], {"prune_sequences": 0})


@pytest.mark.parametrize("name", METRICS)
def test_defaults_are_taken(name):
    metric = METRICS[name]
    check_settings([metric], dict(metric.SETTINGS))
    # A limit of no option would be a slip of the pen; those of the KV cache are shared by all its metrics.
    assert metric.SUBJECT == "kv" or set(metric.LIMITS) <= set(metric.SETTINGS)


def test_a_prefix_names_the_metric_that_a_setting_is_for() -> None:
    one, both = [METRICS["expert_error"]], [METRICS["expert_error"], METRICS["kl_flip"]]
    assert plain_settings(one, {"expert_error.quantizer": "gptq"}) == {"quantizer": "gptq"}
    assert plain_settings(both, {"kl_flip.flips": 3, "shrink_tokens": 8}) == {"flips": 3, "shrink_tokens": 8}
    for metrics, settings, words in (
        (both, {"expert_error.quantizer": "gptq"}, "kl_flip would get the option quantizer of expert_error"),
        (one, {"kl_flip.flips": 3}, "kl_flip is not measured here"),
        (both, {"expert_error.flips": 3}, "expert_error has no option flips"),
        (one, {"quantizer": "rtn", "expert_error.quantizer": "gptq"}, "given twice"),
    ):
        with pytest.raises(UserError, match=words):
            plain_settings(metrics, settings)
