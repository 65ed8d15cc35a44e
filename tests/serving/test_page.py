"""The page at /razor in a real browser."""

import json
from pathlib import Path

import pytest
from browser import Page, browse
from held_steps import slow
from servers import KEY, MODEL, Server, until

pytestmark = pytest.mark.engine

STATE = "document.getElementById('main')?.dataset.state"


UNIT = "document.querySelector('#memory').getScreenCTM().a"
"""Pixels of a unit of the curves: at 1 their text is as large as it says, 12 px."""

CONTRAST = """((selector) => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((x) => x / 255).map(
      (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let node = document.querySelector(selector);
  const ink = light(getComputedStyle(node).color);
  while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
  const paper = light(getComputedStyle(node).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
})"""


def contrast(page: Page, selector: str) -> float:
    """Ratio of an element's text to its background, in luminance (WCAG 2)."""
    return page.value(f"{CONTRAST}({json.dumps(selector)})")


@pytest.fixture(scope="module")
def page(keyed: Server, tmp_path_factory) -> Page:
    """The page of the running server, before the key was given."""
    with browse(f"{keyed.url}/razor", tmp_path_factory.mktemp("chromium")) as page:
        until(lambda: page.value(f"document.readyState === 'complete' && {STATE}") == "ask")
        yield page


def test_the_page_asks_for_the_key_then_shows_the_server(page: Page, keyed: Server) -> None:
    """A wrong key is refused; the right one shows policy, pools, figures and heads."""
    page.value("document.getElementById('key').value = 'wrong'")
    page.value("document.querySelector('form button').click()")
    until(lambda: "does not accept" in page.text("#trouble"))
    assert page.value(STATE) == "ask"
    page.value(f"document.getElementById('key').value = '{KEY}'")
    page.value("document.querySelector('form button').click()")
    until(lambda: page.value(STATE) == "live")
    assert page.text("#summary").startswith(f"{MODEL}: window 64, 4 sinks, exact prefill")
    assert page.text("#heads-text") == "4 of 16 KV heads retrieve (25.0%)"
    assert page.value("document.querySelectorAll('#heads rect.retrieval').length") == 4
    assert page.value("document.querySelectorAll('#heads rect.local').length") == 12
    until(lambda: page.text("#integrity") == "intact")


def test_the_curves_live(page: Page, keyed: Server) -> None:
    """While a request runs, pools, share, throughput and curves show it; after it, they fall."""
    until(lambda: page.value(STATE) == "live")
    body = {"model": MODEL, "prompt": "a" * 700, "max_tokens": 3000, "ignore_eos": True}
    body |= {"stream": True, "vllm_xargs": slow()}
    with (
        keyed.client() as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # closed with the last reference
        next(lines)
        until(lambda: page.text("#running").startswith("1 /"))
        until(lambda: float(page.text("#speed").replace(",", "")) > 0)
        assert page.text("#kept").endswith("%")
        assert page.value("document.querySelector('#pools rect.local').width.baseVal.value") > 0
        points = "document.querySelector('#memory polyline').points.length"
        until(lambda: page.value(points) > 2)
    until(lambda: page.text("#running") == "0 / 0")


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_legible(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    """On a phone and on a desk, light and dark: no sideways scrolling, contrast of 4.5 or more."""
    until(lambda: page.value(STATE) == "live")
    page.look(width, 900, dark)
    assert page.value("document.documentElement.scrollWidth") <= width
    for selector in ("h1", "#summary", "#kept", ".figures span", "#heads-text", "#integrity"):
        assert contrast(page, selector) >= 4.5, selector
    until(lambda: page.value(UNIT) == 1)
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert (max(int(x) for x in paper[4:-1].split(",")) < 128) == dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_browser_does_not_complain(page: Page) -> None:
    """No script error, nothing that the page's own security policy blocked."""
    page.value("1")
    serious = [text for text in page.complaints if "401" not in text]
    assert serious == []
