"""Pages opened without a browser."""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import bitatlas.app
from bitatlas.analysis.schema import ModelIndex
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["heading", "index_of", "open_page"]

_MAIN = Path(next(iter(bitatlas.app.__path__))) / "main.py"


def open_page(address: str, **query: str) -> AppTest:
    """The page at ``address`` with this query string, as a server that was just started shows it."""
    st.cache_data.clear()
    st.cache_resource.clear()
    at = AppTest.from_file(str(_MAIN), default_timeout=60)
    for key, value in query.items():
        at.query_params[key] = value
    # AppTest can only switch between page files; a deep link to a callable page starts at the hash of its address.
    at._page_hash = calc_hash(address)
    at.run()
    assert not at.exception, [e.value for e in at.exception]
    return at


def index_of(study: str) -> ModelIndex:
    """The stored model that a label of the study picker means."""
    store = Store(Home.default())
    return store.model(next(m["digest"] for m in store.models() if study.endswith(m["digest"][:8])))


def heading(at: AppTest) -> str:
    """The page's title."""
    return next(m.value for m in at.markdown if m.value.startswith("## "))
