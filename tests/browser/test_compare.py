"""Pin by lasso, re-solve, compare with the unpinned, undo, and the same link in a second browser."""

from __future__ import annotations

import re

DENSE = "dense-12"


def lasso(b) -> None:
    """Draw a closed line over the middle of the map's last panel."""
    box, mouse = b.chart(), b.page.mouse
    corners = [(0.25, 0.2), (0.7, 0.25), (0.65, 0.6), (0.3, 0.55), (0.25, 0.2)]
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    mouse.move(*points[0])
    mouse.down()
    for point in points[1:]:
        mouse.move(*point, steps=5)
    mouse.up()
    b.settle()


def heading(b) -> str:
    return b.page.locator("h2").first.inner_text()


def test_lasso_pin_compare_undo_and_a_second_browser(browser):
    b = browser()
    b.goto("/map?pick=lasso")
    study = b.page.get_by_role("combobox", name=re.compile("Study")).first
    if DENSE not in study.input_value():
        b.goto(f"/?study={DENSE}")
        link = b.page.get_by_role("link", name=re.compile(f"Open the map of {DENSE}"))
        link.click()
        b.page.wait_for_url("**/map*")
        b.settle()
        b.page.locator(".st-key-pick").get_by_text("lasso").click()
        b.settle()
    lasso(b)
    b.page.wait_for_selector(".st-key-clear_selection")
    chosen = b.selected()
    assert chosen > 2

    b.page.get_by_role("link", name="Fit", exact=True).click()
    b.page.wait_for_url("**/fit*")
    b.settle()
    b.page.get_by_role("button", name=re.compile("^.*Pin.*$")).first.click()
    b.settle()
    assert f"{chosen} pinned" in b.page.locator(".stMain").inner_text()

    b.page.get_by_role("link", name="Compare", exact=True).click()
    b.page.wait_for_url("**/compare*")
    b.page.wait_for_selector(".js-plotly-plot .main-svg")
    b.settle()
    pinned = heading(b)
    assert re.search(r"predicted damage is [\d.]+ times A", pinned)
    link = b.page.url.removeprefix(b.base)
    assert "ask=" in link
    assert "pins=" in link

    other = browser()
    other.goto(link)
    other.page.wait_for_selector(".js-plotly-plot .main-svg")
    other.settle()
    assert heading(other) == pinned

    b.page.locator(".st-key-compare_undo button").click()
    b.settle()
    assert heading(b) == "Both give every unit the same bits"
    assert "pins=" not in b.page.url
    # The second browser has its own pins.
    assert heading(other) == pinned
