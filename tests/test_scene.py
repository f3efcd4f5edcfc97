"""Components: their gradients belong to their models, their constraints hold, and scenes add them up."""

from dataclasses import replace

import numpy as np
import pytest

import reference
from kermes import scene as scenes
from kermes.config import FitConfig
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.psf import model_psf
from kermes.scene import (
    Component,
    CubeComponent,
    Curved,
    FactorizedComponent,
    FitContext,
    PointComponent,
    ProfileComponent,
    Resizable,
    Scene,
    Source,
)

PEAK = (13, 24)
NOISE = np.array([1.0, 2.0, 0.5], dtype=np.float32)
BLEND = Box(0, 0, 40, 50)


def context(**settings):
    return FitContext(noise=NOISE, peak=PEAK, box=BLEND, config=FitConfig(**settings))


def factorized(seed=1, free_form=False):
    rng = np.random.default_rng(seed)
    return FactorizedComponent(
        spectrum=rng.uniform(5, 20, 3).astype(np.float32),
        morphology=rng.uniform(0, 1, (7, 9)).astype(np.float32),
        box=Box(10, 20, 7, 9),
        free_form=free_form,
    )


def cube(seed=2):
    rng = np.random.default_rng(seed)
    return CubeComponent(cube=rng.uniform(0, 10, (3, 5, 6)).astype(np.float32), box=Box(10, 20, 5, 6))


def point(y=13.3, x=23.6, sigma=0.8):
    return PointComponent(
        spectrum=np.array([50, 70, 90], dtype=np.float32), center=np.array([y, x], dtype=float), sigma=sigma
    )


def profile(radius=1.8, index=1.6):
    return ProfileComponent(
        spectrum=np.array([50, -70, 90], dtype=np.float32),
        center=np.array([13.3, 23.6]),
        radius=radius,
        shear=np.array([0.3, -0.2]),
        index=index,
        sigma=0.8,
        box=Box(-3, 8, 32, 32),
    )


KINDS = {
    "factorized": factorized(),
    "cube": cube(),
    "point": point(),
    "profile": profile(),
    "profile of a point": profile(radius=0),
}
ROUNDING = 1e-6
"""A few roundings of float32, relative."""


def random_gradient(component, seed=5):
    return np.random.default_rng(seed).normal(size=component.evaluate().shape).astype(np.float32)


def changed(component, name, seed=6):
    """The same component with one parameter changed at random."""
    value = component.parameters[name]
    change = np.random.default_rng(seed).normal(size=value.shape).astype(value.dtype)
    return change, component.updated({name: value + change})


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize("component", KINDS.values(), ids=KINDS)
def test_every_kind_is_a_component(component):
    assert isinstance(component, Component)
    assert isinstance(component, Curved)


@pytest.mark.parametrize("component", KINDS.values(), ids=KINDS)
def test_a_model_covers_the_box_in_all_bands(component):
    assert component.evaluate().shape == (3, *component.box.shape)
    assert component.evaluate().dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("factorized", "spectrum"),
        ("factorized", "morphology"),
        ("cube", "cube"),
        ("point", "spectrum"),
        ("profile", "spectrum"),
    ],
)
def test_gradient_is_the_adjoint_where_the_model_is_linear(kind, name):
    component = KINDS[kind]
    gradient = random_gradient(component)
    change, other = changed(component, name)
    difference = other.evaluate().astype(float) - component.evaluate()
    back = component.gradient(gradient)[name]
    scale = np.linalg.norm(other.evaluate()) * np.linalg.norm(gradient)
    assert abs(np.vdot(difference, gradient) - np.vdot(change, back)) < ROUNDING * scale


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_gradient_of_the_centre_of_a_point_is_that_of_differences(axis):
    component, h = point(), 1e-2
    gradient = random_gradient(component)
    step = h * np.eye(2)[axis]
    after, before = (component.updated({"center": component.center + sign * step}).evaluate() for sign in (1, -1))
    expected = np.vdot(gradient, after.astype(float) - before) / (2 * h)
    # Third derivatives: h^2 / 6 / sigma^3 of the model, whose norm is 0.35 of the flux.
    tolerance = h**2 * np.linalg.norm(gradient) * 0.35 * np.linalg.norm(component.spectrum)
    assert abs(component.gradient(gradient)["center"][axis] - expected) < tolerance


