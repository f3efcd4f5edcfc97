"""What each ingredient of the model "kermes" buys: all of them, then all but one, on scenes with known truth.

    python benchmarks/ablation.py                        # the stored scenes, SHARED/arena/scenes
    python benchmarks/fresh_scenes.py FOLDER             # or others,
    python benchmarks/ablation.py --folder FOLDER        # where differences drown less in noise

Every ingredient is switched off by settings that users have; the last row is the model "scarlet-lite". Per kind of
scene: *excess*, the robust scatter of (flux - truth) over the error that a fit of the true shapes has, of all sources
above a signal-to-noise of 5, of the heavily blended ones, and of those above 100; then, of all, the share of fluxes
wrong by more than half and the bias [%]. A star says that a figure differs from that of the first row: the sources
are the same, so they are resampled together, all bands of a source at once, and in 99.5 % of the draws the difference
has the same sign. The tables are printed as reStructuredText.

What cannot be switched off has no row: fluxes before shapes, and the wings of the PSF. The fit of crowded fields has
settings of its own, so that most rows do not reach `crowded`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arena_table import cuts_of
from cases import Case, arena_case
from machine import parser, print_header, write
from numpy.typing import NDArray
from resampling import scatter

import kermes

DoubleArray = NDArray[np.float64]

KINDS = ("field", "knots", "real", "pair", "bright", "crowded")
PER_TABLE = 3
NEVER = 1e9
CERTAIN = 0.995

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "one source at a time": {"largest_group": 1},
    "groups of any contrast": {"brightness_ratio": NEVER},
    "centres on the peaks": {"center_box": 1e-3},
    "points only": {"extended_penalty": NEVER, "sersic_penalty": NEVER, "double_penalty": NEVER},
    "exponentials at most": {"sersic_snr": NEVER, "double_snr": NEVER},
    "no bulges": {"double_snr": NEVER},
    "no mean of kinds": {"average_kinds": False},
    "nothing else looked for": {"residual_rounds": 0},
    "its threshold not relative": {"residual_share": 0.0},
    "parts taken as sources": {"clump_share": 0.0},
    "no priors": {"center_width": 0.0, "radius_width": 0.0, "shear_width": 0.0, "index_width": 0.0},
    "no prior on centres": {"center_width": 0.0},
    "no largest radius": {"largest_radius": 0.0},
    "bright sources not first": {"bright_snr": NEVER},
    "no error of models": {"model_error": 0.0},
    "structure not heeded": {"heed_structure": False},
    "crowded as any other": {"crowded_sources": 10**6},
}
"""Settings of the profiles that switch an ingredient off."""


def scenes_of(folder: Path, kind: str, quick: bool) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Read the scenes of a kind, in order."""
    for path in sorted(folder.glob(f"{kind}_*.npz"))[: 1 if quick else None]:
        with np.load(path) as content:
            scene = {name: content[name] for name in content}
        yield arena_case(path.name, scene), scene


def flux_of(case: Case, config: kermes.Config) -> DoubleArray:
    """Total flux of the model of each peak and band, shape (N, B)."""
    objects = case.deblend(config=config, workers=1).objects
    if sorted(objects["peak_index"]) != list(range(len(case.peaks))):
        sys.exit(f"{case.name}: {len(objects)} rows for {len(case.peaks)} peaks")
    objects = objects[np.argsort(objects["peak_index"])]
    return np.array([np.asarray(objects[f"{band}_flux"], dtype=float) for band in case.coadd.bands]).T


def figures(flux: DoubleArray, truth: DoubleArray, sigma: DoubleArray, blendedness: DoubleArray) -> DoubleArray:
    """Work out the five figures of a cell; all arrays have the shape (sources, bands), NaN in truth is not scored."""
    scored = np.isfinite(truth)
    flux, truth, sigma, blendedness = (array[scored] for array in (flux, truth, sigma, blendedness))
    error, scaled = flux / truth - 1, (flux - truth) / sigma
    cuts = cuts_of(truth / sigma, blendedness)
    good = np.isfinite(error)
    whole = cuts["all"] & good
    bias = np.median(error[whole]) if whole.any() else np.nan
    wrong = ~(np.abs(error[cuts["all"]]) <= 0.5)
    return np.array(
        [
            *(scatter(scaled[cuts[cut] & good]) for cut in ("all", "heavy", "snr >100")),
            100 * np.mean(wrong) if len(wrong) else np.nan,
            100 * bias,
        ]
    )


