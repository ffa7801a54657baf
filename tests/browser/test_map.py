"""The map in a real browser: boxes, links, a second browser, what a person sees first."""

from __future__ import annotations

import json

import pytest

MOE = "moe-48x128@6d6f652d"


def test_library_to_map_to_box_and_back(browser):
    b = browser()
    b.goto(f"/?study={MOE}")
    b.page.get_by_role("link", name="Open the map of moe-48x128").click()
    b.page.wait_for_url("**/map*")
    b.settle()
    box = b.chart()
    b.drag(box, (0.2, 0.2), (0.5, 0.5))
    b.page.wait_for_selector(".st-key-clear_selection")
    n = b.selected()
    assert n > 1000  # a box over the expert map holds three units a cell
    assert "sel=" in b.page.url

    b.page.reload()
    b.settle()
    b.chart()
    assert b.selected() == n

    other = browser()
    other.goto(b.page.url.removeprefix(b.base))
    other.chart()
    assert other.selected() == n
    shown = other.page.evaluate(
        "document.querySelector('.js-plotly-plot').data.filter(t => t.type == 'heatmap' && t.opacity == 0.7).length"
    )
    assert shown > 0

    b.page.locator(".st-key-clear_selection button").click()
    b.settle()
    assert b.selected() == 0
    assert "sel=" not in b.page.url


def test_the_selection_follows_to_other_pages(browser):
    b = browser()
    b.goto("/map?sel=1-7")
    b.chart()
    assert b.selected() == 7
    b.page.get_by_role("link", name="Run").click()
    b.page.wait_for_url("**/run*")
    b.settle()
    assert b.selected() == 7
    assert "sel=1-7" in b.page.url


def test_a_large_scattered_selection_has_a_short_link(browser):
    b = browser()
    b.goto(f"/map?study={MOE}&search=experts%5C.%5Cd*7%5C.down")
    b.chart()
    b.page.locator(".st-key-select_matches button").click()
    b.settle()
    n = b.selected()
    assert n == 48 * 13  # experts 7, 17, … 127
    assert len(b.page.url) < 400
    other = browser()
    other.goto(b.page.url.removeprefix(b.base))
    assert other.selected() == n


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("study", ["moe-48x128", "dense-12"])
def test_the_main_chart_is_visible_without_scrolling(browser, scheme, study):
    b = browser(scheme)
    b.goto("/library")
    b.page.locator(".st-key-study input").click()
    b.page.get_by_role("option", name=study).click()
    b.settle()
    b.page.get_by_role("link", name="Map", exact=True).click()
    b.settle()
    b.chart()
    frame = b.page.locator(".js-plotly-plot").bounding_box()
    assert frame is not None
    assert frame["y"] + frame["height"] <= 900
    background = b.page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    bright = sum(int(c) for c in background[4:-1].split(",")[:3]) > 380
    assert bright == (scheme == "light")


def test_downloads_hold_the_selection(browser):
    b = browser()
    b.goto("/map?metric=fisher_projection&sel=5-8")
    b.chart()
    with b.page.expect_download() as waiting:
        b.page.locator(".st-key-map_json button").click()
    data = json.loads(waiting.value.path().read_text())
    assert len(data["units"]["unit"]) == 4
    assert data["controls"]["metric"] == "fisher_projection"
    with b.page.expect_download() as waiting:
        b.page.locator(".st-key-map_csv button").click()
    assert len(waiting.value.path().read_text().splitlines()) == 5


def test_a_click_selects_one_cell_and_shift_adds_one(browser):
    b = browser()
    b.goto(f"/map?study={MOE}&pick=click&projection=down")
    box = b.chart()
    b.page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.4)
    b.page.wait_for_selector(".st-key-clear_selection")
    assert "1 unit" in b.page.locator(".st-key-frame").inner_text()
    b.settle()  # the selection draws the chart anew, and a click on the old one would be lost
    box = b.chart()
    b.page.keyboard.down("Shift")
    b.page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    b.page.keyboard.up("Shift")
    b.page.wait_for_function("document.querySelector('.st-key-frame').innerText.includes('2 units')")
