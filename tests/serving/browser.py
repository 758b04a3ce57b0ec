"""A headless Chromium, for the tests of the page, and for its picture in docs/images:

PYTHONPATH=. python tests/serving/browser.py samples/fashion/coat/00010.png docs/images/serve_page.png [WIDTH] [dark]
"""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack

from websockets.sync.client import connect

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser_program() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """A headless Chromium, over its DevTools protocol."""

    def __init__(self, program, folder):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        options += [f"--user-data-dir={folder}", "--window-size=1000,1100", "--disable-dev-shm-usage", "about:blank"]
        self.process = subprocess.Popen([program, *options], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if "DevTools listening on " in line:
                port = line.rsplit(":", 1)[1].split("/")[0]
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as response:
            page = next(one for one in json.load(response) if one["type"] == "page")
        self.opened, self.number = ExitStack(), 0
        url = page["webSocketDebuggerUrl"]
        self.socket = self.opened.enter_context(connect(url, max_size=None, proxy=None))

    def __call__(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression):
        until = time.monotonic() + 60
        while not (found := self.value(expression)):
            assert time.monotonic() < until, expression
            time.sleep(0.05)
        return found

    def show(self, port, file):
        """Give the file to the page of a service; returns "1" once its answer is there, or "error"."""
        self("Page.navigate", url=f"http://127.0.0.1:{port}/")
        self.until("document.readyState === 'complete' && document.getElementById('name').textContent")
        document = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        self("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
        return self.until("document.body.dataset.done")

    def picture(self):
        return base64.b64decode(self("Page.captureScreenshot")["data"])

    def close(self):
        self.opened.close()
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()


def main(image, output, width="1000", scheme="light"):
    from revit_kernels.serving.batcher import Batcher
    from revit_kernels.serving.endpoints import Endpoints, Listener, Local
    from revit_kernels.serving.prepare import Settings, prepare

    with tempfile.TemporaryDirectory() as folder:
        batcher = Batcher(prepare(Settings()))
        listener, browser = Listener(Endpoints(Local(batcher, "revit"))), Browser(browser_program(), folder)
        try:
            size = {"width": int(width), "deviceScaleFactor": 1, "mobile": False}
            browser("Emulation.setDeviceMetricsOverride", height=800, **size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser("Emulation.setEmulatedMedia", features=features)
            browser.show(listener.port, image)
            height = browser.value("document.documentElement.scrollHeight")
            browser("Emulation.setDeviceMetricsOverride", height=height, **size)
            with open(output, "wb") as file:
                file.write(browser.picture())
        finally:
            browser.close()
            listener.close()
            batcher.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
