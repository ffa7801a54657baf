"""Cached access to studies for the pages: shared by all sessions, renewed when the store has something new."""

from __future__ import annotations

import streamlit as st

from bitatlas.app import studies
from bitatlas.app.studies import Study, StudyInfo

__all__ = ["forget", "get_freshness", "get_study", "get_studies", "the_study"]


def get_studies() -> list[StudyInfo]:
    """The library, at most two seconds old."""
    return _list(str(studies.home().root))


def get_study(digest: str) -> Study:
    """A loaded study; loaded once until something is added to it.

    Raises:
        UserError: no such model.
    """
    root = str(studies.home().root)
    return _load(root, digest, _stamp(root, digest))


def the_study() -> Study | None:
    """The study chosen in the frame, None while there is none."""
    digest = st.session_state.get("_study")
    return get_study(digest) if digest else None


def get_freshness() -> dict[str, str]:
    """Digest -> is the checkpoint on disk still the one measured; looked at every half minute at most."""
    return {s.digest: _fresh(s.path, s.digest, s) for s in get_studies()}


def forget() -> None:
    """Look again now: something was just added."""
    _list.clear()
    _stamp.clear()


@st.cache_data(ttl=2, show_spinner=False)
def _list(root: str) -> list[StudyInfo]:
    return studies.list_studies(studies.open_store())


@st.cache_data(ttl=30, show_spinner=False, hash_funcs={StudyInfo: lambda s: s.digest})
def _fresh(path: str, digest: str, info: StudyInfo) -> str:
    return studies.freshness(info)


@st.cache_data(ttl=2, show_spinner=False)
def _stamp(root: str, digest: str) -> tuple[str, ...]:
    return studies.stamp(studies.open_store(), digest)


@st.cache_resource(max_entries=4, show_spinner="Opening the study")
def _load(root: str, digest: str, stamp: tuple[str, ...]) -> Study:
    return studies.load_study(studies.open_store(), digest)
