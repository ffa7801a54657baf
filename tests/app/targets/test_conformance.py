"""What every target must keep to, whatever engine it is for."""

from __future__ import annotations

import json
import random
import re

import pytest

from bitatlas.analysis.schema import FORMATS, UserError
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS, WRONG, get_target

MODELS = [
    {"kind": "llama"},
    {"kind": "llama", "tied": True},
    {"kind": "qwen3_moe", "experts": 4},
    {"kind": "mixtral", "experts": 4},
    {"kind": "nobody_knows_it"},
]
every_target = pytest.mark.parametrize("name", list(TARGETS))


@every_target
def test_names_and_words(name: str) -> None:
    target = TARGETS[name]
    assert name == target.NAME
    assert target.TITLE
    assert target.SERVES
    assert set(target.format_names()) == {f for f, fmt in FORMATS.items() if target.loads(fmt)}
    assert "bf16" in target.format_names()


@every_target
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_smallest_change_makes_it_servable(name: str, model: dict, make_index, allocate) -> None:
    target, index = TARGETS[name], make_index(**model)
    rng = random.Random(name)
    for _ in range(6):
        palette = rng.sample(list(FORMATS), rng.randint(1, 5))
        formats = {u.key: rng.choice(palette) for u in index.units}
        verdict = target.check(allocate(index, formats), index)
        assert verdict.status in (SERVABLE, WRONG, REJECTED)
        assert (verdict.status == SERVABLE) == (not verdict.findings)
        assert set(verdict.units) <= set(formats)
        json.dumps(verdict.to_dict(), allow_nan=False)
        if verdict.status == SERVABLE:
            assert verdict.change == ""
        elif verdict.changes:
            assert set(verdict.changes) <= set(verdict.units)  # nobody else is touched
            assert all(formats[u] != f for u, f in verdict.changes.items())
            after = target.check(allocate(index, formats | dict(verdict.changes)), index)
            assert after.status == SERVABLE
        else:
            assert "no choice of formats" in verdict.change


@every_target
def test_ties_and_allowed_formats_are_enough_to_be_servable(name: str, make_index, allocate) -> None:
    target, rng = TARGETS[name], random.Random(3)
    for model in MODELS[:3]:
        index = make_index(**model)
        formats = {u.key: rng.choice(target.allowed(u, index)) for u in index.units}
        units = {u.key: u for u in index.units}
        for tie in target.ties(index):
            common = set.intersection(*(set(target.allowed(units[u], index)) for u in tie.units))
            formats.update(dict.fromkeys(tie.units, rng.choice(sorted(common))))
        assert target.check(allocate(index, formats), index).status == SERVABLE


@every_target
def test_files_are_deterministic_and_scripts_are_python(name: str, make_index, allocate) -> None:
    target = TARGETS[name]
    index = make_index("qwen3_moe", experts=2)
    formats = {u.key: "bf16" if u.role in ("embed", "head") else "int4-g64-sym" for u in index.units}
    plan = allocate(index, formats)
    files = target.render(plan, index)
    assert files == target.render(plan, index)
    assert target.command(plan, index) in files["run.sh"]
    assert "'/models/tiny model'" in files["run.sh"]  # quoted for the shell
    for file, text in files.items():
        assert re.fullmatch(r"[\w.-]+", file)
        assert text.endswith("\n")
        if file.endswith(".py"):
            compile(text, file, "exec")
        if file.endswith((".json", ".yaml")):
            json.loads(text)


@every_target
def test_an_allocation_for_another_model_is_refused(name: str, make_index, allocate) -> None:
    plan = allocate(make_index(), "int4-g64")
    with pytest.raises(UserError, match="another model"):
        TARGETS[name].check(plan, make_index(layers=3))


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="llama.cpp"):
        get_target("llamacpp")
