"""Cached access to studies for the pages: shared by all sessions, renewed when the results file has changed."""

from __future__ import annotations

import os

import numpy as np
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.analysis.trust import Trust
from bitatlas.app import studies
from bitatlas.app.studies import Study, StudyInfo
from bitatlas.app.tasks.agreeing import trust_rows
from bitatlas.app.views.metric_agreement import matrix

__all__ = ["forget", "get_freshness", "get_matrix", "get_studies", "get_study", "get_trust", "the_study"]

_Signature = tuple[tuple[int, int], ...]


def get_studies() -> list[StudyInfo]:
    """The library."""
    return _list(*_key())


def get_study(digest: str) -> Study:
    """A loaded study; loaded once until something is added to it.

    Raises:
        UserError: no such model.
    """
    root, signature = _key()
    return _load(root, digest, _stamp(root, signature, digest))


def the_study() -> Study | None:
    """The study chosen in the frame, None while there is none."""
    digest = st.session_state.get("_study")
    return get_study(digest) if digest else None


def get_trust(digest: str) -> list[Trust]:
    """The trust table of a model, best metric first; empty while no truth has been measured."""
    root, signature = _key()
    return _trust(root, digest, _stamp(root, signature, digest))


def get_matrix(digest: str, format: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and rank correlations of every two metrics at a format."""
    root, signature = _key()
    return _matrix(root, digest, _stamp(root, signature, digest), format)


def get_freshness() -> dict[str, str]:
    """Digest -> is the checkpoint on disk still the one measured; looked at every half minute at most."""
    return {s.digest: _fresh(s.path, s.digest, s) for s in get_studies()}


def forget() -> None:
    """Look again now: something was just added."""
    _signature.clear()
    _list.clear()
    _stamp.clear()


def _key() -> tuple[str, _Signature]:
    root = str(studies.home().root)
    return root, _signature(root)


@st.cache_data(ttl=2, show_spinner=False)
def _signature(root: str) -> _Signature:
    """Size and time of the results file and its log: cheap to read, different after every write.

    Asking the file itself takes a tenth of a second and more, far too long for every turn of a slider. At
    most every two seconds, so that a running job does not make the pages ask all the time.
    """
    found = []
    for path in (studies.home().db, studies.home().db.with_suffix(".duckdb.wal")):
        try:
            status = os.stat(path)
            found.append((status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            found.append((0, 0))
    return tuple(found)


@st.cache_data(max_entries=2, show_spinner=False)
def _list(root: str, signature: _Signature) -> list[StudyInfo]:
    return studies.list_studies(studies.open_store())


@st.cache_data(ttl=30, show_spinner=False, hash_funcs={StudyInfo: lambda s: s.digest})
def _fresh(path: str, digest: str, info: StudyInfo) -> str:
    return studies.freshness(info)


@st.cache_data(max_entries=64, show_spinner=False)
def _stamp(root: str, signature: _Signature, digest: str) -> tuple[str, ...]:
    return studies.stamp(studies.open_store(), digest)


@st.cache_resource(max_entries=4, show_spinner="Opening the study")
def _load(root: str, digest: str, stamp: tuple[str, ...]) -> Study:
    return studies.load_study(studies.open_store(), digest)


@st.cache_resource(max_entries=4, show_spinner=False)
def _trust(root: str, digest: str, stamp: tuple[str, ...]) -> list[Trust]:
    home, store = studies.home(), studies.open_store()
    try:
        return trust_rows(store, store.model(digest), home)
    except UserError:
        return []


@st.cache_resource(max_entries=16, show_spinner=False)
def _matrix(
    root: str, digest: str, stamp: tuple[str, ...], format: str
) -> tuple[tuple[str, ...], np.ndarray]:
    return matrix(_load(root, digest, stamp), format)
