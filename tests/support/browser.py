"""A real browser, Chromium without a window, that looks at a page of one file."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Page, sync_playwright


@contextlib.contextmanager
def opened(
    path: Path, *, width: int = 1200, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Page]:
    """Open a page. At the end, it has asked for no other file and reported no error."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: make browser")
    with sync_playwright() as playwright:
        # root may not use Chromium's sandbox
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            page = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            asked: list[str] = []
            problems: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(path.as_uri())
            yield page
            assert asked == [path.as_uri()]
            assert problems == []
        finally:
            browser.close()


def hover(page: Page, selector: str, x: float = 0.5, y: float = 0.5) -> str:
    """Return the text that is shown when the pointer is at a part of an element's box."""
    element = page.locator(selector).first
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    return page.locator("#hover").inner_text()
