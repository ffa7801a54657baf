"""The Export page's view says what the engine said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitatlas.analysis.schema import Allocation
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.views.export import build_export, first_shown

VLLM = TARGETS["vllm"]


@pytest.fixture
def index(fakes):
    return fakes.dense_index()


@pytest.fixture
def plan_of(allocate):
    """An allocation with K and V at 8 bits."""
    return lambda index, formats: replace(
        allocate(index, formats), kv=dict.fromkeys(range(index.n_layers), ("kv8-channel", "kv8-token"))
    )


def test_rules_by_hand_are_not_what_the_page_opens_with() -> None:
    assert first_shown(["first_last", "uniform", "mckp", "path"]) == 2
    assert first_shown(["q4_k_m", "evopress", "mckp"]) == 1
    assert first_shown(["uniform", "q4_k_m"]) == 0


def test_notes_bytes_and_the_cache(index, plan_of) -> None:
    plan = plan_of(index, {u.key: "bf16" if u.layer < 0 else "int3-g32-sym" for u in index.units})
    verdict, view = VLLM.check(plan, index), build_export(VLLM, plan, index)
    assert view.status == SERVABLE
    assert any("Humming" in n for n in view.notes)
    assert (view.notes, view.bytes, view.kv) == (verdict.notes, verdict.bytes, "--kv-cache-dtype fp8")
    assert (view.units, view.repaired) == ((), "")


def test_refused_units_and_the_repaired_plan(index, plan_of) -> None:
    plan = plan_of(index, {u.key: "bf16" if u.layer < 0 else "int3-channel" for u in index.units})
    view = build_export(VLLM, plan, index)
    assert {u.unit for u in view.units} == {u.key for u in index.units if u.layer >= 0}
    fixed = Allocation.from_json(view.repaired)
    assert VLLM.check(fixed, index).status == SERVABLE
    assert all((u.planned, u.after) == ("int3-channel", fixed.formats[u.unit]) for u in view.units)
    assert build_export(TARGETS["mlx"], plan, replace(index, model_type="nobody")).repaired == ""


@pytest.mark.parametrize(
    ("pick", "status"),
    [
        (lambda u: "int4-g32-sym", "servable"),
        (lambda u: "int8-g32-sym" if u.expert == 3 else "int4-g32-sym", "loads but decodes wrong"),
        (lambda u: "int3-channel" if u.expert < 0 else "int4-g32-sym", "rejected"),
    ],
)
def test_files_and_command_are_there_unless_it_is_rejected(fakes, plan_of, pick, status: str) -> None:
    index = fakes.moe_index(layers=2, experts=4)
    plan = plan_of(index, {u.key: "bf16" if u.layer < 0 else pick(u) for u in index.units})
    view = build_export(VLLM, plan, index)
    assert view.status == status
    assert (
        view.title
        == f"{VLLM.TITLE} "
        + {
            "servable": "loads and serves this allocation",
            "loads but decodes wrong": "would load this allocation and decode it wrong",
            "rejected": "cannot load this allocation",
        }[status]
    )
    usable = status != "rejected"
    assert view.files == (VLLM.render(plan, index) if usable else {})
    assert view.command == (VLLM.command(plan, index) if usable else "")
    assert bool(view.reasons) == bool(view.units) == bool(view.change) == (status != "servable")
    odd = {u.key for u in index.units if pick(u) != "int4-g32-sym" and u.layer >= 0}
    assert odd <= {u.unit for u in view.units}
    assert {u.unit for u in view.units if u.after} == odd  # the change touches no other
    if odd:
        assert VLLM.check(Allocation.from_json(view.repaired), index).status == "servable"
