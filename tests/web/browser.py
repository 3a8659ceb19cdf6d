"""A real browser, driven by the W3C's WebDriver protocol: what a person does, and what a person sees.

The protocol is JSON over HTTP, and we need a dozen of its calls; so there is no library between.
Needs Debian's packages `chromium` and `chromium-driver`.
Specification: https://www.w3.org/TR/webdriver2/
"""

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from load_tests.servers import free_ports

FLAGS = [
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
]
PATIENCE_SECONDS = 20.0

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def are_installed() -> bool:
    """Whether there is a browser, and a driver for it."""
    return all(shutil.which(program) for program in ("chromium", "chromedriver"))


class Browser:
    """One tab of a fresh browser."""

    def __init__(self, session: httpx.Client) -> None:
        self._session = session

    def __call__(self, call: str, **values: Any) -> Any:
        """One call of the protocol; those without values that are questions use GET."""
        response = self._session.post(call, json=values)
        answer = response.json()["value"]
        if response.is_error:
            raise AssertionError(f"{call}: {answer['message']}")
        return answer

    def get(self, call: str) -> Any:
        return self._session.get(call).json()["value"]

    def open(self, url: str) -> None:
        self("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self("execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        """The text of the first such element as it is seen; empty where it is not."""
        return str(
            self.run(
                "const one = document.querySelector(arguments[0]);"
                "return one?.checkVisibility() ? one.innerText : ''",
                selector,
            )
        )

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def find(self, selector: str) -> str:
        element: str = self("element", using="css selector", value=selector)[_ELEMENT]
        return element

    def click(self, selector: str) -> None:
        self(f"element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type into a field, in the place of what it holds; into a chooser of files: the path of one."""
        element = self.find(selector)
        if not self.run("return document.querySelector(arguments[0]).type === 'file'", selector):
            self(f"element/{element}/clear")
        self(f"element/{element}/value", text=text)

    def press(self, keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def draw(self, selector: str, line: Sequence[tuple[float, float]], *, touch: bool = False) -> None:
        """Draw a line with the mouse, or a finger; places are shares of the element's width and height."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]",
            selector,
        )
        places = [(round(box[0] + x * box[2]), round(box[1] + y * box[3])) for x, y in line]
        moves = [{"type": "pointerMove", "duration": 15, "x": x, "y": y} for x, y in places]
        actions = [
            moves[0],
            {"type": "pointerDown", "button": 0},
            *moves[1:],
            {"type": "pointerUp", "button": 0},
        ]
        kind = "touch" if touch else "mouse"
        self(
            "actions",
            actions=[
                {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
            ],
        )

    def drop(self, selector: str, path: Path, media_type: str) -> None:
        """Drop a file, as a file manager does."""
        self.run(
            "const [selector, data, name, type] = arguments;"
            "const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));"
            "const transfer = new DataTransfer();"
            "transfer.items.add(new File([bytes], name, {type}));"
            "for (const kind of ['dragenter', 'dragover', 'drop'])"
            "  document.querySelector(selector).dispatchEvent("
            "    new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));",
            selector,
            base64.b64encode(path.read_bytes()).decode(),
            path.name,
            media_type,
        )

    def wait(self, is_so: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """What `is_so` returns, once that is true."""
        give_up = time.monotonic() + seconds
        while not (seen := is_so()):
            assert time.monotonic() < give_up, (
                f"it never came that {what}; the page says:\n{self.text('body')}"
            )
            time.sleep(0.05)
        return seen

    def console(self) -> list[str]:
        """What the page complained of since the last call."""
        entries = self("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def devtools(self, command: str, **values: Any) -> Any:
        """A command of Chromium's own, for what WebDriver has no words for."""
        return self("goog/cdp/execute", cmd=command, params=values)

    def look(self, width: int, height: int, *, scheme: str = "light", phone: bool = False) -> None:
        """How large the window is, by day or by night, and whether it is a phone's."""
        scale = 2 if phone else 1
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=phone,
        )  # fmt: skip
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.devtools(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def photograph(self, path: Path, *, whole: bool = True) -> None:
        """Save what is seen as a PNG file; `whole`: all of the page."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """A browser with nothing remembered, for as long as the `with` lasts."""
    (port,) = free_ports(1)
    driver_program, browser_program = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver_program, "needs Debian's package chromium-driver"
    with (
        tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile,
        subprocess.Popen(
            [driver_program, f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as driver,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http,
    ):
        try:
            _wait_for(http)
            options = {"binary": browser_program, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            opened = http.post("/session", json={"capabilities": {"alwaysMatch": asked}}).json()["value"]
            assert "sessionId" in opened, opened
            address = f"http://127.0.0.1:{port}/session/{opened['sessionId']}/"
            with httpx.Client(base_url=address, timeout=60, trust_env=False) as session:
                try:
                    yield Browser(session)
                finally:
                    session.delete("")
        finally:
            os.killpg(driver.pid, signal.SIGTERM)  # the browser too, if it is still there


def _wait_for(http: httpx.Client) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/status").json()["value"]["ready"]:
                return
        assert time.monotonic() < give_up, "chromedriver does not start"
        time.sleep(0.05)
