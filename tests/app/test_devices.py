"""The words of --device and --dtype, and that they reach the models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.app.devices import pick_device, pick_dtype
from bitatlas.app.jobs.work import load_work
from bitatlas.app.talker import Talker
from bitatlas.app.tasks import verifying
from bitatlas.app.work.pack import pack_model
from bitatlas.cache.paths import Home
from bitatlas.kernels.errors import UserError


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    index = index_model(tiny_checkpoint("llama"))
    plan = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), "int8-g32"), 1, 1, 8.0)
    out = tmp_path_factory.mktemp("devices") / "packed"
    pack_model(index, plan, out)
    return out


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 200))
    assert [pick_device(word) for word in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert pick_device("auto", 101) == "cpu"
    assert pick_dtype("auto", "cuda") == torch.bfloat16
    assert pick_dtype("float16", "cpu") == torch.float16


def test_a_missing_gpu_and_unknown_words_say_so(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    for ask in (lambda: tasks.generate(packed, "hi", device="cuda"),
                lambda: tasks.chat(packed, ["hi"], device="cuda")):  # fmt: skip
        with pytest.raises(UserError, match="no GPU that torch can use") as error:
            ask()
        assert "--device" in error.value.fix
    with pytest.raises(UserError, match="no device 'tpu'"):
        tasks.generate(packed, "hi", device="tpu")
    with pytest.raises(UserError, match="no dtype 'int4'"):
        tasks.chat(packed, ["hi"], dtype="int4")


def test_the_words_reach_the_model_and_the_ids_its_device(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Talker.packed(packed).model.dtype == torch.float32
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr("bitatlas.app.talker.pick_device", lambda d, n=0: seen.append((d, n)) or "cpu")
    assert tasks.generate(packed, "To be", max_new_tokens=2, device="cuda", dtype="bfloat16")["tokens"] >= 1
    assert seen[0][0] == "cuda"
    assert seen[0][1] > 1000
    assert Talker.packed(packed, "cpu", "bfloat16").model.dtype == torch.bfloat16

    told: dict[str, Any] = {}
    model = SimpleNamespace(
        device=torch.device("meta"), config=None,
        generate=lambda ids, **options: told.update(options, ids=ids) or ids,
    )  # fmt: skip
    Talker(model, SimpleNamespace(pad_token_id=0, eos_token_id=0)).go_on(torch.tensor([[1, 2]]), 3)
    assert {told["ids"].device.type, told["attention_mask"].device.type} == {"meta"}


def test_jobs_carry_the_words(
    packed: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, model = Home(tmp_path / "home"), tiny_checkpoint("llama")
    monkeypatch.setenv("BITATLAS_HOME", str(home.root))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(verifying, "submit", lambda kind, params, title: asked.append(params) or "job")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question " * 40)
    options: dict[str, Any] = {"text": text, "tokens": 64, "seq_len": 16}
    verifying.submit_verify(model, packed, **options)
    verifying.submit_verify(model, packed, device="cuda", dtype="bfloat16", **options)
    verifying.submit_answers(model, packed, ["hi"])
    verifying.submit_answers(model, packed, ["hi"], device="cuda", dtype="bfloat16")
    assert [(p.get("device"), p.get("dtype")) for p in asked] == [(None, None), ("cuda", "bfloat16")] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind, params, step in (("verify", asked[1], "sequences 0-3"), ("answers", asked[3], "original 0")):
        with pytest.raises(UserError, match="no GPU that torch can use"):
            load_work(kind, params, home).run(step)
    opened: list[tuple[Any, ...]] = []
    real = LoadedModel.open
    monkeypatch.setattr(
        LoadedModel, "open", lambda index, *place: opened.append(place) or real(index, *place)
    )
    half = load_work("verify", asked[1] | {"device": "cpu"}, home)
    whole = load_work("verify", asked[0], home)
    for work in (half, whole):
        for key in work.plan():
            work.run(key)
    assert opened == [(torch.bfloat16, "cpu"), (torch.float32, "cpu")]
    first, second = (work.finish()["results"][0] for work in (half, whole))
    assert first["kl_mean"] != second["kl_mean"]
