"""Memory of a fit: small for one blend, and steady over many.

Two measurements of resident memory:

* Peak growth while one HSC blend with 3 to 10 peaks is deblended, the result included, each in a process of its own.
  Other blends, a small, a medium and a large one, are deblended first, so that code and tables are loaded; freed
  memory is handed back to the system, so that it cannot be used again unseen; the high-water mark is reset (a 5 written
  to /proc/self/clear_refs) and read afterwards (VmHWM). tracemalloc would not see what compiled code allocates.
* Growth over many fits in one process, blends of several sizes in turn.

Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, check, config_of, hsc_case, load_scorer, simulated_case
from machine import add_model, parser, print_header, print_verdict, write

import kermes

LIMIT_MB = 5.7
N_FITS = 20_000
N_SAMPLE = 25


def resident_mb(field: str, process: int | str = "self") -> float:
    """Read VmRSS or VmHWM of a process [MB of a million bytes]."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def settle() -> None:
    """Hand freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_growth(case: Case, config: kermes.Config) -> dict[str, float]:
    """Growth of resident memory [MB] while a case is deblended: its peak, and what the result keeps."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    if resident_mb("VmHWM") > before + 0.5:
        sys.exit("this system does not reset the high-water mark of memory")
    result = case.deblend(config=config)
    peak = resident_mb("VmHWM")
    settle()
    after = resident_mb("VmRSS")
    return {"peak_mb": peak - before, "kept_mb": after - before, "chi2": check(case, result)}


def measure_alone(shared: Path, path: str, warm_up: list[str], model: str) -> dict[str, float]:
    """Measure one blend in a fresh process."""
    command = [sys.executable, __file__, "--shared", str(shared), "--one", path, "--model", model]
    command += ["--warm-up", *warm_up]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def growth_over_fits(n_fits: int, config: kermes.Config) -> dict[str, Any]:
    """Resident memory [MB] along `n_fits` fits in this process."""
    cases = [simulated_case(n, seed, pixels_per_source=300) for seed, n in enumerate((1, 2, 3, 4))]
    for case in cases * 5:
        check(case, case.deblend(config=config))
    marks = np.unique(np.linspace(0, n_fits, 11).astype(int)).tolist()
    resident = []
    start = time.perf_counter()
    for k in range(n_fits + 1):
        if k in marks:
            settle()
            resident.append(resident_mb("VmRSS"))
        if k < n_fits:
            cases[k % len(cases)].deblend(config=config)
    return {"fits": marks, "resident_mb": resident, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    options.add_argument("--all", action="store_true", help=f"all blends with 3 to 10 peaks, not only {N_SAMPLE}")
    options.add_argument("--fits", type=int, help=f"fits of the growth test; default {N_FITS}, --quick 500")
    options.add_argument("--one", help="measure this blend only, in this process; print JSON")
    options.add_argument("--warm-up", nargs="*", default=[], help="blends to deblend first")
    args = options.parse_args()
    config = config_of(args.model)
    scorer = load_scorer(args.shared, "hsc_fakes")
    if args.one:
        for path in args.warm_up:
            case = hsc_case(scorer, path)
            check(case, case.deblend(config=config))
        print(json.dumps(peak_growth(hsc_case(scorer, args.one), config)))
        return

    print_header(f"memory, model {config.model}")
    sizes = {path: hsc_case(scorer, path) for path in scorer.paths()}
    wanted = sorted(
        (p for p, case in sizes.items() if 3 <= len(case.peaks) <= 10), key=lambda p: sizes[p].coadd.images.size
    )
    if not args.all:
        # Evenly over the sizes, the largest included.
        chosen = np.linspace(0, len(wanted) - 1, 4 if args.quick else N_SAMPLE).round().astype(int)
        wanted = [wanted[k] for k in np.unique(chosen)]
    others = sorted((p for p in sizes if p not in wanted), key=lambda p: sizes[p].coadd.images.size)
    warm_up = [others[0], others[len(others) // 2], others[-1]]
    rows: list[dict[str, Any]] = []
    for path in wanted:
        case = sizes[path]
        figures = measure_alone(args.shared, path, warm_up, config.model)
        rows.append({"name": case.name, "peaks": len(case.peaks), "shape": case.coadd.images.shape, **figures})
    peak, kept = (np.array([row[key] for row in rows]) for key in ("peak_mb", "kept_mb"))
    print(
        f"{len(rows)} HSC blends with 3 to 10 peaks, every peak with its row, "
        f"reduced chi2 at most {max(row['chi2'] for row in rows):.2f}"
    )
    print(
        f"peak growth [MB]: median {np.median(peak):.2f}, largest {peak.max():.2f}; kept: median {np.median(kept):.2f}"
    )
    for row in sorted(rows, key=lambda row: -row["peak_mb"])[:3]:
        print("   {name} {shape}, {peaks} peaks: {peak_mb:.2f}".format(**row))
    print_verdict("largest peak growth", float(peak.max()), LIMIT_MB, unit=" MB")

    growth = growth_over_fits(args.fits or (500 if args.quick else N_FITS), config)
    marks, resident = growth["fits"], growth["resident_mb"]
    middle = len(resident) // 2
    print(f"resident memory over {marks[-1]} fits, {growth['seconds'] / marks[-1] * 1e3:.1f} ms each [MB]:")
    print("   " + ", ".join(f"{mark}: {value:.1f}" for mark, value in zip(marks, resident, strict=True)))
    print_verdict("growth in the second half", resident[-1] - resident[middle], 1.0, unit=" MB")
    write(args.json, {"blends": rows, "growth": growth})


if __name__ == "__main__":
    main()
