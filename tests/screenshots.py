"""Pictures of the page for README, taken from the running app: `python -m tests.screenshots`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tests.browser import ROOT, chromium, running

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = ROOT / "assets" / "pictures"
_PATIENT = 300_000  # milliseconds: a machine without a GPU samples, merges and draws
_HIDE = "footer { display: none !important; } #progress { min-height: 0; }"


def main() -> None:
    """Compose two concepts as a first visitor would, look inside the merge, and keep what is seen."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (url, _), chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 960}, device_scale_factor=1)
        page.set_default_timeout(_PATIENT)
        page.goto(url)
        page.locator(".picker .card").first.wait_for()
        page.add_style_tag(content=_HIDE)
        page.locator("#sets").get_by_role("button", name="Cat and barn").click()
        page.locator(".use[data-name=cat]").wait_for()
        page.locator("#seeds textarea, #seeds input").fill("0, 1, 2")
        page.locator("#go").click()
        page.locator("#progress .ended, #progress .problem").wait_for()
        page.evaluate("window.scrollTo(0, 0)")
        _keep(page, "page.png")
        page.set_viewport_size({"width": 390, "height": 844})
        page.locator("#results").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('grid').scrollIntoView()")
        _keep(page, "phone.png")
        page.set_viewport_size({"width": 1440, "height": 960})
        page.get_by_role("tab", name="Why").click()
        page.get_by_role("button", name="Look inside this merge").click()
        page.locator("#why-told .ended").wait_for()
        page.locator("#why-change img").wait_for()
        _keep(page, "why.png")


def _keep(page: Page, name: str) -> None:
    """A screenshot of what is in view, in few colours, so that it stays small."""
    page.wait_for_timeout(1000)  # pictures that are on their way
    path = PICTURES / name
    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(192, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
