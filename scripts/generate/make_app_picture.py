#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Make a screenshot of `spectrafm app` with an example, for the documentation.

    python scripts/generate/make_app_picture.py --output model_cards/pictures/app.png

It needs playwright and a Chromium (in Debian the package `chromium`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from spectrafm_cli.arguments import Parser
from spectrafm_hf.show.style import save_with_palette
from spectrafm_hf.show.workbench import EXAMPLES


WAIT = 300_000  # milliseconds: the machine may be busy
WIDTH, HEIGHT = 1280, 900


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a file that ends in .png")
    parser.add_argument("--port", type=int, default=7869)
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("expected a Chromium, got none; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "spectrafm_cli", "app", "--port", str(arguments.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app, sync_playwright() as playwright:
        try:
            app.stdout.readline()  # type: ignore[union-attr]  # that it is there
            # Root, as whom containers run, has no sandbox.
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(WAIT)
            page.goto(f"http://127.0.0.1:{arguments.port}")
            page.get_by_text(EXAMPLES[-1], exact=True).click()
            page.locator("#summary h2", has_text=EXAMPLES[-1]).wait_for()
            page.locator("#nearest table").wait_for()
            page.wait_for_timeout(2000)
            page.screenshot(path=arguments.output, full_page=True)
            browser.close()
        finally:
            app.terminate()
    save_with_palette(arguments.output, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
