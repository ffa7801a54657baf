"""The verifying job: quantisers, packed folders, and what is stored about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app.jobs.work import load_work
from bitatlas.app.tasks import verifying
from bitatlas.app.views.verify import build_verify
from bitatlas.app.work.pack import pack_model
from bitatlas.app.work.pack_job import PackWork
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format

WORDS = "the of and to in a is that it was for on are as with his they at be this from have or by one had not but what"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = WORDS.split()
    path.write_text(
        "\n".join(" ".join(words[(i * 7 + j * j) % len(words)] for j in range(30)) for i in range(60))
    )
    return path


def uniform(model: Path, name: str) -> Allocation:
    index, fmt = index_model(model), parse_format(name)
    payload = sum(fmt.payload_bytes(u.rows, u.cols) for u in index.units)
    formats = dict.fromkeys(index.unit_keys(), name)
    return Allocation(
        index.digest, index.name, formats, payload, index.kept_bytes, payload * 8 / index.params
    )


def run(kind: str, params: dict[str, Any], home: Home) -> dict[str, Any]:
    work = load_work(kind, params, home)
    for key in work.plan():
        work.run(key)
    return work.finish()


def test_a_packed_folder_and_its_plan_are_judged_alike(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("qwen3")
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        verifying, "submit", lambda kind, params, title: asked.append((kind, params)) or "job"
    )
    plan, home = uniform(model, "int2-g32"), Home(tmp_path / "home")
    key = Store(home).put_allocation(plan)
    index = index_model(model)
    pack = {"model": index.path, "digest": index.digest, "allocation": key, "output": str(tmp_path / "packed"),
            "quantizer": "awq", "calibration": str(text), "tokens": 512, "seq_len": 32, "seed": 0}  # fmt: skip
    run(PackWork.KIND, pack, home)
    options: dict[str, Any] = {
        "text": text,
        "tokens": 256,
        "seq_len": 32,
        "calibration_tokens": 512,
        "calibration_seq_len": 32,
    }
    verifying.submit_verify(model, [plan, tmp_path / "packed"], quantizer="awq", calibration=text, **options)
    verifying.submit_verify(model, plan, **options)
    found = [run(kind, params, home)["results"] for kind, params in asked]
    (planned, shipped), (rounded,) = found
    assert [r["quantizer"] for r in (planned, shipped, rounded)] == ["awq", "awq", "rtn"]
    assert shipped["kl_mean"] == pytest.approx(planned["kl_mean"], rel=1e-3)
    assert shipped["packed"] == str((tmp_path / "packed").resolve())
    assert rounded["kl_mean"] != pytest.approx(planned["kl_mean"], rel=1e-2)
    assert (
        "quantizer" not in asked[1][1]
    )  # the request of earlier versions, so that their jobs are still the same

    store = Store(home)
    view = build_verify({a.id: a for a in store.allocations()}, store.verifications(), frozenset())
    assert sorted((r.quantizer, bool(r.packed)) for r in view.rows) == [
        ("awq", False),
        ("awq", True),
        ("rtn", False),
    ]


def test_a_folder_with_a_kv_plan_reads_the_cache_by_it(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, home = tiny_checkpoint("qwen3"), Home(tmp_path / "home")
    monkeypatch.setenv("BITATLAS_HOME", str(home.root))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(verifying, "submit", lambda kind, params, title: asked.append(params) or "job")
    plain = uniform(model, "int8-g32")
    plan = replace(plain, kv={0: ("kv2-channel", "kv2-token")}, kv_block=4, kv_residual=2)
    for name, allocation in (("packed", plan), ("plain", plain)):
        pack_model(index_model(model), allocation, tmp_path / name)
    folders = [tmp_path / "packed", tmp_path / "plain"]
    verifying.submit_verify(model, [plan, *folders], text=text, tokens=256, seq_len=32)
    planned, shipped, at_16_bits = run("verify", asked[0], home)["results"]
    assert shipped["kl_mean"] == pytest.approx(planned["kl_mean"], rel=1e-3)
    assert shipped["ppl_before"] == at_16_bits["ppl_before"]  # the original keeps its own precision
    assert shipped["kl_mean"] > 2 * at_16_bits["kl_mean"]
    # Results from before the cache was read belong to another request; those without a plan are still the same.
    assert ["kv" in p for p in asked[0]["packed"]] == [True, False]
    verifying.submit_verify(model, folders[0], text=text, tokens=32, seq_len=5)
    with pytest.raises(UserError, match="too short to see the quantised KV cache"):
        load_work("verify", asked[1], home).plan()


def test_wrong_requests_say_so(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    model, other = tiny_checkpoint("qwen3"), tiny_checkpoint("llama")
    plan = uniform(model, "int4-g32")
    with pytest.raises(UserError, match="no quantizer called"):
        verifying.submit_verify(model, plan, text=text, quantizer="magic")
    with pytest.raises(UserError, match="gptq needs a calibration text"):
        verifying.submit_verify(model, plan, text=text, quantizer="gptq")
    with pytest.raises(UserError, match="not a packed checkpoint"):
        verifying.submit_verify(model, tmp_path, text=text)
    pack_model(index_model(other), uniform(other, "int4-g32"), tmp_path / "packed")
    with pytest.raises(UserError, match="packed from another model"):
        verifying.submit_verify(model, tmp_path / "packed", text=text)
