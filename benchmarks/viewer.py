"""The page of a result in a real browser: time to the first picture, of pan and zoom steps, memory of the server.

A result and its coadd are given, or made: a patch of 4000 x 4000 pixels in six bands with about 50,000 objects, which
takes some ten minutes. Times are those that a reader waits: from the wish to the last tile on the screen, the marks of
all objects included. Needs the extra ``test-view`` and a chromium. Linux only, for the memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

from machine import parser, print_header, print_verdict, write
from memory import resident_mb
from playwright.sync_api import Page, sync_playwright

import kermes
from kermes.io import write_npz
from kermes.simulation import simulate_patch

FIRST_S, STEP_MS, MEMORY_MB = 3.0, 300.0, 1500.0

STEP = """
async ([name, action]) => {
  const { viewer, items } = window.kermes;
  const frame = () => new Promise(requestAnimationFrame);
  const start = performance.now();
  const step = {
    right: () => viewer.viewport.panBy(new OpenSeadragon.Point(0.4 * viewer.viewport.getBounds().width, 0), true),
    up: () => viewer.viewport.panBy(new OpenSeadragon.Point(0, -0.4 * viewer.viewport.getBounds().height), true),
    in: () => viewer.viewport.zoomBy(2, null, true),
    out: () => viewer.viewport.zoomBy(0.5, null, true),
  };
  step[action]();
  viewer.forceRedraw();
  await frame();
  await frame();
  while (!items[name].getFullyLoaded()) await frame();
  await frame();
  return performance.now() - start;
}
"""

SHOWN = "() => document.querySelector('#side h2')?.id === 'object-' + window.kermes.state.object"


def make(folder: Path, side: int, density: float) -> tuple[Path, Path]:
    """Simulate a patch and deblend it at the true peaks."""
    patch = simulate_patch(shape=(side, side), seed=7, density_arcmin2=density)
    write_npz(folder / "tile.npz", patch.coadd)
    kermes.deblend(patch.coadd, peaks=patch.peaks).write(folder / "tile")
    return folder / "tile", folder / "tile.npz"


def state(address: str) -> dict[str, float]:
    with urllib.request.urlopen(address + "api/state") as answer:
        return dict(json.load(answer))


def steps(page: Page, layer: str, actions: list[str]) -> list[float]:
    return [page.evaluate(STEP, [layer, action]) for action in actions]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("result", nargs="?", type=Path, help="result to show; left out: made")
    arguments.add_argument("coadd", nargs="?", type=Path, help="its coadd")
    arguments.add_argument("--side", type=int, default=4000, help="of the patch that is made [pixels]")
    arguments.add_argument("--density", type=float, default=283.0, help="sources per square arcminute")
    arguments.add_argument("--chromium", default="/usr/bin/chromium", help="program of the browser")
    options = arguments.parse_args()
    print_header("The page of a result")
    with tempfile.TemporaryDirectory() as name:
        given = options.result is not None and options.coadd is not None
        result, coadd = (options.result, options.coadd) if given else make(Path(name), options.side, options.density)
        return measure(options, result, coadd)


def measure(options: argparse.Namespace, result: Path, coadd: Path) -> int:
    start = time.perf_counter()
    command = [
        str(Path(sys.executable).with_name("kermes")),
        "view",
        str(result),
        str(coadd),
        "--no-browser",
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    figures: dict[str, float] = {}
    try:
        address = next(word for line in server.stderr for word in line.split() if word.startswith("http"))
        figures["server ready [s]"] = time.perf_counter() - start
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            start = time.perf_counter()
            page.goto(address)
            page.wait_for_function("() => window.kermes?.items.image?.getFullyLoaded()", polling="raf")
            figures["first picture [s]"] = time.perf_counter() - start
            page.wait_for_selector("body[data-ready=yes]")
            figures["page complete, marks and table included [s]"] = time.perf_counter() - start
            figures["objects"] = state(address)["n_objects"]
            walk = ["in", "in", "in", "right", "up", "right", "up", "right", "in", "right", "up", "out", "out", "out"]
            times = {"image, while models are drawn": steps(page, "image", walk)}
            peak = resident_mb("VmRSS", server.pid)
            while state(address)["drawn"] < 1:
                time.sleep(0.2)
                peak = max(peak, resident_mb("VmRSS", server.pid))
            figures["models drawn [s]"] = time.perf_counter() - start
            for layer in ("image", "model", "residual"):
                page.goto("about:blank")
                page.goto(f"{address}#layer={layer}&footprints=yes&color=chi2")
                page.wait_for_selector("body[data-ready=yes]")
                page.wait_for_function(f"() => window.kermes.items.{layer}.getFullyLoaded()", polling="raf")
                times[f"{layer}, footprints"] = steps(page, layer, walk)
                peak = max(peak, resident_mb("VmRSS", server.pid))
            texts, pictures = [], []
            for k in range(0, 20, 2):
                start = time.perf_counter()
                page.evaluate(f"document.querySelectorAll('.tabulator-row')[{k}].click()")
                page.wait_for_function(SHOWN, polling="raf")
                texts.append(1e3 * (time.perf_counter() - start))
                page.wait_for_function("() => document.querySelector('#side img').naturalWidth > 0", polling="raf")
                pictures.append(1e3 * (time.perf_counter() - start))
                peak = max(peak, resident_mb("VmRSS", server.pid))
            times |= {"click on an object, its text": texts, "click on an object, its pictures": pictures}
            browser.close()
        figures["server, most memory once it is ready [MB]"] = peak
    finally:
        server.terminate()
        server.wait()
    for name, value in figures.items():
        print(f"{name:45s} {value:9.2f}")
    for name, values in times.items():
        print(f"{name:45s} median {median(values):6.0f} ms, largest {max(values):6.0f} ms")
    moves = [value for name, values in times.items() if not name.startswith("click") for value in values]
    print_verdict("first picture [s]", figures["first picture [s]"], FIRST_S)
    print(f"{sum(move <= STEP_MS for move in moves)} of {len(moves)} steps within {STEP_MS:.0f} ms")
    print_verdict("pan and zoom step, largest [ms]", max(moves), STEP_MS)
    print_verdict("memory of the server [MB]", peak, MEMORY_MB)
    write(options.json, {**figures, **{name: median(values) for name, values in times.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
