"""The dashboard: `streamlit run app/main.py`. Page set-up, navigation and the frame around every page."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app.screens import SCREENS, Screen
from bitatlas.app.theme import favicon, logo
from bitatlas.app.widgets.boxes import error_box
from bitatlas.app.widgets.frame import draw_frame, style
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.settle import settle


def _drawn(screen: Screen) -> Callable[[], None]:
    def draw() -> None:
        # Imported when shown: the first page is up before the others are loaded.
        importlib.import_module(f"bitatlas.app.screens.{screen.name}").page()

    draw.__name__ = screen.name
    return draw


def main() -> None:
    """Draw the frame and the page in it."""
    st.set_page_config(page_title="bitatlas", page_icon=favicon(), layout="wide", initial_sidebar_state=200)
    st.logo(logo(), size="large")
    st.html(style(current_palette()))
    menu: dict[str, list[st.Page]] = {}
    first = SCREENS[0]
    for screen in SCREENS:
        page = st.Page(
            _drawn(screen), title=screen.title, icon=screen.icon,
            url_path="home" if screen is first else screen.address, default=screen is first,
        )  # fmt: skip
        menu.setdefault(screen.section, []).append(page)
        st.session_state.setdefault("_pages", {})[screen.name] = page
    # The first page lives at "/"; its own address shall work as well.
    alias = st.Page(
        _drawn(first), title=first.title, icon=first.icon, url_path=first.address, visibility="hidden"
    )
    menu[first.section].append(alias)
    chosen = st.navigation(menu, expanded=True)
    try:
        draw_frame()
        chosen.run()
    except UserError as e:
        error_box(e)
    settle()


main()