def measure(
    kind: str, folder: Path, configs: Mapping[str, kermes.Config], quick: bool
) -> dict[str, list[tuple[float, bool]]]:
    """Score all configurations on a kind; each figure, and whether it differs from that of the first one."""
    scenes = list(scenes_of(folder, kind, quick))
    truth, sigma = (np.concatenate([scene[name] for _, scene in scenes]) for name in ("flux", "oracle_sigma"))
    alone = np.concatenate([scene["blendedness"] for _, scene in scenes])
    blendedness = np.broadcast_to(alone[:, None], truth.shape)
    rng = np.random.default_rng(1)
    draws = rng.integers(len(truth), size=(50 if quick else 500, len(truth)))

    def score(flux: DoubleArray, rows: NDArray[Any]) -> DoubleArray:
        return figures(flux[rows], truth[rows], sigma[rows], blendedness[rows])

    out: dict[str, list[tuple[float, bool]]] = {}
    first: DoubleArray | None = None
    for name, config in configs.items():
        flux = np.concatenate([flux_of(case, config) for case, _ in scenes])
        drawn = np.array([score(flux, rows) for rows in draws])
        first = drawn if first is None else first
        more, less = np.mean(drawn > first, axis=0), np.mean(drawn < first, axis=0)
        differs = np.maximum(more, less) > CERTAIN
        values = score(flux, np.arange(len(truth)))
        out[name] = [(float(value), bool(mark)) for value, mark in zip(values, differs, strict=True)]
    return out


def describe(folder: Path, kind: str, quick: bool) -> str:
    """Count what the figures of a kind are made of."""
    scenes = [scene for _, scene in scenes_of(folder, kind, quick)]
    truth, sigma = (np.concatenate([scene[name] for scene in scenes]) for name in ("flux", "oracle_sigma"))
    blendedness = np.concatenate([scene["blendedness"] for scene in scenes])
    scored = np.isfinite(truth)
    cuts = cuts_of((truth / sigma)[scored], np.broadcast_to(blendedness[:, None], truth.shape)[scored])
    n_all, n_heavy, n_bright = (np.count_nonzero(cuts[cut]) for cut in ("all", "heavy", "snr >100"))
    return f"{len(scenes)} scenes, {n_all} fluxes, {n_heavy} of them in heavy blends, {n_bright} above S/N 100"


def cell(row: list[tuple[float, bool]]) -> str:
    """Write the five figures of one configuration and kind."""
    forms = ["{:.2f}" if value < 10 else "{:.1f}" for value, _ in row[:3]] + ["{:.1f}", "{:+.1f}"]
    return " ".join(
        (form.format(value) if np.isfinite(value) else "-") + "*" * mark
        for form, (value, mark) in zip(forms, row, strict=True)
    )


def print_table(cells: Mapping[str, Mapping[str, list[tuple[float, bool]]]]) -> None:
    """Print the kinds side by side, one configuration a row."""
    kinds = list(cells)
    rows = [[name, *(cell(cells[kind][name]) for kind in kinds)] for name in cells[kinds[0]]]
    table = [["", *kinds], *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(kinds) + 1)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    # An empty first cell would join the row to the one above.
    lines[0] = "\\" + lines[0][1:]
    print("\n".join([rule, lines[0], rule, *lines[1:], rule, ""]))


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="folder of scenes; SHARED/arena/scenes if left out")
    options.add_argument("--kinds", help="some of the kinds, with commas between")
    args = options.parse_args()
    folder = args.folder or args.shared / "arena" / "scenes"
    wanted = args.kinds.split(",") if args.kinds else KINDS
    kinds = [kind for kind in wanted if any(folder.glob(f"{kind}_*.npz"))]
    if not kinds:
        sys.exit(f"{folder} holds no scenes of {', '.join(wanted)}: write some with benchmarks/fresh_scenes.py")

    default = kermes.Config()
    configs = {"everything": default}
    for name, changes in ABLATIONS.items():
        configs[name] = replace(default, profiles=replace(default.profiles, **changes))
    configs["scarlet-lite"] = replace(default, model="scarlet-lite")

    print_header("ablation: excess of all, heavy blends, S/N > 100; wrong by half [%]; bias [%]")
    cells = {}
    for first in range(0, len(kinds), PER_TABLE):
        table = {kind: measure(kind, folder, configs, args.quick) for kind in kinds[first : first + PER_TABLE]}
        print_table(table)
        cells.update(table)
    for kind in kinds:
        print(f"{kind}: {describe(folder, kind, args.quick)}")
    write(args.json, {"folder": str(folder), "cells": cells})


if __name__ == "__main__":
    main()
