"""Draw ``report.png``: the first screen of the report of a run, in a headless Chromium.

Usage: python docs/figures/report.py RUN/report.html
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1180, 1080


def main() -> None:
    page_file = Path(sys.argv[1]).resolve()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.as_uri())
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    # 64 colours are enough for letters and lines, and a third of the size.
    small = picture.convert("RGB").quantize(64)
    small.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
