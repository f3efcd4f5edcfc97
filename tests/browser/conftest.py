"""A result that is served by the command line, and a real browser that looks at it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

import kermes
from kermes.io import write_npz
from kermes.simulation import simulate_scene

expect.set_options(timeout=20_000)
WIDTH, HEIGHT = 1400, 900


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with the field of kermes demo and its result; one faint star close to another is not in the list."""
    folder = tmp_path_factory.mktemp("view")
    scene = simulate_scene(n_sources=40, seed=1)
    write_npz(folder / "scene.npz", scene.coadd)
    kermes.deblend(scene.coadd, peaks=scene.peaks[:-1], workers=1).write(folder / "out")
    return folder


class Server:
    """`kermes view` in a process of its own."""

    def __init__(self, arguments):
        command = [str(Path(sys.executable).with_name("kermes")), "view", *arguments, "--no-browser", "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said = []
        self.address = None
        for line in self.process.stderr:
            self.said.append(line)
            if "http:" in line:
                self.address = next(word for word in line.split() if word.startswith("http:"))
                break
        # Read on, so that the pipe never fills.
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self._reader.join(20)
        self.process.stderr.close()


@pytest.fixture
def serve(made, tmp_path):
    """Start a view of a copy of the result: serve(*options)."""
    servers = []

    def start(*options, folder=None, coadd=True):
        folder = tmp_path if folder is None else folder
        if not (folder / "out").exists():
            shutil.copytree(made / "out", folder / "out")
        inputs = [str(folder / "out"), *([str(made / "scene.npz")] if coadd else [])]
        servers.append(Server([*inputs, *options]))
        assert servers[-1].address, servers[-1].said
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "needs chromium, or its path in the variable CHROMIUM"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that fails the test when something goes wrong in it, or when it asks anybody but its own server."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if is_own(request.url) else wrong.append(request.url))
    page.wrong = wrong
    yield page
    context.close()
    assert not wrong


def is_own(url):
    return url.startswith(("http://localhost:", "data:", "blob:", "about:"))