@pytest.mark.parametrize(
    ("name", "h"),
    [("center", (1e-2, 0)), ("center", (0, 1e-2)), ("radius", 1e-2), ("shear", (1e-2, 0)), ("shear", (0, 1e-2))]
    + [("index", 1e-2)],
    ids=["y", "x", "radius", "e1", "e2", "index"],
)
@pytest.mark.parametrize("index", [1.0, 2.5], ids=["exponential", "Sersic"])
def test_gradient_of_the_shape_of_a_profile_is_that_of_differences(name, h, index):
    component, h = replace(profile(), index=index), np.array(h)
    gradient = random_gradient(component)
    value = component.parameters[name]
    after, before = (component.updated({name: value + sign * h}).evaluate().astype(float) for sign in (1, -1))
    expected = np.vdot(gradient, after - before)
    # 2e-3 of the change: derivatives of the table are good to 2e-4, and h^2 to 1e-4 of lengths of one.
    tolerance = 2e-3 * np.linalg.norm(gradient) * np.linalg.norm(after - before)
    assert abs(np.vdot(component.gradient(gradient)[name], 2 * h) - expected) < tolerance


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("factorized", "spectrum"),
        ("factorized", "morphology"),
        ("cube", "cube"),
        ("point", "spectrum"),
        ("profile", "spectrum"),
    ],
)
def test_curvature_bounds_the_second_derivative(kind, name):
    component, weights = KINDS[kind], np.array([1.0, 0.25, 4.0])
    change, other = changed(component, name)
    difference = other.evaluate().astype(float) - component.evaluate()
    second = np.sum(weights[:, None, None] * difference**2)
    bound = np.sum(component.curvature(weights)[name] * change.astype(float) ** 2)
    assert second <= bound * (1 + 1e-5)  # rounding of the model, whose change is a tenth of it


def test_curvature_bounds_the_second_derivative_by_the_centre():
    component, weights, h = point(), np.array([1.0, 0.25, 4.0]), 1e-3
    bound = component.curvature(weights)["center"]
    for axis, step in enumerate(h * np.eye(2)):
        difference = component.updated({"center": component.center + step}).evaluate().astype(float)
        difference -= component.evaluate()
        # h / sigma more for the next order, and as much for rounding.
        assert np.sum(weights[:, None, None] * difference**2) <= bound[axis] * h**2 * 1.01


@pytest.mark.parametrize("component", KINDS.values(), ids=KINDS)
def test_flux_is_the_sum_of_the_model(component):
    total = component.evaluate().sum(axis=(1, 2), dtype=float)
    np.testing.assert_allclose(component.flux(), total, rtol=ROUNDING)


@pytest.mark.parametrize("component", KINDS.values(), ids=KINDS)
def test_methods_do_not_change_the_component(component):
    before = {name: value.copy() for name, value in component.parameters.items()}
    for name in before:
        changed(component, name)
    component.projected(context())
    component.gradient(random_gradient(component))
    for name, value in component.parameters.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("component", KINDS.values(), ids=KINDS)
def test_steps_are_positive_and_fit_the_parameters(component):
    steps = component.steps(context())
    assert set(steps) == set(component.parameters)
    for name, value in component.parameters.items():
        assert (np.broadcast_to(steps[name], value.shape) > 0).all()


@pytest.mark.parametrize("component", [KINDS[kind] for kind in ("factorized", "cube", "point")])
def test_nothing_negative_or_broken_is_left_of_the_light(component):
    name = "cube" if "cube" in component.parameters else "spectrum"
    broken = component.parameters[name].copy()
    broken.flat[:2] = [-1, np.nan]
    light = component.updated({name: broken}).projected(context()).parameters[name]
    assert np.isfinite(light).all()
    assert (light >= 0).all()


# ---------------------------------------------------------------- factorized


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_projection_agrees_with_its_slow_twin(threshold):
    component = factorized()
    got = component.projected(context(background_threshold=threshold))
    expected = reference.project_morphology(
        component.morphology, PEAK[0] - 10, PEAK[1] - 20, component.spectrum, NOISE, threshold
    )
    np.testing.assert_allclose(got.morphology, expected, rtol=0, atol=9 * 4 * 6e-8)  # rounding in nine rings
    np.testing.assert_array_equal(got.spectrum, component.spectrum)


def test_a_free_form_keeps_its_shape():
    component = factorized(free_form=True)
    got = component.projected(context(background_threshold=0))
    np.testing.assert_allclose(got.morphology, component.morphology / component.morphology.max(), rtol=ROUNDING)


def test_settings_can_leave_out_monotonicity():
    component = factorized()
    got = component.projected(context(background_threshold=0, monotonic=False))
    np.testing.assert_allclose(got.morphology, component.morphology / component.morphology.max(), rtol=ROUNDING)


