# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium over its debugging protocol: open a file, run a program in the page, press keys, take a picture."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import websockets

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0",
          "--no-first-run", "--disable-extensions", "--disable-background-networking")  # fmt: skip
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Escape": 27}


class Browser:
    """One tab. What went wrong in it is in ``errors``: exceptions, console errors, files that did not load."""

    def __init__(self, socket):
        self.socket, self.errors, self._sent, self._events = socket, [], 0, []

    async def call(self, method, **parameters):
        self._sent += 1
        mine = self._sent
        await self.socket.send(json.dumps({"id": mine, "method": method, "params": parameters}))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.recv(), 60))
            if message.get("id") == mine:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message):
        said = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["exception"].get("description", str(said)))
        elif message["method"] == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(str(said["args"]))
        elif message["method"] == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])

    async def open(self, file: Path, ready: str) -> float:
        """Open ``file`` and wait until the expression ``ready`` is true; seconds from the call to then."""
        begun = time.monotonic()
        await self.call("Page.navigate", url=file.absolute().as_uri())
        await self.until(ready)
        return time.monotonic() - begun

    async def until(self, expression, seconds=30.0):
        end = time.monotonic() + seconds
        while not await self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors}"
            await asyncio.sleep(0.02)

    async def ask(self, expression):
        """Value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:  # of a page that is still being loaded: nothing is there to be asked
            return None
        return found["result"].get("value")

    async def press(self, key):
        code = _KEYS.get(key, ord(key.upper()[0]))
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def picture(self, file: Path):
        shot = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(width=1440, height=900, scheme="light"):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            port = next(found[1] for line in process.stderr if (found := re.search(r"ws://[\d.]+:(\d+)/", line)))
            page = await _first_page(port)
            async with websockets.connect(page, max_size=None) as socket:
                tab = Browser(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                feature = {"name": "prefers-color-scheme", "value": scheme}
                await tab.call("Emulation.setEmulatedMedia", features=[feature])
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                await tab.call("Emulation.setDeviceMetricsOverride", **size)
                yield tab
        finally:
            process.terminate()
            process.wait(20)


async def _first_page(port):
    import urllib.request

    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [each for each in json.load(answer) if each["type"] == "page"]
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(0.1)
