"""Modules leave the garbage collector's sight once, and garbage does not go with them."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest

from bitatlas.app.widgets.settle import settle


class Ring:
    def __init__(self) -> None:
        self.own = self


def test_settles_once_for_each_new_module(monkeypatch: pytest.MonkeyPatch) -> None:
    settle()
    before = gc.get_freeze_count()
    assert before > 0
    assert not settle()
    assert gc.get_freeze_count() <= before
    monkeypatch.setitem(sys.modules, "settle_test_module", types.ModuleType("settle_test_module"))
    ring = weakref.ref(Ring())
    assert settle()
    assert ring() is None
    gc.unfreeze()
