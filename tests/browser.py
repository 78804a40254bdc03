"""Headless Chromium for tests of pages, and pictures of pages for the documents.

python tests/browser.py report.html docs/report.png [WIDTH [HEIGHT]] [--dark]
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--no-sandbox",  # containers of continuous integration run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium(own: str) -> str | None:
    """The program: `PPO_CLI_CHROMIUM`, one on the path, playwright's own if it is installed."""
    found = (os.environ.get("PPO_CLI_CHROMIUM"), *map(shutil.which, NAMES), own)
    return next((path for path in found if path and Path(path).exists()), None)


@contextmanager
def chromium() -> Iterator[Browser | None]:
    """A headless browser that asks nothing of the network by itself; None where there is none."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            yield None
            return
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for the tests of a module.

    Not for the session: playwright's event loop would run on in the tests of other modules.
    """
    with chromium() as found:
        if found is None:
            reason = "no Chromium: set PPO_CLI_CHROMIUM to one, or install Debian's `chromium`"
            if os.environ.get("REQUIRE_BROWSER"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield found


def picture(
    page: Path,
    output: Path,
    *,
    width: int = 1280,
    height: int = 1600,
    whole: bool = False,
    **options: Any,
) -> None:
    """A PNG of a page's beginning, or of the whole of it.

    Args:
        page: HTML file.
        output: PNG file.
        width, height: of the window, CSS pixels.
        whole: whether the picture is as long as the page.
        options: of playwright's `new_page`, such as `color_scheme="dark"`.
    """
    with chromium() as browser:
        if browser is None:
            raise SystemExit("no Chromium: set PPO_CLI_CHROMIUM to one")
        shown = browser.new_page(viewport={"width": width, "height": height}, **options)
        shown.goto(page.resolve().as_uri())
        shown.screenshot(path=output, full_page=whole)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--dark"]
    sizes = dict(zip(("width", "height"), map(int, words[2:]), strict=False))
    scheme = "dark" if "--dark" in sys.argv else "light"
    picture(Path(words[0]), Path(words[1]), color_scheme=scheme, **sizes)


if __name__ == "__main__":
    main()
