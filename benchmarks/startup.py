"""How long the first answer takes: with nothing compiled, with everything compiled, and from the command line.

* Cold: an empty compile cache and a fresh process; import, first deblend of an HSC blend, second deblend; and the
  functions that take longest to compile.
* Warm: the same again, with the cache that the cold start filled; the answer must be the same to the last bit.
* `kermes deblend` of the same blend as a command, start to end, imports included: once with an empty cache, then with
  that cache; with a picture, as by default, and without. `kermes --help` as a command.
* The slowest imports, as python -X importtime sees them.

The blend is shared/data/hsc_cosmos/hsc_cosmos_35.npz, or a simulated one of that size where it is missing. Both the
clock and the processor time of the processes are given; on a machine with other work the second is the better guide.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import parser, print_header, print_verdict, write

COLD_LIMIT = 20.0
WARM_LIMIT = 3.0

FIRST_ANSWER = """
import json, sys, time
start = time.perf_counter()
import numpy as np
import kermes
imported = time.perf_counter()
coadd = kermes.read(sys.argv[1])
import kermes.tile
read = time.perf_counter()
from numba.core import event
compiling = event.RecordingListener()
event.register("numba:compile", compiling)
result = kermes.deblend(coadd)
first = time.perf_counter()
compiled, open_calls = {}, []
for when, what in compiling.buffer:
    if what.is_start:
        open_calls.append([when, 0.0])
    else:
        began, inside = open_calls.pop()
        function = what.data["dispatcher"].py_func
        name = function.__module__ + "." + function.__name__
        compiled[name] = compiled.get(name, 0.0) + when - began - inside
        if open_calls:
            open_calls[-1][1] += when - began
kermes.deblend(coadd)
second = time.perf_counter()
chi2 = float(np.mean((result.model_image() - coadd.images)[coadd.valid] ** 2 / coadd.variance[coadd.valid]))
finite = all(np.isfinite(np.asarray(result.objects[band + "_flux"], dtype=float)).all() for band in result.bands)
print(json.dumps({"import": imported - start, "read": read - imported, "first": first - read, "second": second - first,
                  "compiled": compiled, "rows": len(result.objects), "peaks": len(coadd.peaks), "chi2": chi2,
                  "finite": finite}))
"""

COMMAND = "import sys; from kermes.cli import main; sys.exit(main())"


def run(arguments: list[str], cache: Path) -> tuple[float, float, str]:
    """Run Python with a compile cache; returns seconds by the clock, of the processor, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    # Where this is set, Python itself compiles all of kermes at each start, which no user's installation does.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{arguments}: {done.stderr}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout + done.stderr


def blend_file(shared: Path, folder: Path) -> Path:
    """Return the HSC blend, or write a simulated one of its size into a folder."""
    real = shared / "data" / "hsc_cosmos" / "hsc_cosmos_35.npz"
    if real.exists():
        return real
    from kermes.io.npz import write_npz
    from kermes.simulation import simulate_scene

    scene = simulate_scene(
        n_sources=7, shape=(58, 48), bands=("g", "r", "i", "z", "y"), seed=1, magnitudes=(19.5, 24.0)
    )
    write_npz(folder / "blend.npz", scene.coadd, scene.peaks)
    return folder / "blend.npz"


def first_answer(path: Path, cache: Path) -> dict[str, Any]:
    """Time import and deblend in a fresh process."""
    clock, processor, printed = run(["-c", FIRST_ANSWER, str(path)], cache)
    figures: dict[str, Any] = {**json.loads(printed), "clock": clock, "processor": processor}
    if figures["rows"] != figures["peaks"] or not figures["finite"]:
        sys.exit(f"the answer is wrong: {figures}")
    return figures


def shortest(arguments: list[str], cache: Path, repeat: int) -> tuple[float, float]:
    """Shortest of several runs, by the clock and of the processor."""
    runs = [run(arguments, cache)[:2] for _ in range(repeat)]
    return min(clock for clock, _ in runs), min(processor for _, processor in runs)


def slowest_imports(module: str, cache: Path, n: int = 12) -> list[tuple[str, float, float]]:
    """Names, own and cumulative times [s] of the packages that take longest to import."""
    _, _, printed = run(["-X", "importtime", "-c", f"import {module}"], cache)
    rows = []
    for line in printed.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        cumulative, _, name = rest.partition("|")
        if own.strip().isdigit():
            rows.append((name.strip(), int(own) / 1e6, int(cumulative) / 1e6))
    return sorted(rows, key=lambda row: -row[2])[:n]


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    repeat = 1 if args.quick else 5
    print_header("start")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        path = blend_file(args.shared, folder)
        for label in ("cold", "warm"):
            answer = first_answer(path, cache)
            figures[label] = answer
            print(
                f"{label}: {answer['clock']:.2f} s, {answer['processor']:.2f} s of the processor; import "
                f"{answer['import']:.2f}, read {answer['read']:.2f}, first deblend {answer['first']:.2f}, second "
                f"{answer['second']:.3f}; {answer['rows']} rows for {answer['peaks']} peaks, "
                f"reduced chi2 {answer['chi2']:.3f}"
            )
        if figures["cold"]["chi2"] != figures["warm"]["chi2"]:
            sys.exit("the answer depends on whether the compile cache was empty")
        compiled = sorted(figures["cold"]["compiled"].items(), key=lambda item: -item[1])
        print(f"compiled, {sum(seconds for _, seconds in compiled):.1f} s, the slowest without what they call [s]:")
        print(
            "   "
            + ", ".join(f"{name.removeprefix('kermes.kernels.')} {seconds:.1f}" for name, seconds in compiled[:12])
        )
        print_verdict("cold start", figures["cold"]["clock"], COLD_LIMIT, unit=" s")
        print_verdict("cold start, processor", figures["cold"]["processor"], COLD_LIMIT, unit=" s")

        deblend = ["-c", COMMAND, "deblend", str(path), "-o", str(folder / "out"), "--overwrite"]
        cache = folder / "cache of the command"
        clock, processor, _ = run(deblend, cache)
        figures["kermes deblend, cold"] = {"clock": clock, "processor": processor}
        print_verdict("kermes deblend, cold", clock, COLD_LIMIT, unit=" s")
        print_verdict("kermes deblend, cold, processor", processor, COLD_LIMIT, unit=" s")
        for label, arguments in (
            ("kermes deblend", deblend),
            ("kermes deblend, no picture", [*deblend, "--no-picture"]),
            ("kermes --help", ["-c", COMMAND, "--help"]),
            ("import kermes", ["-c", "import kermes"]),
            ("python alone", ["-c", "pass"]),
        ):
            clock, processor = shortest(arguments, cache, repeat)
            figures[label] = {"clock": clock, "processor": processor}
            if label == "kermes deblend":
                print_verdict("kermes deblend, warm", clock, WARM_LIMIT, unit=" s")
            print(f"   {label}: {clock:.2f} s, {processor:.2f} s of the processor")
        for module in ("kermes.tile", "kermes.cli"):
            rows = slowest_imports(module, cache)
            figures[f"imports of {module}"] = rows
            print(f"slowest imports of {module} [s, with what they import (alone)]:")
            print("   " + ", ".join(f"{name} {cumulative:.2f} ({own:.2f})" for name, own, cumulative in rows))
    write(args.json, figures)


if __name__ == "__main__":
    main()
