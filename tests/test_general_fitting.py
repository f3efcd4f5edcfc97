"""The fit in Python takes the steps of the compiled one, and fits what that cannot: other kinds, schemes, your own."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from blends import blend_of, convolution_of, gaussian, observe, source, three_sources
from kermes.config import FitConfig
from kermes.errors import BlendError, ConfigError, InputError, ShapeError
from kermes.fitting import fit_packed
from kermes.general_fitting import adaprox_direction, fit_packed_general, fit_scene
from kermes.geometry import Box
from kermes.rendering import pack, unpack
from kermes.scene import CubeComponent, PointComponent, ProfileComponent, Scene, Source

ADAPROX = ("adam", "nadam", "amsgrad", "padam", "adamx", "radam")
SCHEMES = (*ADAPROX, "fista")


def away_from_truth(scene):
    """Start with other colours, and flatter shapes of the same support."""
    factor = np.array([1.3, 0.8, 1.1], dtype=np.float32)
    return Scene(
        sources=tuple(
            replace(
                one,
                components=tuple(
                    replace(c, spectrum=c.spectrum * factor, morphology=np.sqrt(c.morphology)) for c in one.components
                ),
            )
            for one in scene.sources
        ),
        box=scene.box,
    )


def noisy_blend():
    """Three sources with noise, and a scene to start from."""
    scene = three_sources()
    _, blend = observe(scene, seed=4)
    return away_from_truth(scene), blend


def run(scene, blend, fixed=frozenset(), state=None, **settings):
    return fit_scene(scene, blend, convolution_of(blend), FitConfig(**settings), fixed=fixed, state=state)


def show(scene, sigma=1.0, seed=None):
    """Blend that shows a scene of any kind."""
    box = scene.box
    empty = blend_of(np.zeros((3, *box.shape)), [one.peak for one in scene.sources], sigma)
    image = convolution_of(empty).forward(scene.model(3))
    if seed is not None:
        image = image + np.random.default_rng(seed).normal(size=image.shape) * empty.noise_rms[:, None, None]
    return blend_of(image, empty.peaks, sigma)


def point(y, x, spectrum=(400, 600, 800)):
    return PointComponent(
        spectrum=np.array(spectrum, dtype=np.float32), center=np.array([y, x], dtype=float), sigma=0.8
    )


# ---------------------------------------------------------------- as the compiled fit


@pytest.mark.parametrize(
    "settings",
    [{}, {"symmetric": True}, {"monotonic": False}, {"background_threshold": 2.0, "resize_every": 2}],
    ids=["default", "symmetric", "not monotonic", "small boxes"],
)
def test_losses_agree_with_those_of_the_compiled_fit(settings):
    scene, blend = noisy_blend()
    config = FitConfig(max_iterations=12, exact_every=1, patience=100, **settings)
    packed = pack(scene, 3)
    compiled = fit_packed(packed, blend, convolution_of(blend), config)
    general = fit_packed_general(packed, blend, convolution_of(blend), config)
    # Rounding of float32, made larger where it decides which pixels lie above the background: 3e-5 is seen.
    np.testing.assert_allclose(general.losses, compiled.losses, rtol=3e-4)
    np.testing.assert_array_equal(general.packed.boxes, compiled.packed.boxes)
    np.testing.assert_array_equal(general.packed.sources, compiled.packed.sources)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_it_stops_where_the_compiled_fit_stops(tolerance):
    scene, blend = noisy_blend()
    config = FitConfig(exact_every=1, patience=6, tolerance=tolerance)
    compiled = fit_packed(pack(scene, 3), blend, convolution_of(blend), config)
    general = run(scene, blend, patience=6, tolerance=tolerance)
    assert general.converged
    assert compiled.converged
    # Rounding can move the fall of the loss to the other side of the limit, somewhat earlier or later.
    assert abs(general.iterations - compiled.iterations) <= 3


def test_packed_components_are_fitted_as_their_scene():
    scene, blend = noisy_blend()
    packed = pack(scene, 3)
    fit = fit_packed_general(packed, blend, convolution_of(blend), FitConfig(max_iterations=4))
    expected = run(unpack(packed, blend.peaks, blend.box), blend, max_iterations=4)
    np.testing.assert_array_equal(fit.packed.morphologies, pack(expected.scene, 3).morphologies)
    np.testing.assert_array_equal(fit.losses, expected.losses)


def test_a_blend_may_lie_anywhere_in_the_image():
    scene, blend = noisy_blend()
    box = blend.box.shift(100, -7)
    packed = pack(scene, 3)
    config = FitConfig(max_iterations=4)
    here, there = (
        fit_packed_general(packed, one, convolution_of(one), config) for one in (blend, replace(blend, box=box))
    )
    np.testing.assert_array_equal(there.losses, here.losses)
    np.testing.assert_array_equal(there.packed.boxes, here.packed.boxes)


# ---------------------------------------------------------------- steps


def directions(scheme, gradients):
    memory, out = (np.zeros(2),) * 3, []
    for iteration, gradient in enumerate(gradients, start=1):
        direction, memory = adaprox_direction(scheme, gradient, memory, iteration)
        out.append(direction)
    return np.array(out)


def slow_directions(scheme, gradients):
    """The formulas of the papers as sums over all gradients so far, number by number."""
    gradients, b1, b2, eps = np.asarray(gradients, dtype=float), 0.9, 0.999, 1e-8
    out = np.zeros(gradients.shape)

    def mean(values, beta, t):
        """Weighted mean of the first t values, newest first in weight."""
        weights = beta ** np.arange(t - 1, -1, -1.0)
        return np.sum(weights * values[:t]) / weights.sum()

    for i in range(gradients.shape[1]):
        g = gradients[:, i]
        first, seconds, top = 0.0, [], 0.0
        for t in range(1, len(g) + 1):
            seconds.append((1 - b2) * sum(b2 ** (t - s) * g[s - 1] ** 2 for s in range(1, t + 1)))
            beta = b1 * 0.999 ** (t - 1) if scheme == "adamx" else b1
            first = beta * first + (1 - beta) * g[t - 1]
            root = np.sqrt(mean(g**2, b2, t)) + eps
            if scheme in ("amsgrad", "padam"):
                out[t - 1, i] = first / max(*seconds, eps) ** (0.25 if scheme == "padam" else 0.5)
            elif scheme == "adamx":
                before = b1 * 0.999 ** (t - 2)
                top = seconds[-1] if t == 1 else max(((1 - beta) / (1 - before)) ** 2 * top, seconds[-1])
                out[t - 1, i] = first / np.sqrt(max(top, eps))
            elif scheme == "adam":
                out[t - 1, i] = mean(g, b1, t) / root
            elif scheme == "nadam":
                out[t - 1, i] = (b1 * first / (1 - b1 ** (t + 1)) + (1 - b1) * g[t - 1] / (1 - b1**t)) / root
            else:
                long = 2 / (1 - b2) - 1
                rho = long - 2 * t * b2**t / (1 - b2**t)
                if rho > 4:
                    factor = (rho - 4) / (long - 4) * (rho - 2) / (long - 2) * long / rho
                    out[t - 1, i] = np.sqrt(factor) * mean(g, b1, t) / root
    return out


@pytest.mark.parametrize("scheme", ADAPROX)
def test_directions_agree_with_their_slow_twin(scheme):
    gradients = np.random.default_rng(8).normal(size=(9, 2)) * [1.0, 1e3]
    # Rounding of double: sums of nine terms, differences of one and powers of 0.999.
    np.testing.assert_allclose(directions(scheme, gradients), slow_directions(scheme, gradients), rtol=1e-9)


@pytest.mark.parametrize("scheme", [scheme for scheme in ADAPROX if scheme != "padam"])
def test_directions_do_not_depend_on_the_unit(scheme):
    gradients = np.random.default_rng(8).normal(size=(9, 2))
    # The floor of the moments, 1e-8, against gradients of order 1e2.
    np.testing.assert_allclose(directions(scheme, 1e5 * gradients), directions(scheme, 1e2 * gradients), rtol=1e-6)


def test_radam_rests_until_the_variance_is_known():
    moved = directions("radam", np.ones((6, 2))).any(axis=1)
    assert moved.tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "sgd"}, "fit.scheme must be one of amsgrad, .*, got 'sgd'"),
        ({"scheme": "radam", "patience": 4}, "fit.patience must be > 4 with fit.scheme 'radam'.*, got 4"),
        ({"monotonic_weighting": "cosine"}, "fit.monotonic_weighting must be one of angle, .*, got 'cosine'"),
        ({"min_gradient": 1.0}, "fit.min_gradient must be >= 0 and below 1, got 1.0"),
        ({"symmetry_strength": 1.5}, "fit.symmetry_strength must lie between 0 and 1, got 1.5"),
        ({"symmetry_strength": 0.5, "symmetric": True}, "fit.symmetry_strength must be 0 when fit.symmetric is true"),
    ],
    ids=["scheme", "radam", "weighting", "gradient", "strength", "two symmetries"],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FitConfig(**settings)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_lowers_the_loss(scheme):
    scene, blend = noisy_blend()
    fit = run(scene, blend, scheme=scheme, max_iterations=40, patience=40)
    # radam has hardly begun after forty iterations.
    assert fit.losses.min() < (0.8 if scheme == "radam" else 0.1) * fit.losses[0]


# ---------------------------------------------------------------- what the answer is


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_best_scene_seen_is_returned(scheme):
    scene, blend = noisy_blend()
    fit = run(scene, blend, scheme=scheme, max_iterations=15)
    again = run(fit.scene, blend, max_iterations=0)
    assert again.losses[0] == fit.losses.min()


def test_a_scene_without_noise_is_its_own_fit():
    scene = three_sources()
    _, blend = observe(scene)
    start = run(scene, blend, max_iterations=0)
    # Rounding of float32 in pixels of up to 50, of which there are 2592.
    assert start.losses[0] < 2592 * (50 * 1e-6) ** 2
    assert run(scene, blend, max_iterations=10).scene is scene


@pytest.mark.parametrize("scheme", ["amsgrad", "fista"])
def test_fluxes_of_known_shapes_are_those_of_least_squares(scheme):
    truth = three_sources()
    _, blend = observe(truth, seed=4)
    start = Scene(
        sources=tuple(
            replace(one, components=tuple(replace(c, spectrum=0.7 * c.spectrum) for c in one.components[:1]))
            for one in truth.sources
        ),
        box=truth.box,
    )
    settings = {"scheme": scheme, "max_iterations": 300, "patience": 300, "spectrum_step": 3e-3}
    fit = run(start, blend, fixed={"morphology"}, **settings)
    convolution = convolution_of(blend)
    got = np.array([c.spectrum for c in fit.scene.components])
    planes = []
    for component in start.components:
        alone = Scene(sources=(source(replace(component, spectrum=np.ones(3, dtype=np.float32))),), box=start.box)
        planes.append(convolution.forward(alone.model(3)))
    for b, sigma in enumerate(blend.noise_rms):
        design = np.array([plane[b].ravel() for plane in planes]).T.astype(float)
        expected = np.linalg.lstsq(design, blend.images[b].ravel(), rcond=None)[0]
        errors = sigma * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
        # Converged: to a small part of the error. amsgrad swings about the answer by less than a step of 0.3 %.
        assert (np.abs(got[:, b] - expected) < 0.2 * errors).all()


def test_pixels_without_weight_do_not_matter():
    scene, blend = noisy_blend()
    weights = blend.weights.copy()
    weights[:, 10:14, 8:20] = 0
    broken = blend.images.copy()
    broken[:, 10:14, 8:20] = 1e4
    one, other = (
        run(scene, replace(blend, images=images, weights=weights), max_iterations=6)
        for images in (blend.images, broken)
    )
    np.testing.assert_array_equal(one.losses, other.losses)


@pytest.mark.parametrize("name", ["spectrum", "morphology"])
def test_fixed_parameters_keep_their_values(name):
    scene, blend = noisy_blend()
    fit = run(scene, blend, fixed={name}, max_iterations=8)
    other = {"spectrum": "morphology", "morphology": "spectrum"}[name]
    for before, after in zip(scene.components, fit.scene.components, strict=True):
        np.testing.assert_array_equal(after.parameters[name], before.parameters[name])
        assert not np.array_equal(after.parameters[other], before.parameters[other])


@pytest.mark.parametrize("scheme", ["amsgrad", "adam", "radam", "fista"])
def test_a_fit_goes_on_as_if_it_had_not_been_interrupted(scheme):
    scene, blend = noisy_blend()
    settings = {"scheme": scheme, "resize_every": 2}
    whole = run(scene, blend, max_iterations=10, **settings)
    first = run(scene, blend, max_iterations=5, **settings)
    second = run(first.scene, blend, state=first.state, max_iterations=5, **settings)
    np.testing.assert_array_equal(np.concatenate([first.losses, second.losses[1:]]), whole.losses)
    for got, expected in zip(second.scene.components, whole.scene.components, strict=True):
        np.testing.assert_array_equal(got.spectrum, expected.spectrum)
        np.testing.assert_array_equal(got.morphology, expected.morphology)


def test_a_fit_remembers_how_long_the_loss_has_not_fallen():
    scene, blend = noisy_blend()
    settings = {"patience": 6, "tolerance": 1e-2}
    whole = run(scene, blend, **settings)
    assert whole.converged
    first = run(scene, blend, max_iterations=whole.iterations - 2, **settings)
    second = run(first.scene, blend, state=first.state, **settings)
    assert (first.converged, second.converged, second.iterations) == (False, True, 2)


# ---------------------------------------------------------------- other kinds


@pytest.mark.parametrize("scheme", ["amsgrad", "fista"])
def test_a_point_source_is_found_within_its_pixel(scheme):
    box = Box(0, 0, 32, 27)
    neighbour = source(gaussian(16, 18, 2.0, [30, 40, 50], box.shape))
    truth = Scene(sources=(Source(peak=(12, 11), components=(point(12.3, 10.6),)), neighbour), box=box)
    blend = show(truth)
    start = Scene(sources=(Source(peak=(12, 11), components=(point(12, 11, (300, 300, 300)),)), neighbour), box=box)
    fit = run(start, blend, scheme=scheme, max_iterations=400, patience=400)
    found = fit.scene.sources[0].components[0]
    # Half of what noise would move them by: 8 pi sigma^4 / F^2 added up inversely for the centre, 4 pi sigma^2 for F.
    np.testing.assert_allclose(found.center, [12.3, 10.6], rtol=0, atol=0.007)
    np.testing.assert_allclose(found.spectrum, [400, 600, 800], rtol=0, atol=2.5)


@pytest.mark.parametrize("scheme", ["amsgrad", "fista"])
def test_a_profile_is_found_beside_a_factorized_neighbour(scheme):
    box = Box(0, 0, 32, 27)
    shape = {"shear": np.array([0.2, 0.1]), "sigma": 0.8, "box": Box(-4, -4, 32, 32)}
    galaxy = ProfileComponent(
        spectrum=np.array([900, 1200, 1500], np.float32), center=np.array([12.3, 10.6]), radius=1.8, **shape
    )
    neighbour = source(gaussian(18, 18, 1.5, [30, 40, 50], box.shape))
    blend = show(Scene(sources=(Source(peak=(12, 11), components=(galaxy,)), neighbour), box=box))
    round_one = {"center": np.array([12.0, 11.0]), "radius": 1.2, "shear": np.zeros(2)}
    guess = replace(galaxy, spectrum=np.float32([700, 700, 700]), **round_one)
    start = Scene(sources=(Source(peak=(12, 11), components=(guess,)), neighbour), box=box)
    fit = run(start, blend, scheme=scheme, fixed={"index", "morphology"}, max_iterations=400, patience=400)
    found = fit.scene.sources[0].components[0]
    # Without noise the truth is the only minimum; what is left is rounding of the pixels, and of the gradient.
    np.testing.assert_allclose(found.center, galaxy.center, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.shear, galaxy.shear, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.radius, galaxy.radius, rtol=1e-4)
    np.testing.assert_allclose(found.spectrum, galaxy.spectrum, rtol=1e-4)
    assert found.index == galaxy.index


def test_a_source_of_changing_colour_is_a_cube():
    box = Box(0, 0, 32, 27)
    red, blue = gaussian(14, 12, 2.0, [10, 40, 80], box.shape), gaussian(17, 13, 2.0, [80, 30, 10], box.shape)
    blend = show(Scene(sources=(source(red, blue),), box=box), seed=1)
    cube = CubeComponent(cube=np.full((3, 20, 20), 1, dtype=np.float32), box=Box(6, 3, 20, 20))
    start = Scene(sources=(Source(peak=(15, 12), components=(cube,)),), box=box)
    fit = run(start, blend, max_iterations=200)
    # chi2 of one per pixel: the noise alone, within five of its standard deviations.
    assert fit.losses.min() < 0.5 * (blend.images.size + 5 * np.sqrt(2 * blend.images.size))
    true_flux = red.flux() + blue.flux()
    np.testing.assert_allclose(fit.scene.sources[0].flux(3), true_flux, rtol=0.1)


def test_all_kinds_are_fitted_together():
    box = Box(0, 0, 32, 27)
    galaxy, cube = gaussian(12, 10, 2.0, [60, 90, 120], box.shape), gaussian(24, 20, 1.5, [50, 60, 70], box.shape)
    truth = Scene(
        sources=(source(galaxy), Source(peak=(15, 16), components=(point(15.2, 16.1),)), source(cube)), box=box
    )
    blend = show(truth, seed=2)
    start = Scene(
        sources=(
            source(replace(galaxy, spectrum=galaxy.spectrum * np.float32(0.6))),
            Source(peak=(15, 16), components=(point(15, 16, (200, 200, 200)),)),
            Source(peak=(24, 20), components=(CubeComponent(cube=0.5 * cube.evaluate(), box=cube.box),)),
        ),
        box=box,
    )
    fit = run(start, blend, max_iterations=150)
    # chi2 of one per pixel: the noise alone, within five of its standard deviations.
    assert fit.losses.min() < 0.5 * (blend.images.size + 5 * np.sqrt(2 * blend.images.size))
    assert [type(a) for a in fit.scene.components] == [type(b) for b in start.components]


def test_a_source_without_components_is_kept():
    scene, blend = noisy_blend()
    dark = Source(peak=(3, 3), components=())
    scene = replace(scene, sources=(dark, *scene.sources))
    fit = run(scene, blend, max_iterations=3)
    assert fit.scene.sources[0] is dark or fit.scene.sources[0].components == ()
    assert fit.losses[-1] < fit.losses[0]


# ---------------------------------------------------------------- your own


@dataclass(frozen=True, eq=False)
class Plane:
    """A tilted background: one number, and no more members than are needed."""

    level: float
    box: Box
    lacks: str = ""

    @property
    def parameters(self):
        return {"level": self.level}

    def evaluate(self):
        shape = (2 if self.lacks == "a band" else 3, *self.box.shape)
        return np.full(shape, self.level, dtype=np.float32)

    def gradient(self, image_gradient):
        return {} if self.lacks == "gradient" else {"level": image_gradient.sum(dtype=float)}

    def updated(self, parameters):
        return replace(self, **parameters)

    def projected(self, context):
        return self

    def steps(self, context):
        return {} if self.lacks == "steps" else {"level": 0.1}

    def flux(self):
        return np.full(3, self.level * self.box.area)


def with_plane(scene, **changes):
    plane = Plane(0.0, scene.box.grow(20), **changes)
    return replace(scene, sources=(*scene.sources, Source(peak=(0, 0), components=(plane,))))


def test_a_component_of_your_own_is_fitted_beside_the_others():
    truth = three_sources()
    _, blend = observe(truth, seed=4)
    plane = convolution_of(blend).forward(np.full(blend.images.shape, 1.5))
    fit = run(with_plane(truth), replace(blend, images=blend.images + plane), max_iterations=60, patience=60)
    # The noise of the mean of 2592 pixels is 0.02; the sources are free, and take a few times that.
    assert abs(fit.scene.sources[-1].components[0].level - 1.5) < 0.1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("lacks", "error", "message"),
    [
        ("gradient", InputError, "Plane.gradient must name all parameters, got none for level"),
        ("steps", InputError, "Plane.steps must name all parameters, got none for level"),
        ("a band", ShapeError, r"Plane must evaluate to shape \(bands, height, width\) = \(3, .*, got \(2,"),
    ],
)
def test_a_component_that_does_not_do_its_part_is_named(lacks, error, message):
    scene, blend = noisy_blend()
    with pytest.raises(error, match=message):
        run(with_plane(scene, lacks=lacks), blend)


def test_something_that_is_no_component_is_refused():
    scene, blend = noisy_blend()
    wrong = replace(scene, sources=(Source(peak=(0, 0), components=("Gaussian",)),))
    with pytest.raises(InputError, match="components must have all members of kermes.scene.Component, got a str"):
        run(wrong, blend)


def test_fista_needs_the_curvature_of_every_component():
    scene, blend = noisy_blend()
    with pytest.raises(InputError, match="with scheme 'fista' components must have a method curvature, got a Plane"):
        run(with_plane(scene), blend, scheme="fista")


def test_fixed_parameters_that_nobody_has_are_refused():
    scene, blend = noisy_blend()
    with pytest.raises(InputError, match="fixed must hold names of parameters, morphology, spectrum; got sed"):
        run(scene, blend, fixed={"sed"})


def test_a_scene_of_another_place_is_refused():
    scene, blend = noisy_blend()
    with pytest.raises(InputError, match="scene must cover the pixels of the blend"):
        run(replace(scene, box=scene.box.shift(1, 0)), blend)


def test_a_state_of_another_scene_is_refused():
    scene, blend = noisy_blend()
    state = run(scene, blend, max_iterations=2).state
    with pytest.raises(InputError, match="scene must be the one that was returned together with the state"):
        run(replace(scene), blend, state=state)


def test_a_state_of_another_scheme_is_refused():
    scene, blend = noisy_blend()
    fit = run(scene, blend, max_iterations=2)
    with pytest.raises(InputError, match="config.scheme must be that of the state, 'amsgrad', got 'adam'"):
        run(fit.scene, blend, state=fit.state, scheme="adam")


def test_a_loss_that_is_not_finite_is_a_failure_of_the_blend():
    scene, blend = noisy_blend()
    images = blend.images.copy()
    images[0, 0, 0] = np.nan
    with pytest.raises(BlendError, match="the loss must stay finite, got nan after 0 iterations"):
        run(scene, replace(blend, images=images))
