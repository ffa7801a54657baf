"""What stands above every page: study, budget, selection, jobs, link."""

from __future__ import annotations

import streamlit as st

from bitatlas.app import state
from bitatlas.app.theme import Palette
from bitatlas.app.views.frame import budget_chip, selection_chip
from bitatlas.app.widgets.boxes import error_box
from bitatlas.app.widgets.data import get_studies, the_study
from bitatlas.app.widgets.jobs import job_ribbon

__all__ = ["draw_frame", "style", "title"]


def style(p: Palette) -> str:
    """The few things that Streamlit has no option for: space above the page, links that look like the main button."""
    return f"""<style>
.stMainBlockContainer {{padding: 2.2rem 2.2rem 2rem 2.2rem;}}
.st-key-frame {{border-bottom: 1px solid {p.grid}; padding-bottom: .55rem;}}
.st-key-frame p {{white-space: nowrap;}}
[data-testid="stHeader"] {{background: transparent; pointer-events: none;}}
[data-testid="stHeader"] > * {{pointer-events: auto;}}
[class*="st-key-primary_link_"] a {{background: {p.accent}; border-radius: .4rem; padding: .45rem .9rem;}}
[class*="st-key-primary_link_"] a * {{color: #ffffff !important;}}
[class*="st-key-link_"] a {{border: 1px solid {p.grid}; border-radius: .4rem; padding: .45rem .9rem;}}
</style>"""


def title(answer: str, detail: str = "") -> None:
    """The page's answer as its title, and one line on what it rests on."""
    st.markdown(f"## {_plain(answer)}")
    if detail:
        st.caption(_plain(detail))


def show_budget() -> None:
    """Fill the budget chip of the frame with the budget as it is now."""
    st.session_state["_budget_slot"].markdown(budget_chip(state.budget()))


def _plain(text: str) -> str:
    """Names have underscores and brackets; they are not markup."""
    return text.translate({ord(c): "\\" + c for c in "\\`*_[]<>#~$:"})


def draw_frame() -> None:
    """Draw it, choose the study, bring URL and session together."""
    with st.container(key="frame", horizontal=True, vertical_alignment="center", gap="medium"):
        digest = _study_picker()
        state.restore(digest)
        study = the_study()
        problem = state.sync(study)
        # Pages below may change the budget in the same run; they fill the slot again through `show_budget`.
        st.session_state["_budget_slot"] = st.empty()
        show_budget()
        with st.container(horizontal=True, vertical_alignment="center", width="content", gap="small"):
            chosen = state.selection()
            st.markdown(selection_chip(len(chosen)))
            if len(chosen):
                st.button("clear", key="clear_selection", type="tertiary", on_click=_clear)
        st.space("stretch")
        job_ribbon()
        with st.popover("Link", icon=":material/link:", type="tertiary"):
            st.caption("This view, for another browser on this machine")
            st.code(state.link(), language=None, wrap_lines=True)
    if problem:
        error_box(problem)


def _clear() -> None:
    state.select(state.Selection())


def _study_picker() -> str:
    infos = {s.label: s for s in get_studies()}
    if not infos:
        st.markdown(":gray[:material/database: No study yet]")
        return ""
    label = st.selectbox(
        "Study", list(infos), key="study", bind="query-params", label_visibility="collapsed", width=300
    )
    return infos[label].digest
