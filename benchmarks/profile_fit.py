"""Where the time goes: the stages of a deblend, and the parts of the fit.

Blends that occur: a field, a pair and a crowded field of the arena, and an HSC blend. First the share of every stage of
`kermes.deblend`, each without the stages inside it. Then the fit of the largest blend alone: transforms, adding
components and collecting their gradients, steps, constraints, products in Fourier space and comparison with the
pixels. These are timed by calling the kernels of the fit over and over on its final state, and multiplied with how
often the fit calls them; what is left of the time of the fit is the rest: clearing planes, resizing boxes, memory.
One worker, processor time, the shortest of several repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cases import Case, arena_case, check, hsc_case, load_scorer
from machine import parser, print_header, write
from numba import njit
from rocket_fft import c2r, r2c

import kermes
from kermes import catalog, fitting, modelling, planning, tile
from kermes.constraints import monotonic_weights, table_radius
from kermes.kernels.components import add_component, add_gradient
from kermes.kernels.convolution import multiply_conjugate_into, multiply_into
from kermes.kernels.fitting import (
    amsgrad,
    background_limit,
    extrapolate_gradient,
    project_morphology,
    weighted_residual,
)

STAGES: dict[str, tuple[Any, str]] = {
    "plan": (tile, "plan_tile"),
    "footprints": (planning, "footprints_of_peaks"),
    "cut": (modelling, "cut_blend"),
    "kernels": (modelling, "fit_kernels"),
    "initialize": (modelling, "initialize"),
    "fit": (modelling, "fit_packed"),
    "measure": (modelling, "measure_fluxes"),
    "render": (modelling, "render_packed"),
    "metrics": (modelling, "blend_metrics"),
    "share": (tile, "shared_fluxes"),
    "rest of the blend": (tile, "fit_blend"),
    "tables": (catalog, "make_objects"),
    "collect": (tile, "collect"),
}
"""Where each stage is looked up when `deblend` calls it."""


@njit(nogil=True)
def transform_pairs(plane, transformed, n):  # type: ignore[no-untyped-def]
    """Transform a plane and back, n times."""
    axes = np.arange(2)
    scale = 1.0 / plane.size
    for _ in range(n):
        r2c(plane, transformed, axes, True, 1.0, 1)
        c2r(transformed, plane, axes, False, scale, 1)


@njit(nogil=True)
def add_components(plane, boxes, offsets, morphologies, spectra, n):  # type: ignore[no-untyped-def]
    """Add all components to a plane, n times one band."""
    for _ in range(n):
        for k in range(len(boxes)):
            y0, x0, height, width = boxes[k]
            add_component(plane, y0, x0, height, width, morphologies[offsets[k] : offsets[k + 1]], spectra[k, 0])


@njit(nogil=True)
def add_gradients(plane, boxes, offsets, morphologies, spectra, gradient, n):  # type: ignore[no-untyped-def]
    """Collect the gradients of all components, n times one band."""
    total = 0.0
    for _ in range(n):
        for k in range(len(boxes)):
            y0, x0, height, width = boxes[k]
            part = slice(offsets[k], offsets[k + 1])
            total += add_gradient(plane, y0, x0, height, width, morphologies[part], spectra[k, 0], gradient[part])
    return total


@njit(nogil=True)
def take_steps(offsets, state, gradient, n):  # type: ignore[no-untyped-def]
    """Take n steps of all components."""
    for _ in range(n):
        for k in range(len(offsets) - 1):
            amsgrad(state, gradient, offsets[k], offsets[k + 1], np.float32(1e-2))


@njit(nogil=True)
def project_all(boxes, offsets, centers, morphologies, spectra, noise, threshold, table, flags, n):  # type: ignore[no-untyped-def]
    """Project all components, n times, each time from where they were."""
    for _ in range(n):
        work = morphologies.copy()
        for k in range(len(boxes)):
            y0, x0, height, width = boxes[k]
            limit = background_limit(spectra[k], noise, threshold)
            part = work[offsets[k] : offsets[k + 1]]
            cy, cx = centers[k, 0] - y0, centers[k, 1] - x0
            project_morphology(part, height, width, cy, cx, limit, flags[0], flags[1], flags[2], table)


@njit(nogil=True)
def compare(plane, transformed, known, kernel_fft, image, weights, n):  # type: ignore[no-untyped-def]
    """Do all of a comparison with the pixels that is no transform, n times one band."""
    total = 0.0
    for _ in range(n):
        multiply_into(transformed, known, kernel_fft)
        total += weighted_residual(plane, image, weights)
        multiply_conjugate_into(known, transformed, kernel_fft)
    return total


@njit(nogil=True)
def extrapolate(transformed, reference, known, power, n):  # type: ignore[no-untyped-def]
    """Carry the gradient of one band on, n times."""
    for _ in range(n):
        extrapolate_gradient(transformed, reference, known, power)


def seconds_per_call(call: Callable[[int], object], at_least: float = 0.02) -> float:
    """Shortest of five, each of so many calls that they take `at_least` seconds together."""
    n = 1
    call(1)
    while True:
        start = time.process_time()
        call(n)
        spent = time.process_time() - start
        if spent >= at_least:
            break
        n = max(2 * n, int(1.2 * n * at_least / max(spent, 1e-9))) if spent > 1e-4 else 10 * n
    times = [spent]
    for _ in range(4):
        start = time.process_time()
        call(n)
        times.append(time.process_time() - start)
    return min(times) / n


@contextmanager
def timed_stages(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of each stage, without the stages inside it."""
    inside = [0.0]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            inside.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                whole = time.process_time() - start
                spent[name] = spent.get(name, 0.0) + whole - inside.pop()
                inside[-1] += whole

        return call

    originals = {name: getattr(module, attribute) for name, (module, attribute) in STAGES.items()}
    for name, (module, attribute) in STAGES.items():
        setattr(module, attribute, timed(name, originals[name]))
    try:
        yield
    finally:
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, originals[name])


