"""Figures in README and docs of the network that ``make demo`` trained.

    python -m benchmarks.drawing

writes docs/module.png, the module at work on one pixel; docs/explore.html, the page of ``sasa explore`` with some
images; and, if Debian's Chromium is installed, docs/explore.png, a screenshot of that page.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sasa.explore.source import DEMO, find_images, find_network
from sasa.viz import plot_module
from sasa.viz.page import render

PIXEL, LAYER, HEAD, CLASS = (21, 20), "stages.stage1.1.spatial", 2, "Ankle boot"
IMAGES = 4
DOCS = Path(__file__).parent.parent / "docs"


def main() -> int:
    """Returns the exit status."""
    if not DEMO.is_file():
        print(f"expected the network of make demo, there is no {DEMO}", file=sys.stderr)
        return 2
    network = find_network(DEMO)
    images = find_images(network, [])[0][-IMAGES:]
    (shown,) = [one for one in images if one.label == CLASS]
    figure = plot_module(network.model, network.input(shown), LAYER, PIXEL, HEAD, picture=shown.bytes)
    figure.savefig(DOCS / "module.png", dpi=130)
    payloads = [network.payload(one, with_effects=True) for one in images]
    page = DOCS / "explore.html"
    page.write_text(render(payloads, network=network.facts["model"], note=network.note), encoding="utf-8")
    place = f"image={images.index(shown)}&layer={LAYER}&pixel={PIXEL[0]},{PIXEL[1]}&head={HEAD}"
    _picture(f"{page.as_uri()}#{place}", DOCS / "explore.png")
    return 0


def _picture(url: str, out: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        print(f"no Chromium here: {out.name} is left as it is", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 980}, color_scheme="light")
        page.goto(url)
        page.wait_for_function("window.sasaReady === true")
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
