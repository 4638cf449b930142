"""Look at the built book in a real browser: `python -m tools.browse`.

Serves the pages on the loopback interface, opens each in headless Chromium through
its DevTools protocol, and lists what a reader would stumble over:

- a page that does not load, an error on the console, a request that fails or leaves
  this machine, a link to nowhere;
- a missing image, an image without alt text, a formula or a markup left raw;
- text with a contrast under 4.5, in the light and in the dark;
- code of a cell that scrolls sideways on a desktop, more than one search bar;
- a page wider than a phone, and a search that finds nothing.

It needs Chromium (Debian: `apt install chromium`) and downloads nothing. Its
pictures lie in `_build/screens`, for people to look at: whether a page is beautiful
or true, it cannot say.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import websocket

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (Path(__file__).parent / "browse.js").read_text(encoding="utf-8")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    # No name resolves but the loopback address: a page that needs the net fails.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
DESKTOP = (1280, 800)
PHONE = (390, 844)
CONTRAST = 4.5
BROWSERS = 2  # at the same time
TALLEST = 12_000  # of a picture, in pixels
PATIENCE = 120.0  # seconds for one answer, also on a busy machine


class NoBrowserError(Exception):
    """There is no Chromium on this machine, or it does not start."""


def find_browser() -> str:
    """The program to drive: `$CHROMIUM`, or the first that is installed."""
    for name in (os.environ.get("CHROMIUM", ""), *PROGRAMS):
        if name and (program := shutil.which(name)):
            return program
    raise NoBrowserError(
        f"no Chromium found (looked for {', '.join(PROGRAMS)}); install it "
        "(Debian: apt install chromium) or name it in the variable CHROMIUM"
    )


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, says nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Errors are seen by the browser, and listed there."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` on a free port of 127.0.0.1; yields the address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


class Browser:
    """One tab of headless Chromium, driven through the DevTools protocol."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="albor-browse-")
        self.program = find_browser()
        command = [self.program, *FLAGS, f"--user-data-dir={self.profile}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium's own cannot be had as root
        self.process = subprocess.Popen(
            [*command, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.events: list[dict[str, Any]] = []
        self.number = 0
        try:
            self.socket = websocket.create_connection(
                self._address(), timeout=PATIENCE, suppress_origin=True
            )
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _address(self) -> str:
        """Wait for Chromium to write its port, and open a tab."""
        written = Path(self.profile) / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE
        while not (written.exists() and "\n" in written.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise NoBrowserError(f"{self.program} does not start")
            time.sleep(0.05)
        port, path = written.read_text().split("\n")[:2]
        socket = websocket.create_connection(
            f"ws://127.0.0.1:{port}{path}", timeout=PATIENCE, suppress_origin=True
        )
        socket.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
        answer = json.loads(socket.recv())["result"]["targetInfos"]
        socket.close()
        page = next(target for target in answer if target["type"] == "page")
        return f"ws://127.0.0.1:{port}/devtools/page/{page['targetId']}"

    def close(self) -> None:
        if hasattr(self, "socket"):
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events on the way are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Read events until one called `method` arrives."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, promises awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:60]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def show(self, size: tuple[int, int], scheme: str, phone: bool = False) -> None:
        """Set the size of the screen, and whether its owner prefers dark pages."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=phone,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, address: str) -> None:
        """Load a page and wait until formulas and images stand in it."""
        self.events.clear()
        answer = self.call("Page.navigate", url=address)
        if "errorText" in answer:
            raise RuntimeError(answer["errorText"])
        self.wait_for("Page.loadEventFired")
        self.evaluate(f"(() => {{ {SCRIPT}; window.look = look; }})()")
        self.evaluate("look.settle()")

    def picture(self, path: Path) -> None:
        """Save the whole page, down to `TALLEST` pixels, as PNG."""
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        height = min(box["height"], TALLEST)
        clip = {"x": 0, "y": 0, "width": box["width"], "height": height, "scale": 1}
        answer = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=clip
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))


def traffic(events: list[dict[str, Any]], base: str) -> list[str]:
    """Faults among a page's events: console, failed and external requests."""
    faults = []
    asked: dict[str, str] = {}
    for event in events:
        method, what = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = asked[what["requestId"]] = what["request"]["url"]
            if not url.startswith((base, "data:", "blob:", "about:")):
                faults.append(f"external request {url}")
        elif method == "Network.responseReceived":
            response = what["response"]
            if response["status"] >= 400:
                faults.append(f"status {response['status']} for {response['url']}")
        elif method == "Network.loadingFailed" and not what.get("canceled"):
            url = asked.get(what["requestId"], "a request")
            faults.append(f"failed request {url}: {what['errorText']}")
        elif method == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            thrown = details.get("exception", {}).get(
                "description", details["text"]
            )
            faults.append(f"console: {thrown.splitlines()[0]}")
        elif method == "Runtime.consoleAPICalled" and what["type"] == "error":
            words = [
                str(a.get("value", a.get("description"))) for a in what["args"]
            ]
            faults.append(f"console: {' '.join(words)}")
        elif method == "Log.entryAdded":
            entry = what["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                faults.append(f"console: {entry['text']}")
    return list(dict.fromkeys(faults))


def look_at(
    browser: Browser, base: str, page: str, screens: Path | None = None
) -> tuple[list[str], dict[str, list[str]]]:
    """Open one page in three ways; return its faults, and its links and ids."""

    def photograph(view: str) -> None:
        if screens:
            name = page.removesuffix(".html").replace("/", "-")
            browser.picture(screens / view / f"{name}.png")

    faults: list[str] = []

    def ask(question: str, view: str) -> None:
        faults.extend(f"{fault} [{view}]" for fault in browser.evaluate(question))

    browser.show(DESKTOP, "light")
    try:
        browser.open(base + page)
    except RuntimeError as error:
        return [f"does not load: {error}"], {"links": [], "ids": []}
    links = browser.evaluate("look.links()")
    ask("look.images()", "desktop")
    ask("look.formulas()", "desktop")
    ask("look.searchBars()", "desktop")
    ask("look.overflow()", "desktop")
    photograph("light")
    browser.evaluate("look.unfold()")
    ask("look.codeRoom()", "desktop")
    for scheme in ("light", "dark"):
        browser.show(DESKTOP, scheme)
        browser.evaluate("look.settle()")
        if (theme := browser.evaluate("look.theme()")) not in ("", scheme):
            faults.append(f"shows its {theme} theme where {scheme} is preferred")
        ask(f"look.contrast({CONTRAST})", scheme)
    photograph("dark")
    browser.show(PHONE, "light", phone=True)
    browser.evaluate("look.settle()")
    ask("look.overflow()", "phone")
    photograph("phone")
    faults.extend(traffic(browser.events, base))
    return faults, links


def check_links(base: str, seen: dict[str, dict[str, list[str]]]) -> list[str]:
    """Links between the pages of `seen` that lead nowhere."""
    faults = []
    for page, found in seen.items():
        for link in found["links"]:
            if not link.startswith(base):
                continue
            parts = urllib.parse.urlsplit(link)
            target = urllib.parse.unquote(parts.path).lstrip("/")
            anchor = urllib.parse.unquote(parts.fragment)
            if target in seen and anchor and anchor not in seen[target]["ids"]:
                faults.append(
                    f"{page}: link to {target}#{anchor}, which is not there"
                )
    return faults


def check_search(browser: Browser, base: str, word: str) -> list[str]:
    """Type into the search page: `word` must be found, and nonsense must not."""
    faults = []
    for query, wanted in ((word, True), ("qzxjkvwq", False)):
        browser.show(DESKTOP, "light")
        browser.open(base + "search.html")
        field = "[...document.querySelectorAll('input[name=q]')].find(look.seen)"
        if not browser.evaluate(f"{field}?.focus(), {field} !== undefined"):
            return ["search.html: has no field to type into"]
        browser.events.clear()
        browser.call("Input.insertText", text=query)
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )
        browser.wait_for("Page.loadEventFired")
        found, over, deadline = 0, False, time.monotonic() + 20
        while not (found or over) and time.monotonic() < deadline:
            time.sleep(0.2)
            results = "document.querySelector('#search-results')"
            found = browser.evaluate(f"{results}.querySelectorAll('ul li').length")
            over = browser.evaluate(f"/did not match/.test({results}.textContent)")
        if bool(found) != wanted:
            faults.append(f"search.html: {found} results for {query!r}")
    return faults


Look = tuple[list[str], dict[str, list[str]]]  # a page's faults; its links and ids


def look_at_some(
    pages: list[str], base: str, screens: Path | None
) -> list[tuple[str, Look]]:
    """Look at these pages, one after the other, in a browser of their own."""
    looks = []
    with contextlib.ExitStack() as stack:
        browser = stack.enter_context(Browser())
        for page in pages:
            pictures = None if page.startswith("_modules/") else screens
            try:
                look = look_at(browser, base, page, pictures)
            except (websocket.WebSocketException, OSError):
                # The tab has died, as on a starved machine: once is forgiven.
                browser = stack.enter_context(Browser())
                look = look_at(browser, base, page, pictures)
            looks.append((page, look))
    return looks


def check_site(
    build: Path, screens: Path | None = None, word: str = "", only: str = ""
) -> list[str]:
    """All faults of the site under `build`, each beginning with its page."""
    # The theme leaves templates in _static; index.html only points to the intro.
    files = [f for f in build.rglob("*.html") if build / "_static" not in f.parents]
    pages = sorted(f.relative_to(build).as_posix() for f in files)
    pages = [page for page in pages if page != "index.html" and only in page]
    faults, seen = [], {}
    with serve(build) as base:
        shares = [pages[i::BROWSERS] for i in range(BROWSERS) if pages[i::BROWSERS]]
        with ThreadPoolExecutor(BROWSERS) as pool:
            work = functools.partial(look_at_some, base=base, screens=screens)
            looks = {
                page: look for part in pool.map(work, shares) for page, look in part
            }
        for page in pages:
            found, seen[page] = looks[page]
            faults += [f"{page}: {fault}" for fault in found]
        for link in {link for found in seen.values() for link in found["links"]}:
            path = urllib.parse.unquote(urllib.parse.urlsplit(link).path).lstrip(
                "/"
            )
            if link.startswith(base) and not (build / path).exists():
                sources = [page for page in pages if link in seen[page]["links"]]
                faults.append(f"{sources[0]}: link to {path}, which is not there")
        faults += check_links(base, seen)
        if word:
            with Browser() as browser:
                faults += check_search(browser, base, word)
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.browse", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--build", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--screens", type=Path, default=ROOT / "_build" / "screens")
    parser.add_argument(
        "--no-screens", action="store_true", help="take no pictures"
    )
    parser.add_argument("--only", default="", help="pages whose path contains this")
    parser.add_argument(
        "--word", default="tokenizer", help="the search must find it"
    )
    options = parser.parse_args(arguments)
    if not (options.build / "search.html").exists():
        print(
            f"{options.build}: no built book there; run `make book`",
            file=sys.stderr,
        )
        return 2
    screens = None if options.no_screens else options.screens
    try:
        faults = check_site(options.build, screens, options.word, options.only)
    except NoBrowserError as error:
        print(error, file=sys.stderr)
        return 2
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else "The book looks right.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