def test_weighting_and_least_gradient_are_followed():
    component = replace(factorized(), morphology=np.ones((7, 9), dtype=np.float32))
    settings = {"monotonic_weighting": "nearest", "min_gradient": 0.5}
    got = component.projected(context(background_threshold=0, **settings))
    np.testing.assert_array_equal(got.morphology[3, 4:], [1, 0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize("settings", [{"symmetric": True}, {"symmetry_strength": 1.0}], ids=["minimum", "soft"])
def test_symmetric_morphologies_equal_their_mirror_images(settings):
    component = factorized()
    got = component.projected(context(background_threshold=0, monotonic=False, **settings)).morphology
    np.testing.assert_array_equal(got, got[::-1, ::-1])


def test_connected_morphologies_lose_their_islands():
    morphology = np.zeros((7, 9), dtype=np.float32)
    morphology[3, 4] = 1
    morphology[0, 0] = 0.5
    got = replace(factorized(), morphology=morphology).projected(context(monotonic=False, connected=True)).morphology
    assert np.flatnonzero(got).tolist() == [3 * 9 + 4]


def test_a_component_without_light_keeps_its_peak():
    dark = replace(factorized(), morphology=np.zeros((7, 9), dtype=np.float32))
    got = dark.projected(context()).morphology
    assert np.flatnonzero(got).tolist() == [3 * 9 + 4]
    assert got.max() == 1


def test_a_peak_outside_the_box_is_no_centre():
    component = replace(factorized(), box=Box(30, 30, 7, 9))
    got = component.projected(context(background_threshold=0))
    np.testing.assert_allclose(got.morphology, component.morphology / component.morphology.max(), rtol=ROUNDING)


def test_a_box_follows_the_light_with_a_margin():
    morphology = np.zeros((7, 9), dtype=np.float32)
    morphology[2:4, 3:8] = 1
    got = replace(factorized(), morphology=morphology).resized(context())
    assert isinstance(got, Resizable)
    assert got.box == Box(12, 23, 2, 5).grow(5)
    np.testing.assert_array_equal(got.morphology[5:-5, 5:-5], 1)
    assert got.morphology.sum() == morphology.sum()


def test_a_box_stays_inside_the_blend():
    got = replace(factorized(), box=Box(0, 41, 7, 9)).resized(context())
    assert got.box == Box.from_bounds(0, 12, 36, 50)


def test_the_box_of_a_component_without_light_lies_around_its_peak():
    dark = replace(factorized(), morphology=np.zeros((7, 9), dtype=np.float32))
    assert dark.resized(context()).box == Box(*PEAK, 1, 1).grow(5)


def test_pixels_keep_their_place_when_they_move_to_another_box():
    values = np.arange(24.0).reshape(2, 3, 4)
    old, new = Box(5, 5, 3, 4), Box(6, 3, 4, 4)
    moved = scenes.move_pixels(values, old, new)
    assert moved.shape == (2, 4, 4)
    np.testing.assert_array_equal(moved[:, :2, 2:], values[:, 1:, :2])
    assert moved.sum() == values[:, 1:, :2].sum()


# ---------------------------------------------------------------- point


def test_a_point_on_a_pixel_is_the_model_psf():
    component = point(y=13, x=24)
    side = component.box.height
    psf = model_psf(0.8, side)
    np.testing.assert_allclose(component.evaluate()[0] / 50, psf, rtol=0, atol=1e-7)  # outside lies 1e-8


def test_shifting_a_point_by_whole_pixels_shifts_its_model():
    one, other = point(), point(y=13.3 + 4, x=23.6 - 9)
    assert other.box == one.box.shift(4, -9)
    np.testing.assert_allclose(other.evaluate(), one.evaluate(), rtol=0, atol=1e-5)  # rounding of float32, times 90


def test_the_light_of_a_point_is_centred_where_it_says():
    component = point()
    y, x = np.mgrid[component.box.y, component.box.x]
    share = component.evaluate()[0].astype(float) / 50
    np.testing.assert_allclose([np.sum(share * y), np.sum(share * x)], component.center, rtol=0, atol=1e-5)


def test_a_point_stays_near_its_peak():
    far = point(y=PEAK[0] + 9, x=PEAK[1] - 9).projected(context())
    np.testing.assert_array_equal(far.center, [PEAK[0] + scenes.CENTER_REACH, PEAK[1] - scenes.CENTER_REACH])


# ---------------------------------------------------------------- sources and scenes


def test_a_source_is_the_sum_of_its_components():
    source = Source(peak=PEAK, components=(factorized(), cube(), point()))
    np.testing.assert_allclose(source.flux(3), source.model(3).sum(axis=(1, 2), dtype=float), rtol=ROUNDING)
    assert source.box == factorized().box | cube().box | point().box


def test_a_scene_is_the_sum_of_its_sources():
    sources = (Source(peak=PEAK, components=(factorized(), cube())), Source(peak=PEAK, components=(point(),)))
    expected = np.zeros((3, *BLEND.shape))
    for source in sources:
        expected[:, source.box.y, source.box.x] += source.model(3)
    # The order of the sums differs.
    np.testing.assert_allclose(Scene(sources=sources, box=BLEND).model(3), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(("y", "x"), [(0.2, 24.0), (39.0, 49.4), (-30.0, 24.0)], ids=["top", "corner", "outside"])
def test_a_scene_shows_the_part_of_a_component_that_lies_inside(y, x):
    component = point(y=y, x=x)
    source = Source(peak=(0, 0), components=(component,))
    wide = Scene(sources=(source,), box=BLEND.grow(40)).model(3)
    model = Scene(sources=(source,), box=BLEND).model(3)
    np.testing.assert_array_equal(model, wide[:, 40:-40, 40:-40])


def test_factorized_components_are_asked_for_by_name():
    components = (factorized(), factorized(3))
    scene = Scene(sources=(Source(peak=PEAK, components=components),), box=BLEND)
    assert scene.factorized == scene.sources[0].factorized == components


def test_other_components_where_factorized_ones_are_needed_are_refused():
    source = Source(peak=PEAK, components=(factorized(), point()))
    with pytest.raises(InputError, match="components must be factorized here, got a PointComponent"):
        _ = Scene(sources=(source,), box=BLEND).factorized


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.5, 4e-4), (0.7, 1e-4), (0.8, 1e-4)])
def test_a_profile_of_no_radius_is_a_point_source(sigma, tolerance):
    one = replace(profile(radius=0), sigma=sigma)
    expected = PointComponent(spectrum=one.spectrum, center=one.center, sigma=sigma)
    cut = one.evaluate()[(slice(None), *expected.box.within(one.box))]
    # Modes that are left out: faint ones, and those of half a pixel and less, which the narrowest PSF has.
    np.testing.assert_allclose(cut, expected.evaluate(), rtol=0, atol=tolerance * abs(expected.evaluate()).max())


