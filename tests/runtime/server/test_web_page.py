"""The web page: complete without a network, and nothing that a model writes becomes HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsq.runtime.server import web_page
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import ROOT
from tests.runtime.server.scripted_backend import ScriptedBackend, pool_of, serving
from tests.tiny_gguf import EOS, token_id

FOLDER = ROOT / "runtime" / "server" / "web"
WRITTEN = (
    "## Title\n\n<img src=x onerror=alert(1)> **bold** [a](javascript:alert(1))\n"
    "[b](https://example.com)\n\n```python\ndef f(): # <script>alert(1)</script>\n```\n"
)


@pytest.fixture
def url(tokenizer: Tokenizer) -> Iterator[str]:
    ids = tokenizer.encode(WRITTEN, add_bos=False)
    backend = ScriptedBackend(lambda request: [*ids, token_id(EOS)], n_ctx=1000)
    with serving(pool_of(backend, tokenizer)) as found:
        yield found


def test_every_file_is_served_and_needs_nothing_from_elsewhere(url: str) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(web_page.FILES)
    for path in sorted(web_page.PATHS):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        outside = re.findall(
            r"""(?:src|href|from|url|import|fetch)\W{1,4}(?:https?:)?//\S+""", answer.text
        )
        assert not outside
        tag = {"If-None-Match": answer.headers["etag"]}
        assert httpx.get(url + path, headers=tag).status_code == 304
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r'from "([^"]+)"', path.read_text()):
            assert name in web_page.PATHS
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|document\.write", path.read_text()
        )


def test_paths_outside_the_folder_are_not_served(url: str) -> None:
    for path in ("/web/../app.py", "/web/%2e%2e/app.py", "/web/", "/web/none.js", "/web//app.js"):
        assert httpx.get(url + path).status_code == 404


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """The page in the system's Chromium; it fails on errors and on requests to elsewhere."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        made = browser.new_page()
        made.on("pageerror", lambda error: wrong.append(str(error)))
        made.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        made.on("dialog", lambda dialog: (wrong.append("dialog"), dialog.dismiss()))
        made.on("request", lambda r: None if r.url.startswith(url) else wrong.append(r.url))
        made.goto(url)
        yield made
        browser.close()
    assert not wrong


@pytest.mark.slow
def test_a_conversation(page: Any, tmp_path: Path) -> None:
    page.fill("#chat-input", "<b>hello</b>")
    page.press("#chat-input", "Enter")
    page.wait_for_selector(".foot:not(:empty)")
    assert page.inner_text(".message.user") == "<b>hello</b>"
    answer = page.locator(".message.assistant")
    assert answer.locator("h3").inner_text() == "Title"
    assert answer.locator("strong").inner_text() == "bold"
    assert "<img src=x onerror=alert(1)>" in answer.inner_text()
    assert answer.locator("img, script").count() == 0
    assert [a.get_attribute("href") for a in answer.locator("a").all()] == ["https://example.com"]
    code = answer.locator("figure code")
    assert code.inner_text() == "def f(): # <script>alert(1)</script>"
    assert code.locator(".kw").inner_text() == "def"
    assert "tokens/s" in page.inner_text(".foot")
    assert page.screenshot(path=tmp_path / "chat.png")


@pytest.mark.slow
def test_the_playground_and_the_status(page: Any) -> None:
    page.click("#tab-playground")
    page.fill("#prefix", "def")
    page.fill("#suffix", "x")
    page.click("#fill")
    page.wait_for_selector("#fill-status:not(:empty)")
    assert page.inner_text("#middle") == WRITTEN
    assert page.inner_text("#fill-note") == "fill in the middle"
    page.click("#accept")
    assert page.input_value("#prefix") == "def" + WRITTEN
    page.locator("#memory", has_text="1 MiB").wait_for()
    assert page.inner_text("#rate") == "7.5"


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 780, 1280])
def test_nothing_is_cut_off_at_any_width(page: Any, width: int, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    seen = {"chat": ("#chat-send", "#chat-new"), "playground": ("#fill", "#accept", "#stop")}
    for view, buttons in seen.items():
        page.click(f"#tab-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for found in (*buttons, "#model", "#options-button", "#memory"):
            box = page.locator(found).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= 800
        page.screenshot(path=tmp_path / f"{view}.png")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("prefix", "middle", "suffix")]
    for above, below in pairwise(boxes):
        apart = below["y"] - above["y"] - above["height"]
        beside = below["x"] >= above["x"] + above["width"]
        assert beside or apart >= 20  # a label's height
