"""The fit of any mix of components, in Python: slower than `kermes.fitting`, and open to components of your own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.coadd import Blend
from kermes.config import FitConfig
from kermes.errors import BlendError, InputError, ShapeError
from kermes.geometry import Box
from kermes.rendering import Convolution, Packed, pack, unpack
from kermes.scene import Component, Curved, FitContext, Resizable, Scene, move_pixels

if TYPE_CHECKING:
    from kermes.fitting import Fit

DoubleArray = NDArray[np.float64]
Memory = tuple[NDArray[Any], ...]

BETA_1 = 0.9
"""Share of the first moment that is kept from one iteration to the next."""

BETA_2 = 0.999
"""The same for the second moment."""

EPSILON = 1e-8
"""Floor of the second moment, or of its root."""

ADAMX_DECAY = 0.999
"""Factor of BETA_1 from one iteration to the next in the scheme "adamx"; with 1 it would be "amsgrad"."""

PADAM_POWER = 0.25
"""Power of the second moment in the scheme "padam"; with 0.5 it would be "amsgrad"."""

FISTA_RATE = 0.5
"""First step of the scheme "fista", times the inverse of the curvature."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitState:
    """Where a fit stands. It can be given to `fit_scene` again, and holds nothing else of interest."""

    scene: Scene
    """Where the next step starts; not always the best scene."""

    best: Scene
    """The scene with the smallest loss so far."""

    memory: tuple[Mapping[str, Memory], ...]
    """For each component and parameter, what the scheme remembers: moments, or the last values."""

    iteration: int
    """Number of steps taken."""

    losses: tuple[float, ...]
    """Loss before each of them."""

    scheme: str
    """Scheme that they followed."""

    rate: float = FISTA_RATE
    """Length of the steps of the scheme "fista"."""

    momentum: float = 1.0
    """t of the scheme "fista"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneFit:
    """What the fit of one scene ended with."""

    scene: Scene
    """The scene with the smallest loss."""

    losses: DoubleArray
    """Half the sum of weight * (model - image)^2 at the start and after each step, shape (iterations + 1,)."""

    iterations: int
    """Number of steps taken."""

    converged: bool
    """Whether the loss stopped falling before the iterations ran out."""

    state: FitState
    """Continues the fit when it is given to `fit_scene` together with `scene`."""


# ---------------------------------------------------------------- one parameter


def adaprox_direction(
    scheme: str, gradient: NDArray[Any], memory: Memory, iteration: int
) -> tuple[NDArray[Any], Memory]:
    """Work out the direction of one step of AdaProx, to be multiplied by its length.

    Parameters
    ----------
    scheme : {"adam", "nadam", "amsgrad", "padam", "adamx", "radam"}
    gradient : ndarray
        Of any shape.
    memory : tuple of three ndarray
        First and second moment, and the largest second moment so far; zeros at the start.
    iteration : int
        Number of the step, from 1.

    Returns
    -------
    direction : ndarray
        Of order one in all schemes but padam, where it grows like the square root of the gradient.
    memory : tuple of three ndarray
        For the next step.

    Notes
    -----
    AdaProx: Melchior, Joseph and Moolekamp (2019), algorithm 1. adam: Kingma and Ba (2015); nadam: Dozat (2016);
    amsgrad: Reddi, Kale and Kumar (2018); padam: Chen et al. (2018); adamx: Tran and Phong (2019); radam: Liu et al.
    (2019), without steps while the variance is not known, as these would not be of order one. amsgrad, padam and adamx
    have no bias correction.
    """
    first, second, largest = memory
    keep = BETA_1 * ADAMX_DECAY ** (iteration - 1) if scheme == "adamx" else BETA_1
    first = (1 - keep) * gradient + keep * first
    second = (1 - BETA_2) * gradient**2 + BETA_2 * second
    if scheme in ("amsgrad", "padam", "adamx"):
        # The share that was new one iteration earlier is smaller for adamx; at the start nothing was kept.
        ratio = (1 - keep) / (1 - keep / ADAMX_DECAY) if scheme == "adamx" and iteration > 1 else 1.0
        largest = np.maximum(ratio**2 * largest, second)
        direction = first / np.maximum(largest, EPSILON) ** (PADAM_POWER if scheme == "padam" else 0.5)
        return direction, (first, second, largest)
    unbiased = first / (1 - BETA_1**iteration)
    root = np.sqrt(second / (1 - BETA_2**iteration)) + EPSILON
    if scheme == "nadam":
        ahead = BETA_1 * first / (1 - BETA_1 ** (iteration + 1))
        direction = (ahead + (1 - BETA_1) * gradient / (1 - BETA_1**iteration)) / root
    elif scheme == "radam":
        direction = _rectification(iteration) * unbiased / root
    else:
        direction = unbiased / root
    return direction, (first, second, largest)


def _rectification(iteration: int) -> float:
    """Factor of the steps of radam: zero at first, growing to one."""
    limit = 2 / (1 - BETA_2) - 1
    length = limit - 2 * iteration * BETA_2**iteration / (1 - BETA_2**iteration)
    if length <= 4:
        return 0.0
    return float(np.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)))


# ---------------------------------------------------------------- one component


def _free(component: Component, fixed: Collection[str]) -> dict[str, NDArray[Any]]:
    """Parameters that are fitted."""
    return {name: np.asarray(value) for name, value in component.parameters.items() if name not in fixed}


def _kept(component: Component, before: Component, fixed: Collection[str]) -> Component:
    """Give a component the fixed parameters that it had before."""
    held = {name: value for name, value in before.parameters.items() if name in fixed}
    return component.updated(held) if held else component


def _adaprox_step(
    component: Component,
    gradients: Mapping[str, Any],
    memory: Mapping[str, Memory],
    context: FitContext,
    iteration: int,
    fixed: Collection[str],
) -> tuple[Component, dict[str, Memory]]:
    """Take one step of AdaProx; the first is a tenth of the others."""
    steps = component.steps(context)
    scale = 0.1 if iteration == 1 else 1.0
    values, remembered = {}, dict(memory)
    for name, value in _free(component, fixed).items():
        direction, remembered[name] = adaprox_direction(context.config.scheme, gradients[name], memory[name], iteration)
        values[name] = (value - scale * np.asarray(steps[name]) * direction).astype(value.dtype)
    return _kept(component.updated(values).projected(context), component, fixed), remembered


def _fista_step(
    component: Component,
    gradients: Mapping[str, Any],
    memory: Mapping[str, Memory],
    context: FitContext,
    curvature: Mapping[str, ArrayLike],
    rate: float,
    inertia: float,
    fixed: Collection[str],
) -> tuple[Component, dict[str, Memory]]:
    """Take one step of FISTA and go on in the direction of the last one; both ends are projected."""
    values = {}
    for name, value in _free(component, fixed).items():
        bound, gradient = np.asarray(curvature[name]), gradients[name]
        step = np.divide(gradient, bound, out=np.zeros_like(gradient, dtype=np.float64), where=bound > 0)
        values[name] = (value - rate * step).astype(value.dtype)
    stepped = _kept(component.updated(values).projected(context), component, fixed)
    reached = _free(stepped, fixed)
    ahead = {name: (x + inertia * (x - memory[name][0])).astype(x.dtype) for name, x in reached.items()}
    moved = _kept(stepped.updated(ahead).projected(context), component, fixed)
    return moved, {**memory, **{name: (x,) for name, x in reached.items()}}


def _resize(
    component: Component, memory: Mapping[str, Memory], context: FitContext, fixed: Collection[str]
) -> tuple[Component, Mapping[str, Memory]]:
    """Let the box of a component follow its light, and move what is remembered of its pixels; fixed pixels stay."""
    if not isinstance(component, Resizable):
        return component, memory
    old = component.box
    over_pixels = {name for name, value in component.parameters.items() if np.shape(value)[-2:] == old.shape}
    if over_pixels & set(fixed):
        return component, memory
    resized = component.resized(context)
    if resized.box == old:
        return resized, memory
    return resized, {
        name: tuple(move_pixels(part, old, resized.box) for part in parts) if name in over_pixels else parts
        for name, parts in memory.items()
    }


def _first_memory(component: Component, config: FitConfig) -> dict[str, Memory]:
    if config.scheme == "fista":
        return {name: (value,) for name, value in _free(component, ()).items()}
    return {name: (np.zeros_like(value),) * 3 for name, value in _free(component, ()).items()}


# ---------------------------------------------------------------- the scene


def _rebuilt(scene: Scene, components: Sequence[Component]) -> Scene:
    """Put other components into the sources of a scene."""
    remaining = iter(components)
    sources = tuple(
        replace(source, components=tuple(next(remaining) for _ in source.components)) for source in scene.sources
    )
    return replace(scene, sources=sources)


def _cut(image: NDArray[np.float32], box: Box, of: Box) -> NDArray[np.float32]:
    """Cut a box out of an image (B, h, w) over another box; zero outside."""
    return image[(slice(None), *box.within(of))] if (box & of) == box else move_pixels(image, of, box)


def _contexts(scene: Scene, blend: Blend, config: FitConfig) -> tuple[FitContext, ...]:
    """What each component is told."""
    noise = np.nan_to_num(blend.noise_rms, nan=1.0).astype(np.float32)
    return tuple(
        FitContext(noise=noise, peak=source.peak, box=scene.box, config=config)
        for source in scene.sources
        for _ in source.components
    )


def _check(component: Component, context: FitContext, fixed: Collection[str]) -> None:
    """Check at the door what a component of somebody else may have got wrong."""
    kind = type(component).__name__
    if not isinstance(component, Component):
        raise InputError(f"components must have all members of kermes.scene.Component, got a {kind}")
    if context.config.scheme == "fista" and not isinstance(component, Curved):
        raise InputError(f"with scheme 'fista' components must have a method curvature, got a {kind}")
    expected = (len(context.noise), *component.box.shape)
    if (shape := np.shape(component.evaluate())) != expected:
        raise ShapeError(f"{kind} must evaluate to shape (bands, height, width) = {expected}, got {shape}")
    gradient = component.gradient(np.zeros(expected, dtype=np.float32))
    for method, answer in (("gradient", gradient), ("steps", component.steps(context))):
        if missing := sorted(set(_free(component, fixed)) - set(answer)):
            raise InputError(f"{kind}.{method} must name all parameters, got none for {', '.join(missing)}")


def has_converged(losses: Sequence[float], n_pixels: int, config: FitConfig) -> bool:
    """Decide whether the loss has stopped falling.

    Noise alone leaves a loss of half the number of used pixels. The fit has converged when over the last
    `config.patience` iterations, or three times as many while the smallest loss is more than 1.2 times that, the
    smallest loss fell by less than a fraction `config.tolerance` of itself or of what noise leaves, whichever is more;
    not while the loss swings far above the smallest one in that time.

    Parameters
    ----------
    losses : sequence of float
        Loss at the start and after each step.
    n_pixels : int
        Number of used pixels.
    config : FitConfig
    """
    smallest = min(losses)
    wait = config.patience if smallest < 0.6 * n_pixels else 3 * config.patience
    if len(losses) <= wait:
        return False
    enough = config.tolerance * max(0.5 * n_pixels, smallest)
    return min(losses[:-wait]) - smallest < enough and max(losses[-wait:]) - smallest < 5 * enough


def fit_scene(
    scene: Scene,
    blend: Blend,
    convolution: Convolution,
    config: FitConfig,
    *,
    fixed: Collection[str] = frozenset(),
    state: FitState | None = None,
) -> SceneFit:
    """Fit all components of a scene together, of whatever kind they are.

    With factorized components and the scheme "amsgrad" this is the algorithm of `kermes.fitting.fit_packed`, with
    every iteration compared with the pixels.

    Parameters
    ----------
    scene : Scene
        Where to start.
    blend : Blend
        Pixels without weight are left out. Must be finite, in a unit in which the noise is not many orders of
        magnitude from one.
    convolution : Convolution
        From the model frame to the pixels of the blend.
    config : FitConfig
    fixed : collection of str, optional
        Names of parameters that keep their values, in all components that have them.
    state : FitState, optional
        Continue an earlier fit as if it had not been interrupted; `scene` must be the one that it returned.

    Returns
    -------
    fit : SceneFit

    Raises
    ------
    InputError
        If the scene does not fit the blend or the state, a component lacks a member that is needed, or a name in
        `fixed` is unknown.
    ShapeError
        If a component evaluates to a wrong shape.
    BlendError
        If the loss is not finite.

    Notes
    -----
    AdaProx (Melchior, Joseph and Moolekamp 2019) or FISTA (Beck and Teboulle 2009) with all components at once. FISTA
    divides gradients by the curvature, and halves its steps and forgets its momentum each time that the loss rises.
    `has_converged` says when the fit ends. Costs two convolutions per iteration, and each component twice.
    """
    if scene.box != blend.box:
        raise InputError(f"scene must cover the pixels of the blend, {blend.box}, got {scene.box}")
    contexts = _contexts(scene, blend, config)
    for component, context in zip(scene.components, contexts, strict=True):
        _check(component, context, fixed)
    known = {name for component in scene.components for name in component.parameters}
    if unknown := sorted(set(fixed) - known):
        raise InputError(f"fixed must hold names of parameters, {', '.join(sorted(known))}; got {', '.join(unknown)}")
    if state is None:
        memory = tuple(_first_memory(component, config) for component in scene.components)
        state = FitState(scene=scene, best=scene, memory=memory, iteration=0, losses=(), scheme=config.scheme)
    elif scene is not state.best:
        raise InputError("scene must be the one that was returned together with the state, got another one")
    elif config.scheme != state.scheme:
        raise InputError(f"config.scheme must be that of the state, {state.scheme!r}, got {config.scheme!r}")

    first = state.iteration
    n_bands = len(blend.images)
    gain = np.abs(convolution.transforms).max(axis=(1, 2)) * (convolution.transforms.shape[1] * convolution.width)
    largest_weights = blend.weights.max(axis=(1, 2), initial=0.0) * gain.astype(np.float64) ** 2
    n_pixels = int(np.count_nonzero(blend.weights > 0))

    while True:
        residual = convolution.forward(state.scene.model(n_bands)) - blend.images
        weighted = blend.weights * residual
        loss = 0.5 * float(np.sum(weighted * residual, dtype=np.float64))
        if not np.isfinite(loss):
            raise BlendError(f"the loss must stay finite, got {loss} after {state.iteration} iterations")
        previous = state.losses
        state = replace(state, losses=(*previous, loss))
        if not previous or loss < min(previous):
            state = replace(state, best=state.scene)
        converged = has_converged(state.losses, n_pixels, config)
        if converged or state.iteration == first + config.max_iterations:
            break
        if config.scheme == "fista" and previous and loss > previous[-1]:
            state = replace(state, rate=0.5 * state.rate, momentum=1.0)
        state = _step(state, convolution.adjoint(weighted), contexts, largest_weights, fixed)

    iterations = state.iteration - first
    return SceneFit(
        scene=state.best,
        losses=np.array(state.losses[first:]),
        iterations=iterations,
        converged=converged,
        state=replace(state, losses=state.losses[:-1]),
    )


def _step(
    state: FitState,
    image_gradient: NDArray[np.float32],
    contexts: Sequence[FitContext],
    weights: DoubleArray,
    fixed: Collection[str],
) -> FitState:
    """Take one step of all components, from the same gradient."""
    next_momentum = 0.5 * (1 + np.sqrt(1 + 4 * state.momentum**2))
    inertia = (state.momentum - 1) / next_momentum
    components, memories = [], []
    for component, memory, context in zip(state.scene.components, state.memory, contexts, strict=True):
        config = context.config
        gradients = component.gradient(_cut(image_gradient, component.box, state.scene.box))
        moved: Component
        remembered: Mapping[str, Memory]
        if isinstance(component, Curved) and config.scheme == "fista":
            curvature = component.curvature(weights)
            moved, remembered = _fista_step(
                component, gradients, memory, context, curvature, state.rate, inertia, fixed
            )
        else:
            moved, remembered = _adaprox_step(component, gradients, memory, context, state.iteration + 1, fixed)
        every = config.resize_every
        if every > 0 and state.iteration > 0 and state.iteration % every == 0:
            moved, remembered = _resize(moved, remembered, context, fixed)
        components.append(moved)
        memories.append(remembered)
    return replace(
        state,
        scene=_rebuilt(state.scene, components),
        memory=tuple(memories),
        iteration=state.iteration + 1,
        momentum=float(next_momentum),
    )


def fit_packed_general(packed: Packed, blend: Blend, convolution: Convolution, config: FitConfig) -> Fit:
    """Fit packed components with settings that the compiled fit does not know.

    Parameters, returns and errors are those of `kermes.fitting.fit_packed`; all iterations are compared with the
    pixels, whatever `config.exact_every`.
    """
    from kermes.fitting import Fit

    start = replace(packed, spectra=np.maximum(packed.spectra, np.float32(1e-20)))
    fit = fit_scene(unpack(start, blend.peaks, blend.box), blend, convolution, config)
    return Fit(
        packed=pack(fit.scene, len(blend.images)),
        losses=fit.losses,
        iterations=fit.iterations,
        converged=fit.converged,
    )