def stage_shares(case: Case, repeat: int) -> dict[str, float]:
    """Seconds of each stage of one deblend, mean of `repeat`."""
    spent: dict[str, float] = {}
    with timed_stages(spent):
        start = time.process_time()
        for _ in range(repeat):
            case.deblend()
        whole = time.process_time() - start
    spent["other"] = whole - sum(spent.values())
    return {name: seconds / repeat for name, seconds in spent.items()}


def largest_fit(case: Case) -> tuple[Any, ...]:
    """Arguments of the fit of the blend with most components."""
    calls: list[tuple[Any, ...]] = []
    module, attribute = STAGES["fit"]
    original = getattr(module, attribute)

    def record(*args: Any) -> fitting.Fit:
        calls.append(args)
        fit: fitting.Fit = original(*args)
        return fit

    setattr(module, attribute, record)
    try:
        case.deblend()
    finally:
        setattr(module, attribute, original)
    return max(calls, key=lambda args: len(args[0]))


def fit_shares(arguments: tuple[Any, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part of one fit; and how large it is."""
    _, blend, convolution, config = arguments
    fit = fitting.fit_packed(*arguments)
    packed = fit.packed
    whole = seconds_per_call(lambda n: [fitting.fit_packed(*arguments) for _ in range(n)])

    n_bands = len(blend.images)
    kernel_fft = convolution.transforms[0]
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(kernel_fft.shape[0], convolution.width)).astype(np.float32)
    transformed = np.ones_like(kernel_fft)
    power = np.zeros(kernel_fft.shape, dtype=np.float32)
    centers = np.ascontiguousarray(blend.peaks[packed.sources])
    noise = np.nan_to_num(blend.noise_rms, nan=1.0).astype(np.float32)
    table = monotonic_weights(table_radius(convolution.shape), config.monotonic_weighting, config.min_gradient)
    gradient = 1e-3 * np.ones_like(packed.morphologies)
    state = np.stack([packed.morphologies, gradient, gradient, gradient])
    flags = np.array([config.monotonic, config.symmetric, False])
    components = (packed.boxes, packed.offsets, packed.morphologies)
    image, weights = blend.images[0], blend.weights[0]

    pair = seconds_per_call(lambda n: transform_pairs(plane, transformed, n))
    add = seconds_per_call(lambda n: add_components(plane.copy(), *components, packed.spectra, n))
    collect = seconds_per_call(lambda n: add_gradients(plane, *components, packed.spectra, gradient.copy(), n))
    step = seconds_per_call(lambda n: take_steps(packed.offsets, state.copy(), gradient, n))
    project = seconds_per_call(
        lambda n: project_all(
            packed.boxes,
            packed.offsets,
            centers,
            packed.morphologies,
            packed.spectra,
            noise,
            config.background_threshold,
            table,
            flags,
            n,
        )
    )
    comparison = seconds_per_call(
        lambda n: compare(plane, transformed.copy(), transformed.copy(), 0 * kernel_fft + 1, image, weights, n)
    )
    product = seconds_per_call(lambda n: extrapolate(transformed.copy(), transformed, transformed, power, n))

    n_exact, n_all = len(fit.losses), fit.iterations + 1
    parts = {
        "transforms": n_bands * (n_all + n_exact) * pair,
        "adding components": n_bands * n_all * add,
        "gradients": n_bands * n_all * collect,
        "steps": fit.iterations * step,
        "constraints": fit.iterations * project,
        "comparison, products": n_bands * (n_exact * comparison + (n_all - n_exact) * product),
    }
    parts["rest"] = whole - sum(parts.values())
    about = {
        "components": len(packed),
        "component pixels": len(packed.morphologies),
        "iterations": fit.iterations,
        "comparisons": n_exact,
        "milliseconds": 1e3 * whole,
        "transform pair, microseconds": 1e6 * pair,
    }
    return parts, about


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    arena, hsc_fakes = load_scorer(args.shared, "arena"), load_scorer(args.shared, "hsc_fakes")
    cases = {kind: arena_case(*next(iter(arena.scenes(kind)))) for kind in ("field", "pair", "crowded")}
    cases["hsc"] = hsc_case(hsc_fakes, next(p for p in hsc_fakes.paths() if len(hsc_fakes.load(p)["peaks"]) == 4))
    print_header("where the time goes")
    figures: dict[str, Any] = {}
    for kind, case in cases.items():
        result: kermes.Result = case.deblend()
        chi2 = check(case, result, largest_chi2=np.inf)  # cluster stars are hard: the peer reaches thousands
        stages = stage_shares(case, 2 if args.quick else 10)
        whole = sum(stages.values())
        print(
            f"{kind}: {case.coadd.images.shape}, {len(case.peaks)} peaks in {len(result.blends)} blends, "
            f"{1e3 * whole:.1f} ms, {1e3 * whole / len(case.peaks):.2f} per source; reduced chi2 {chi2:.3f}"
        )
        ordered = sorted(stages.items(), key=lambda item: -item[1])
        print("   stages: " + ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in ordered))
        arguments = largest_fit(case)
        parts, about = fit_shares(arguments)
        print(
            f"   largest fit: {arguments[1].images.shape} padded to "
            f"{arguments[2].transforms.shape[1]} x {arguments[2].width}, "
            + ", ".join(f"{value:.4g} {name}" for name, value in about.items())
        )
        whole_fit = sum(parts.values())
        print(
            "   parts of the fit: " + ", ".join(f"{name} {seconds / whole_fit:.0%}" for name, seconds in parts.items())
        )
        figures[kind] = {"stages": stages, "parts": parts, "about": about, "chi2": chi2}
    write(args.json, figures)


if __name__ == "__main__":
    main()
