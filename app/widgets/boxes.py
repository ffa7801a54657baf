"""Boxes for the two awkward moments: nothing here yet, and something is wrong."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from bitatlas.analysis.schema import UserError

__all__ = ["empty_state", "error_box", "go"]


def error_box(error: UserError) -> None:
    """What is wrong, what was found, what to do."""
    what = error.what.rstrip(".")
    lines = [f"**{what[:1].upper()}{what[1:]}.**"]
    if error.found:
        lines.append(f"Found: {error.found}")
    if error.fix:
        lines.append(f"Try: {error.fix}")
    st.error("  \n".join(lines), icon=":material/error:")


def go(screen: str) -> None:
    """Show another page (in a button's body, not in a callback)."""
    st.switch_page(st.session_state["_pages"][screen])


def empty_state(sentence: str, button: str, *, screen: str = "", on_click: Callable[[], None] | None = None) -> None:  # fmt: skip
    """One sentence on what will appear here and one button that makes it appear."""
    with st.container(border=True, horizontal_alignment="center"):
        st.markdown(sentence, text_alignment="center")
        pressed = st.button(button, type="primary", on_click=on_click, key="empty_state")
        if pressed and screen:
            go(screen)
