"""Views and figures that were made before: the same study and the same controls give the same ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import streamlit as st

from bitatlas.app.studies import Study

__all__ = ["kept"]

T = TypeVar("T")


def kept(study: Study, *key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it gave for this study (its runs) and key before; shared by all sessions, so not to be changed."""
    runs = tuple(t.run for t in study.tables.values())
    return cast(T, _made((study.index.digest, runs, key), make))


@st.cache_resource(max_entries=128, show_spinner=False)
def _made(key: Hashable, _make: Callable[[], object]) -> object:
    return _make()
