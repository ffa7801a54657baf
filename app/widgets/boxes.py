"""Boxes for the two awkward moments: nothing here yet, and something is wrong."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from bitatlas.analysis.schema import UserError

__all__ = ["empty_state", "error_box", "link_to"]


def error_box(error: UserError) -> None:
    """What is wrong, what was found, what to do."""
    what = error.what.rstrip(".")
    lines = [f"**{what[:1].upper()}{what[1:]}.**"]
    if error.found:
        lines.append(f"Found: {error.found}")
    if error.fix:
        lines.append(f"Try: {error.fix}")
    st.error("  \n".join(lines), icon=":material/error:")


def link_to(screen: str, label: str, icon: str = "", *, primary: bool = False) -> None:
    """A link to another page that keeps study, selection and pins.

    A link and not a button with ``st.switch_page``, which would clear the query string and may not: widgets are
    bound to it. A ``primary`` one looks like the page's main button.
    """
    key = f"primary_link_{screen}" if primary else f"link_{screen}"
    with st.container(key=key, width="content"):
        st.page_link(st.session_state["_pages"][screen], label=label, icon=icon or None)


def empty_state(sentence: str, button: str, *, screen: str = "", on_click: Callable[[], None] | None = None) -> None:  # fmt: skip
    """One sentence on what will appear here and one button that makes it appear: a page to go to, or a callback."""
    with st.container(border=True, horizontal_alignment="center", key="empty_box"):
        st.markdown(sentence, text_alignment="center")
        if screen:
            link_to(screen, button, primary=True)
        else:
            st.button(button, type="primary", on_click=on_click, key="empty_state")
