"""A headless Chromium, told what to do over a pipe (its DevTools protocol): for the pages that we make."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe about:blank"
)


def find_browser() -> str | None:
    return next((found for found in map(shutil.which, PROGRAMS) if found), None)


class Browser:
    """One page of a browser; what it asked the network for and complained of since it was opened is kept."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser, self.number, self.rest = to_browser, from_browser, 0, b""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, *, height: int = 800, scheme: str = "light") -> None:
        """Show a file on a screen of this width, in a color scheme, and wait until it is loaded."""
        self.requests, self.complaints = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def photograph(self, path: Path) -> None:
        """The whole page as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            received = os.read(self.from_browser, 2**16)
            if not received:
                raise RuntimeError("the browser has ended")
            self.rest += received
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"].split(",")[0])
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"]["exception"]["description"])
        elif event["method"] == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])


@contextmanager
def start_browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a new, empty profile; it is ended with the block."""
    theirs, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    command = f'exec "$0" --user-data-dir="$1" {_OPTIONS} 3<&{theirs} 4>&{answers}'
    process = subprocess.Popen(
        ["bash", "-c", command, program, str(profile)], pass_fds=(theirs, answers), stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser)
        os.close(from_browser)
