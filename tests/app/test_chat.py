"""Chat and side-by-side answers, on a packed folder and on its original."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.app.cli_io import emit, spoken_lines
from bitatlas.app.jobs.work import load_work
from bitatlas.app.talker import Talker
from bitatlas.app.tasks import verifying
from bitatlas.app.views.verify import build_answers
from bitatlas.app.work.answers import refuses, with_tail
from bitatlas.app.work.pack import pack_model
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.kv.cache import PackedKvCache

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    index = index_model(model)
    chosen = dict.fromkeys(index.unit_keys(), "nf4-g32")
    payload = sum(parse_format("nf4-g32").payload_bytes(u.rows, u.cols) for u in index.units)
    plan = Allocation(index.digest, index.name, chosen, payload, index.kept_bytes, payload * 8 / index.params)
    out = model.parent / "packed"
    pack_model(index, plan, out)
    return out


def test_a_conversation_from_a_pipe(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []
    answer = Talker.answer
    monkeypatch.setattr(Talker, "answer", lambda self, m, n: seen.append([*m]) or answer(self, m, n))
    told: list[str] = []
    pipe = io.StringIO("hello\n\n  /reset\nwho are you?\nand now?\n/quit\nnever\n")
    said = tasks.chat(packed, spoken_lines(pipe), system="be brief", max_new_tokens=3, say=told.append)
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [len(m) for m in seen] == [2, 2, 4]
    assert [m["content"] for m in said if m["role"] == "assistant"] == told[1:]
    assert said[1]["content"] == "who are you?"


def test_the_template_is_used_and_the_answer_is_generates_own(model: Path, packed: Path) -> None:
    import torch

    talker = Talker.packed(packed)
    said = talker.answer([{"role": "user", "content": "hi"}], 5)
    ids = talker.tokenizer("<user>hi\n<assistant>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            best = talker.model(ids).logits[0, -1].argmax()
            if int(best) == talker.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best.view(1, 1)], 1)
    whole = talker.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert said == whole.removeprefix("<user>hi\n<assistant>").strip()
    with pytest.raises(UserError, match="between 1 and 4096"):
        tasks.chat(packed, ["hi"], max_new_tokens=0)
    with pytest.raises(UserError):
        tasks.chat(model.parent / "nothing", ["hi"])


def test_a_folder_with_a_kv_plan_answers_from_the_packed_cache(model: Path, tmp_path: Path) -> None:
    import torch

    index = index_model(model)
    chosen = dict.fromkeys(index.unit_keys(), "int8-g32")
    plan = Allocation(index.digest, index.name, chosen, 1, 1, 8.0, kv={0: ("kv2-channel", "kv2-token")}, kv_block=4,
                      kv_residual=0)  # fmt: skip
    pack_model(index, plan, tmp_path / "packed")
    talker, ids = Talker.packed(tmp_path / "packed"), torch.arange(1, 40).view(1, -1)
    out, kv_bytes = talker.go_on(ids, 24)
    assert kv_bytes
    cache = PackedKvCache(talker.model.config, plan.kv_plan, plan.kv_layout)
    want = talker.model.generate(
        ids, max_new_tokens=24, do_sample=False, pad_token_id=0, past_key_values=cache
    )
    assert torch.equal(out, want)
    assert kv_bytes == cache.nbytes  # measured: the cache was there and is packed
    made: list[int | None] = []
    talker.go_on = lambda ids, n: made.append(n) or (ids, None)
    talker.answer([{"role": "user", "content": "hi"}], 5)
    assert made == [5]
    original = Talker.original(index)
    assert original.go_on(ids, 4)[1] is None


def test_answers_side_by_side(
    model: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path))
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(verifying, "submit", lambda kind, params, title: asked.append(params) or "job")
    tasks.submit_answers(model, packed, ["To be", " ", "or not"], max_new_tokens=4)
    home = Home(tmp_path)
    plan = load_work("answers", asked[0], home).plan()
    assert len(plan) == 4
    for key in plan:  # a new process for each: nothing is lost
        load_work("answers", asked[0], home).run(key)
    result = load_work("answers", asked[0], home).finish()
    rows = result["answers"]
    for row, prompt in zip(rows, ("To be", "or not"), strict=True):
        turn = [{"role": "user", "content": prompt}]
        assert row["original"] == Talker.original(index_model(model)).answer(turn, 4)
        assert row["packed"] == Talker.packed(packed).answer(turn, 4)
        assert row["same"] == (row["original"] == row["packed"])
    # Verified after the job was done: the same request is the same job, and shows it all the same.
    assert with_tail(result, home)["tail"] == []
    kl = {"kl_mean": 0.1, "kl_p50": 0.05, "kl_p99": 2.5, "flips": 0.25}
    row = {"model_digest": index_model(model).digest, "allocation": "a", "text_digest": "t", "tokens": 1, "kl_stderr": 0.0,
           "ppl_before": 1.0, "ppl_after": 1.0, "floor": 0.0, "sequences": [0.1], "packed": result["packed"], **kl}  # fmt: skip
    Store(home).put_verification(row)
    assert with_tail(result, home)["tail"] == [kl]
    view = build_answers(result)
    assert view.title.startswith(f"{sum(not r['same'] for r in rows)} of 2 answers differ; 0 refusals")
    with pytest.raises(UserError, match="no prompt"):
        tasks.submit_answers(model, packed, [" "])


def test_changed_refusals_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuses("I\u2019m sorry, but I cannot help with that.")
    assert not refuses("Mix flour and water. If it is dry I cannot say why.")
    assert not refuses("Certainly! I'm sorry to hear that.")
    row = {
        "prompt": "p",
        "original": "a",
        "packed": "b",
        "same": False,
        "original_refuses": True,
        "packed_refuses": False,
    }
    tail = [{"kl_mean": 0.1, "kl_p99": 2.5, "flips": 0.25}]
    told = row | {"prompt": "q", "original_refuses": False}
    same = told | {"prompt": "r", "packed": "a", "same": True}
    result = {"answers": [same, told, row], "changed_refusals": 1, "tail": tail}
    view = build_answers(result)
    assert [r["change"] for r in view.rows] == ["no longer refuses", "differs", "same"]
    assert "2.5 nats" in view.detail
    assert "25.0%" in view.detail
    # The command line prints the same view.
    emit(result, False, "answers")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(">")] == [
        "> p  [no longer refuses]",
        "> q  [differs]",
        "> r  [same]",
    ]
    assert lines[-2:] == [view.title, view.detail]
    emit({"id": "j", "state": "queued"}, False, "answers")  # --detach: no answers yet
    assert "queued" in capsys.readouterr().out
