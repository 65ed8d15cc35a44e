"""Headless Chromium for tests, by its DevTools protocol; and pictures of a page.

python tests/browser.py URL PICTURE [--seconds N] [--width PIXELS] [--dark]
"""

import argparse
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from servers import until
from websockets.sync.client import ClientConnection, connect

INSTALL = "The page's tests need Chromium: apt-get install --no-install-recommends chromium"


def chromium() -> str:
    """Path of the browser.

    Raises:
        RuntimeError: it is not installed; says how to.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return path
    raise RuntimeError(INSTALL)


class Page:
    """One tab.

    Args:
        socket: of its DevTools.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._count = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Answer of one DevTools call; what the page complains of meanwhile is kept."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def value(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """Text that a reader sees."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def look(self, width: int, height: int, dark: bool) -> None:
        """Size of the window, and the user's colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def browse(url: str, folder: Path) -> Iterator[Page]:
    """A tab that shows a page.

    Args:
        folder: empty, for the browser's profile.
    """
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen(
        [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port_file = folder / "DevToolsActivePort"
        until(lambda: port_file.exists() and port_file.read_text().count("\n"), 60)
        port = port_file.read_text().splitlines()[0]
        target = httpx.put(f"http://127.0.0.1:{port}/json/new?{url}", timeout=60).json()
        with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    """Picture of a page, as it is after some seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browse(args.url, Path(folder)) as page:
        page.look(args.width, 900, args.dark)
        time.sleep(args.seconds)
        page.screenshot(args.picture)


if __name__ == "__main__":
    main()
