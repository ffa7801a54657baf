"""What a person is looking at, kept in the session and in the URL.

Widgets keep themselves in the URL (``bind="query-params"``, survives page switches). What is no widget lives here: the
selection (``sel``), the pins (``pins``) and the budget (``budget``), each mirrored into the query string, because
Streamlit drops unbound parameters on a page switch. The URL wins when it says something new (a link, the back button).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from urllib.parse import urlencode

import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app.selection import EditList, Selection, decode_pins, encode_pins
from bitatlas.app.shelf import Shelf
from bitatlas.app.studies import Study, home
from bitatlas.app.views.fit_controls import Asked, decode_question, encode_question

__all__ = [
    "KEYS",
    "budget",
    "choose_study",
    "edits",
    "free_selection",
    "job",
    "link",
    "pin_selection",
    "pins",
    "question",
    "redo",
    "restore",
    "select",
    "selection",
    "selection_epoch",
    "set_budget",
    "set_job",
    "set_question",
    "shown_selection",
    "sync",
    "undo",
]

KEYS = ("sel", "pins", "budget", "job", "ask")
_SEEN = "_url:"


def _shelf() -> Shelf:
    return Shelf(home().root / "views")


def sync(study: Study | None) -> UserError | None:
    """Run once per page draw, before anything reads the state: adopt a new URL, write back what the URL lost.

    Returns what is wrong with the link, if something is; the broken part is then dropped.
    """
    problem = None
    for key in KEYS:
        word, seen = st.query_params.get(key), st.session_state.get(_SEEN + key)
        if word and word != seen:
            try:
                _adopt(key, _shelf().get(word), study)
                st.session_state[_SEEN + key] = word
            except UserError as e:
                problem = e
                st.query_params.pop(key, None)
        elif word is None and seen:
            st.query_params[key] = seen
    return problem


def _adopt(key: str, text: str, study: Study | None) -> None:
    units = len(study.keys) if study else 0
    if key == "sel":
        st.session_state["_selection"] = Selection.decode(text, units)
        _bump()
    elif key == "pins":
        st.session_state["_edits"] = decode_pins(text, units)
    elif key == "job":
        if not re.fullmatch(r"[\w-]{1,64}", text):
            raise UserError(
                "the job in this link cannot be read", found=text[:80], fix="choose a job on the Run page"
            )
        st.session_state["_job"] = text
    elif key == "ask":
        st.session_state["_ask"] = decode_question(text)
    else:
        used, _, limit = text.partition("-")
        if not (used.isdigit() and limit.isdigit()):
            raise UserError(
                "the budget in this link cannot be read", found=text, fix="set it on the Fit page"
            )
        st.session_state["_budget"] = (int(used), int(limit))


def _write(key: str, text: str) -> None:
    word = _shelf().put(text) if text else ""
    st.session_state[_SEEN + key] = word
    if word:
        st.query_params[key] = word
    else:
        st.query_params.pop(key, None)


def restore(study_digest: str) -> None:
    """Forget selection and pins when the study changes: unit ids mean nothing in another model."""
    before = st.session_state.get("_study")
    st.session_state["_study"] = study_digest
    if before is not None and before != study_digest:
        st.session_state["_edits"] = EditList()
        st.session_state.pop("_budget", None)
        st.session_state.pop("_ask", None)
        select(Selection())
        for key in ("pins", "budget", "ask"):
            _write(key, "")


def selection() -> Selection:
    """The selected units."""
    return st.session_state.get("_selection", Selection())


def select(chosen: Selection, *, from_chart: bool = False) -> None:
    """Replace the selection. A chart that made it itself says so, and is not drawn anew."""
    if chosen == selection():
        return
    st.session_state["_selection"] = chosen
    _write("sel", chosen.encode())
    if not from_chart:
        _bump()


def selection_epoch() -> int:
    """Counts the selections that did not come from a chart; charts show the selection of their epoch."""
    return int(st.session_state.get("_epoch", 0))


def shown_selection(chart: str, controls: Hashable) -> Selection:
    """The selection that a chart draws: renewed when it comes from elsewhere, or when the chart changes anyway.

    What was boxed since then the browser shows by itself; drawing it anew would take the box away.
    """
    stamp = selection_epoch(), controls
    if st.session_state.get(f"_{chart}_epoch") != stamp:
        st.session_state[f"_{chart}_epoch"] = stamp
        st.session_state[f"_{chart}_shown"] = selection()
    shown: Selection = st.session_state[f"_{chart}_shown"]
    return shown


def _bump() -> None:
    st.session_state["_epoch"] = selection_epoch() + 1


def edits() -> EditList:
    """The commands so far, with the undo cursor."""
    return st.session_state.get("_edits", EditList())


def pins() -> dict[int, str]:
    """Unit id -> pinned format."""
    return edits().pins()


def _change(step: Callable[[EditList], EditList]) -> None:
    st.session_state["_edits"] = step(edits())
    _write("pins", encode_pins(pins()))


def pin_selection(format: str) -> None:
    """Pin the selected units to ``format``."""
    if len(selection()):
        _change(lambda e: e.add(selection(), format))


def free_selection() -> None:
    """Take the pins off the selected units."""
    if len(selection()):
        _change(lambda e: e.add(selection(), ""))


def undo() -> None:
    """Take the last pin command back."""
    _change(EditList.undo)


def redo() -> None:
    """Do it again."""
    _change(EditList.redo)


def budget() -> tuple[int, int] | None:
    """(bytes used by the current plan, bytes allowed), None before anything was planned."""
    return st.session_state.get("_budget")


def set_budget(used_bytes: int, limit_bytes: int) -> None:
    """Set by the Fit page; shown on every page."""
    st.session_state["_budget"] = (int(used_bytes), int(limit_bytes))
    _write("budget", f"{int(used_bytes)}-{int(limit_bytes)}")


def question() -> Asked | None:
    """What was last asked on the Fit page, None before."""
    return st.session_state.get("_ask")


def set_question(asked: Asked) -> None:
    """Set by the Fit page, for the pages that compare with its answer."""
    if asked != question():
        st.session_state["_ask"] = asked
        _write("ask", encode_question(asked))


def job() -> str:
    """The job in view, "" for none."""
    return st.session_state.get("_job", "")


def set_job(job: str) -> None:
    """Look at this job."""
    st.session_state["_job"] = job
    _write("job", job)


def choose_study(label: str) -> None:
    """Make the study with this label (`StudyInfo.label`) the current one; in a callback."""
    st.session_state["study"] = label


def link() -> str:
    """The address of this view."""
    base = (st.context.url or "").split("?")[0]
    query = urlencode([(k, v) for k in st.query_params for v in st.query_params.get_all(k)])
    return f"{base}?{query}" if query else base
