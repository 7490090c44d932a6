"""A picture of the page, taken in headless Chromium (Debian's `chromium`, the package `playwright`).

    python -m recipes.serve.screenshot runs/quickstart page.png
    python -m recipes.serve.screenshot runs/quickstart phone.png --width 360 --dark

It serves the run, moves the first slider to 60 % and waits for both answers and their scores.
"""

import argparse
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from emorl.config import UserError
from emorl.stages.serve import Serving, make_server

CHROMIUM = shutil.which("chromium")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def running(application: Any) -> Iterator[str]:
    """The address of an application that runs in a thread until the block ends."""
    server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS) as browser:
        yield browser


def screenshot(browser: Browser, address: str, file: Path, width: int = 1280, *, dark: bool = False) -> None:
    """Writes the picture of a served page, as a PNG."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    page.goto(address)
    page.locator("#send:enabled").wait_for()
    if page.locator("#share-0").count():
        page.locator("#share-0").fill("60")
    page.locator("#send").click()
    for side in page.locator(".answer").all():
        side.locator(".scores").wait_for()
    page.screenshot(path=file, full_page=True)
    page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    try:
        application = make_server(options.run, Serving(port=0))
    except UserError as error:
        raise SystemExit(str(error)) from None
    with running(application) as where, chromium() as started:
        screenshot(started, where, options.file, options.width, dark=options.dark)
    print(f"wrote {options.file}")
