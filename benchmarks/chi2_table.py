"""Reduced chi2 of every scene and HSC blend, beside lsst.scarlet.lite.

Mean of (model - image)^2 / variance: over all bands and pixels of a scene of the arena; over the valid pixels inside
the footprint of an HSC blend. It may not be more than 1 % above that of the reference. A model that follows the
noise has a low chi2 too, so this table says that nothing was left out, not that the fluxes are right: for these see the
tables of fluxes. One worker, processor time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from cases import Case, arena_case, check, config_of, hsc_cases, load_scorer
from machine import add_model, parser, print_header, write

LARGEST_RATIO = 1.01


def cases_of(arena: ModuleType, hsc_fakes: ModuleType, quick: bool) -> Iterator[tuple[str, Case]]:
    """Give everything that the reference has a figure for, with its kind."""
    for kind in arena.KINDS:
        for k, (name, scene) in enumerate(arena.scenes(kind)):
            if not quick or k == 0:
                yield kind, arena_case(name, scene)
    for k, case in enumerate(hsc_cases(hsc_fakes)):
        if not quick or k < 15:
            yield "hsc", case


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    args = options.parse_args()
    arena, hsc_fakes = load_scorer(args.shared, "arena"), load_scorer(args.shared, "hsc_fakes")
    stored = json.loads((args.shared / "arena" / "reference_chi2.json").read_text())
    reference = {**stored["scenes"], **stored["hsc_fakes"]}
    config = config_of(args.model)

    print_header(f"reduced chi2, model {config.model}")
    rows: list[dict[str, Any]] = []
    for kind, case in cases_of(arena, hsc_fakes, args.quick):
        if not rows:
            case.deblend(config=config)
        start = time.process_time()
        result = case.deblend(config=config, workers=1)
        seconds = time.process_time() - start
        chi2, peer = check(case, result, largest_chi2=np.inf), reference[case.name]
        rows.append(
            {
                "kind": kind,
                "name": case.name,
                "chi2": chi2,
                "peer": peer,
                "ratio": chi2 / peer,
                "peaks": len(case.peaks),
                "seconds": seconds,
                "iterations": int(np.max(result.objects["iterations"])),
                "converged": float(np.mean(result.objects["converged"])),
            }
        )
    print("   kind      n  ratio median    max  above 1.01  ms/source  iterations  converged")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        ratio = np.array([row["ratio"] for row in mine])
        per_source = 1e3 * sum(row["seconds"] for row in mine) / sum(row["peaks"] for row in mine)
        print(
            f"   {kind:8s} {len(mine):3d} {np.median(ratio):13.4f} {ratio.max():6.3f} "
            f"{(ratio > LARGEST_RATIO).sum():11d} {per_source:10.2f} "
            f"{np.median([row['iterations'] for row in mine]):11.0f} "
            f"{np.mean([row['converged'] for row in mine]):10.2f}"
        )
    above = sorted((row for row in rows if row["ratio"] > LARGEST_RATIO), key=lambda row: -row["ratio"])
    print(f"above {LARGEST_RATIO}: {len(above)} of {len(rows)}")
    for row in above:
        print("   {kind:8s} {name:24s} {chi2:.4f}, reference {peer:.4f}, ratio {ratio:.3f}".format(**row))
    write(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
