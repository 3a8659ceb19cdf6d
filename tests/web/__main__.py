"""Photographs the page for the README: `python -m tests.web http://localhost:3000 docs`.

The service at that address must serve all five models: what is seen is what they answered.
"""

import sys
import time
from pathlib import Path

from PIL import Image

from tests.conftest import SHIPPED

from .browser import Browser, start_browser
from .test_page import SEVEN, verdict

LOOKS = {
    "page-desktop": (1280, "light", False),
    "page-dark": (1280, "dark", False),
    "page-phone": (390, "light", True),
}


def ask_everything(page: Browser) -> None:
    """Draw, drop and type, so that every panel has its answer."""
    page.wait(lambda: page.count("#grid img") == 10, "ten digits are invented")
    for model in ("image", "detection"):
        page.click(f"[data-model={model}] [data-buttons] > button")
    page.click("#text-samples button:nth-child(2)")
    page.click("#text-samples button:nth-child(1)")
    page.draw("#pad", SEVEN, touch=False)
    for model in sorted(set(SHIPPED) - {"generator"}):
        page.wait(lambda model=model: verdict(page, model) not in ("?", "…", "!"), f"{model} answers")
    time.sleep(1.5)  # the bars come to rest, and the strip counts
    page.run("document.activeElement.blur(); scrollTo(0, 0)")


def main(url: str, folder: Path) -> None:
    """Save one picture for each of `LOOKS`."""
    with start_browser() as page:
        for name, (width, scheme, phone) in LOOKS.items():
            page.look(width, 900, scheme=scheme, phone=phone)
            page.open(url)
            ask_everything(page)
            path = folder / f"{name}.png"
            page.photograph(path)
            # A third of the bytes, and nobody sees it.
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
