"""A headless Chromium, spoken to by the DevTools protocol over two pipes; needs no package.

    with Chromium() as browser, browser.open(path) as page:
        page.evaluate("document.title")

Every page notes what it loads and what it complains of. For tests, and for `benchmarks/report.py`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

INSTALL = "apt-get update && apt-get install -y chromium"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
_LIMIT_S = 60.0


def find_chromium() -> str | None:
    """Return the path of a Chromium, None where none is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with a profile of its own, ended with all its processes."""

    def __init__(self, executable: str | None = None) -> None:
        self._executable = executable or find_chromium()
        self._messages: list[dict[str, Any]] = []
        self._buffer = b""
        self._next = 0

    def __enter__(self) -> Chromium:
        assert self._executable is not None, f"no chromium; {INSTALL}"
        self._profile = tempfile.TemporaryDirectory(prefix="precast-chromium-")
        # The browser reads commands from descriptor 3 and answers on 4.
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        shell = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        self._process = subprocess.Popen(
            [
                *("bash", "-c", shell, self._executable),
                *_ARGUMENTS,
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_commands)
        os.close(write_answers)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        for _attempt in range(20):
            try:
                self._profile.cleanup()
                return
            except OSError:  # A child of it is not gone yet.
                time.sleep(0.1)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _LIMIT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._messages.append(answer)

    def events(self, session: str, method: str) -> list[dict[str, Any]]:
        """Return the events of a kind that a session has had so far."""
        return [
            message["params"]
            for message in self._messages
            if message.get("sessionId") == session and message.get("method") == method
        ]

    def wait_for(self, session: str, method: str) -> None:
        """Return when an event of a kind has come."""
        deadline = time.monotonic() + _LIMIT_S
        while not self.events(session, method):
            self._messages.append(self._receive(deadline))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError("chromium does not answer")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise EOFError(f"chromium has ended with {self._process.poll()}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def open(
        self, path: Path, *, width: int = 1100, height: int = 900, is_dark: bool = False
    ) -> Iterator[Page]:
        """Open a file in a page of its own, wait until it is loaded, and close it at the end."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Network", "Runtime", "Log", "Security", "Performance"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        page.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"},
            ],
        )
        page.send("Page.navigate", url=path.absolute().as_uri())
        self.wait_for(page.session, "Page.loadEventFired")
        try:
            yield page
        finally:
            self.send("Target.closeTarget", targetId=target)


class Page:
    """A page that is loaded."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self.session = session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this page."""
        return self._browser.send(method, self.session, **params)

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is there, as plain data."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **extra
            )

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of the first element of a selector."""
        place = self.evaluate(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "document.documentElement.style.scrollBehavior = 'auto';"
            "one.scrollIntoView({block: 'center'});"
            "const box = one.getBoundingClientRect();"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def requests(self) -> list[str]:
        """Return the addresses of everything that was asked for."""
        found = self._browser.events(self.session, "Network.requestWillBeSent")
        return [event["request"]["url"] for event in found]

    def complaints(self) -> list[str]:
        """Return what stands in the console: errors, warnings, and what a policy forbade."""
        logged = self._browser.events(self.session, "Log.entryAdded")
        thrown = self._browser.events(self.session, "Runtime.exceptionThrown")
        said = self._browser.events(self.session, "Runtime.consoleAPICalled")
        return [
            *(event["entry"]["text"] for event in logged),
            *(event["exceptionDetails"]["text"] for event in thrown),
            *(str(event["args"]) for event in said),
        ]

    def screenshot(self, path: Path, *, is_whole: bool = True) -> None:
        """Write how it looks, as PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """Return it as it is printed, on A4."""
        found = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(found["data"])