def test_the_axes_of_a_profile_follow_from_its_shear():
    one = replace(profile(), shear=np.array([0.0, np.log(2)]))
    assert one.axis_ratio == pytest.approx(0.5)
    assert one.angle == pytest.approx(45)
    y, x = np.mgrid[one.box.y, one.box.x] - one.center[:, None, None]
    assert np.sum(one.evaluate()[0] * y * x) > 0


def test_a_profile_is_long_along_x_for_a_positive_first_shear():
    one = replace(profile(), shear=np.array([0.5, 0.0]))
    y, x = np.mgrid[one.box.y, one.box.x] - one.center[:, None, None]
    assert np.sum(one.evaluate()[0] * x**2) > np.sum(one.evaluate()[0] * y**2)


def test_all_flux_of_a_profile_is_on_its_stamp():
    one = profile(radius=20, index=4)
    # The table is within 2e-5 of the transforms.
    np.testing.assert_allclose(one.evaluate().sum(axis=(1, 2), dtype=float), one.flux(), rtol=2e-5)


def test_the_centre_of_a_profile_survives_another_origin():
    one = replace(profile(), center=np.array([np.pi, np.e]))
    assert ((one.center + 123457) - 123457 == one.center).all()


def test_a_point_source_has_no_shape_to_fit():
    assert set(profile(radius=0).parameters) == {"spectrum", "center"}


def test_a_profile_stays_near_its_peak_and_between_its_limits():
    wild = profile().updated(
        {"radius": -1.0, "index": 9.0, "shear": np.array([3.0, 4.0]), "center": np.array([0.0, 99.0])}
    )
    kept = wild.projected(context())
    assert (kept.radius, kept.index) == (scenes.LEAST_RADIUS, scenes.LARGEST_INDEX)
    np.testing.assert_allclose(kept.shear, np.array([0.6, 0.8]) * scenes.LARGEST_SHEAR)
    np.testing.assert_array_equal(kept.center, [PEAK[0] - scenes.CENTER_REACH, PEAK[1] + scenes.CENTER_REACH])


def test_the_flux_of_a_profile_may_be_negative():
    assert profile().projected(context()).spectrum[1] == -70


@pytest.mark.parametrize("box", [Box(0, 0, 32, 30), Box(0, 0, 31, 31), Box(0, 0, 0, 0)])
def test_a_stamp_that_is_not_square_and_even_is_refused(box):
    with pytest.raises(InputError, match=rf"box must be square with an even side, got {box.height} x {box.width}"):
        replace(profile(), box=box)


@pytest.mark.parametrize("radius", [-1.0, np.nan, np.inf])
def test_an_impossible_radius_is_refused(radius):
    with pytest.raises(InputError, match="radius must be positive, or 0 for a point source, got"):
        replace(profile(), radius=radius)


@pytest.mark.parametrize("index", [0.4, 7.0, np.nan])
def test_an_index_outside_of_the_table_is_refused(index):
    with pytest.raises(InputError, match=r"index must lie between 0\.5 and 6\.5, got"):
        replace(profile(), index=index)
