"""What all benchmarks share: their options, what they ran on, and where their figures go."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("kermes", "numpy", "scipy", "numba", "rocket-fft", "astropy")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside_project = Path(__file__).resolve().parents[2] / "shared"
    out.add_argument("--shared", type=Path, default=beside_project, help="folder with the data and the scorers")
    out.add_argument("--quick", action="store_true", help="a small part, to see that it runs; decides nothing")
    out.add_argument("--json", type=Path, help="write the figures to this file too")
    return out


def add_model(options: argparse.ArgumentParser) -> None:
    """Add the option that chooses the model, None if left out."""
    options.add_argument("--model", help="kermes, scarlet-lite or templates; the default model if left out")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Say what the figures were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "cpu": _cpu(),
        "cores": cores,
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def print_header(title: str, workers: str = "1") -> None:
    """Print what is measured, and on what."""
    about = describe()
    print(f"== {title}")
    print("   " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    threads = ", ".join(f"{name}={value}" for name, value in about["threads"].items()) or "not limited"
    print(f"   {about['cpu']}, {about['cores']} cores, load {about['load'][0]}; workers {workers}; threads {threads}")
    if about["load"][0] > 0.5:
        print("   other programs are running: quote no times from this run")


def print_verdict(what: str, value: float, limit: float, at_least: bool = False, unit: str = "") -> None:
    """Print a figure beside its limit, and whether it keeps to it."""
    kept = value >= limit if at_least else value <= limit
    print(
        f"{what}: {value:.4g}{unit}, {'at least' if at_least else 'at most'} {limit:g}{unit}: {'ok' if kept else 'NO'}"
    )


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures, and what they were measured on, as JSON."""
    if path is not None:
        path.write_text(json.dumps({"machine": describe(), "command": sys.argv, **figures}, indent=1) + "\n")
