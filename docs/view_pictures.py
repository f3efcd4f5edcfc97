"""Draw the pictures of the page on ``kermes view`` anew: needs the extra ``test-view`` and a chromium."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

import kermes
from kermes.config import ProfileConfig
from kermes.io import write_npz
from kermes.simulation import simulate_patch

IMAGES = Path(__file__).parent / "images"
ON_SCREEN = """([y, x]) => {
  const { x: left, y: top, scale } = window.kermes.onScreen();
  const [px, py] = window.kermes.toPicture(y, x);
  const box = document.getElementById("osd").getBoundingClientRect();
  return [box.left + left + px * scale, box.top + top + py * scale];
}"""


def main(chromium="/usr/bin/chromium"):
    patch = simulate_patch(shape=(900, 900), seed=11, bands=("g", "r", "i", "z"), n_bright_stars=1, large_galaxy=True)
    detected = kermes.deblend(patch.coadd)
    missed, nearest = a_close_pair(detected)
    kept = detected.objects["object_id"] != missed
    peaks = np.stack([detected.objects["y"][kept], detected.objects["x"][kept]], axis=1)
    # Without the search of residuals, which would find it.
    config = kermes.Config(profiles=ProfileConfig(residual_rounds=0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_npz(folder / "patch.npz", patch.coadd)
        kermes.deblend(patch.coadd, peaks=peaks, config=config).write(folder / "patch")
        kermes_program = Path(sys.executable).with_name("kermes")
        command = [
            kermes_program,
            "view",
            folder / "patch",
            folder / "patch.npz",
            "--edit",
            "--no-browser",
            "--port",
            "0",
        ]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            address = next(word for line in server.stderr for word in line.split() if word.startswith("http"))
            with sync_playwright() as play:
                browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                take(browser, address, detected[missed].peak, detected[nearest].peak)
                browser.close()
        finally:
            server.terminate()
            server.wait()


def a_close_pair(result):
    """Numbers of an object and of its nearest neighbour, both clearly seen, in a small blend away from the edge."""
    objects = result.objects
    snr = objects["i_flux"] / objects["i_flux_err"]
    sizes = dict(zip(result.blends["blend_id"], result.blends["n_sources"], strict=True))
    for k in np.argsort(-snr):
        row = objects[k]
        same = np.flatnonzero(objects["blend_id"] == row["blend_id"])
        distance = np.hypot(objects["y"][same] - row["y"], objects["x"][same] - row["x"])
        near = same[(distance > 3) & (distance < 12) & (snr[same] > 25)]
        inside = 60 < row["y"] < 840 and 60 < row["x"] < 840
        if snr[k] < 400 and sizes[row["blend_id"]] < 12 and len(near) and inside:
            return int(row["object_id"]), int(objects["object_id"][near[0]])
    raise LookupError("no close pair was found")


def take(browser, address, missed, neighbour):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address + "#y=300&x=230&width=330&footprints=yes&color=model&brightness=1&object=2")
    page.wait_for_selector("body[data-ready=yes]")
    page.wait_for_timeout(3000)
    page.screenshot(path=IMAGES / "view.png")

    y, x = missed
    page.goto("about:blank")
    page.goto(f"{address}#y={y}&x={x}&width=90&layer=residual&brightness=1")
    page.wait_for_selector("body[data-ready=yes]")
    page.wait_for_timeout(1000)
    page.mouse.click(*page.evaluate(ON_SCREEN, list(neighbour)))
    page.click("#editor button:has-text('Add peak')")
    page.mouse.click(*page.evaluate(ON_SCREEN, [y, x]))
    page.wait_for_selector("#editor li")
    page.click("#editor button:has-text('Refit')")
    page.wait_for_selector("#comparison", timeout=60_000)
    page.mouse.move(2, 2)
    page.wait_for_timeout(3000)
    page.screenshot(path=IMAGES / "view_refit.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
