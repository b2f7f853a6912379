"""Headless Chromium, driven over a pair of pipes by its DevTools protocol: the standard library alone.

For the tests of the page, and for the row of the browser in ``scripts/same_answer.py``.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "web" / "node_modules" / "onnxruntime-web" / "dist"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# WebGPU on a processor without a graphics card.
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--enable-unsafe-swiftshader", "--use-webgpu-adapter=swiftshader")
QUIET = (
    *("--headless=new", "--no-sandbox", "--no-first-run", "--disable-gpu-compositing", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--mute-audio"),
)
_READ = 1 << 20


def chromium() -> str | None:
    """Find the browser."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def missing() -> str | None:
    """Say what is not there of what a page runs in; ``None`` where all is."""
    if chromium() is None:
        return "no Chromium"
    if not RUNTIME.is_dir():
        return "no web/node_modules: `make web-test` installs it"
    return None


class Browser:
    """A browser with one page.

    Args:
        options: of its command line, beside the usual ones.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="detpost-chromium-")
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        program = chromium()
        assert program is not None
        line = [program, *QUIET, *options, f"--user-data-dir={self._folder.name}/profile", "--remote-debugging-pipe"]
        # The browser reads from 3 and writes to 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *line, "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._unread = b""
        self.downloads = Path(self._folder.name) / "downloads"
        self.requests: list[str] = []  # addresses that the page and its workers asked for
        self.errors: list[str] = []  # uncaught exceptions, and what the browser logs as an error
        self._sessions: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._watch(self._session)
        self._call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads), eventsEnabled=False
        )

    def close(self) -> None:
        """End the browser and drop its profile."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def open(self, address: str, width: int = 1200, height: int = 800, scheme: str = "light") -> None:
        """Open a page and wait until it is loaded."""
        self.requests, self.errors = [], []
        self.look(width, height, scheme)
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def look(self, width: int, height: int = 800, scheme: str = "light") -> None:
        """Set the size of the window and whether the user likes it light or dark."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol to the page."""
        return self._call(method, self._session, **parameters)

    def run(self, program: str, *values: Any, seconds: float = 120) -> Any:
        """Run JavaScript in the page, ``(...values) => ...``, and give what it gives, awaited, as JSON."""
        call = f"({program})(...{json.dumps(values)})"
        answer = self._call(
            "Runtime.evaluate",
            self._session,
            seconds,
            expression=call,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
            allowUnsafeEvalBlockedByCSP=False,  # as the page's own scripts have it
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.run(f"() => Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds} seconds still not: {condition}")
            time.sleep(0.05)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key: Tab, Enter, ArrowRight and the like."""
        codes = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", "Space": " "}.get(key)
        for _ in range(times):
            said = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", **said, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **said)

    def choose_files(self, selector: str, paths: Sequence[Path]) -> None:
        """Put files into a file input, as a user who chooses them."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve()) for path in paths])

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write what the page looks like as a PNG file."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _watch(self, session: str) -> None:
        for domain in ("Network", "Runtime", "Page", "Log"):
            # Workers have no pages.
            with contextlib.suppress(RuntimeError):
                self._call(f"{domain}.enable", session)
        self._call("Target.setAutoAttach", session, autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def _call(self, method: str, session: str | None = None, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        number = self._post(method, session, **parameters)
        end = time.monotonic() + seconds
        for message in self._messages(end):
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
        raise TimeoutError(f"{method} has not answered for {seconds} seconds")

    def _post(self, method: str, session: str | None = None, **parameters: Any) -> int:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        content = memoryview(json.dumps(message).encode() + b"\0")
        while content:
            content = content[os.write(self._to, content) :]
        return number

    def _messages(self, end: float) -> Iterator[dict[str, Any]]:
        while time.monotonic() < end:
            while b"\0" in self._unread:
                line, _, self._unread = self._unread.partition(b"\0")
                message = json.loads(line)
                self._note(message)
                yield message
            if select.select([self._from], [], [], 0.2)[0]:
                part = os.read(self._from, _READ)
                if not part:
                    raise RuntimeError("the browser has ended")
                self._unread = self._unread + part

    def _note(self, message: dict[str, Any]) -> None:
        """Keep what the page asks for and complains of, and follow it into its workers."""
        said = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if said["entry"]["level"] == "error":
                self.errors.append(said["entry"]["text"])
            case "Target.attachedToTarget" if said["sessionId"] not in self._sessions:
                worker = said["sessionId"]
                self._sessions.append(worker)
                for domain in ("Network", "Runtime", "Log"):
                    self._post(f"{domain}.enable", worker)
                self._post("Target.setAutoAttach", worker, autoAttach=True, waitForDebuggerOnStart=False, flatten=True)


@contextlib.contextmanager
def browsing(options: Sequence[str] = ()) -> Iterator[Browser]:
    """Give a browser, and end it afterwards."""
    browser = Browser(options)
    try:
        yield browser
    finally:
        browser.close()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder in a thread and give its address."""
    import threading

    from detpost.web.serve import PageServer

    with PageServer(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":  # what `make web-test` cannot do without
    if shutil.which("node") is None:
        sys.exit("no Node.js: on Debian, `apt-get install nodejs npm chromium`")
    if reason := missing():
        sys.exit(f"{reason}: on Debian, `apt-get install nodejs npm chromium`")
