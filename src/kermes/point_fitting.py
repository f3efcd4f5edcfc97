"""Crowded fields: many point sources with free centers and one flux per band, solved jointly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter, spline_filter, uniform_filter
from scipy.spatial import cKDTree

from kermes.errors import ConfigError, InputError, ShapeError
from kermes.kernels.groups import join_pairs
from kermes.kernels.points import (
    add_points,
    autocorrelations,
    companion_significance,
    core_sums,
    marginal_covariances,
    own_blocks,
    pair_tables,
    point_sums,
    solve_normal,
    subtract_from,
)

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_PAD = 6  # pixels of zeros around a stamp before it becomes a spline: as far as its taps and its ringing matter
_MAX_PAIR_RADIUS = 24  # pixels
_LARGEST_SHIFT = 0.6  # pixels: how far a center may go in one step
_TO_NEAREST = 0.35  # nor farther than this share of the distance to its neighbour
_GROUP_LINK = 5.0  # pixels: nearer sources are solved exactly in the preconditioner
_GROUP_SIZE = 6
_NEAR = 3.0  # pixels: a companion within this is tried with its host free
_ALONE = 4.0  # pixels: of two sources within this, one at a time is taken away
_PRUNINGS = 6  # how often, at the end, sources are taken away
_CORE = 8  # pixels: half side of the square in which residuals tell how well a source fits
_TOUCHED = 12.0  # pixels: light that changes farther away hardly changes the gradient of a source
_FIRST_FRACTION = 0.3  # of the model's signal-to-noise, in the first round
_EASIER = 0.3  # by how much the fraction falls from round to round


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSettings:
    """How point sources of a crowded field are fitted."""

    center_prior: float = 0.3
    """Width of the Gaussian prior of a center about its peak [pixels]; 0: none. Rounding to pixels alone makes 0.29."""

    center_box: float = 1.0
    """No center moves farther than this from its peak, along either axis [pixels]."""

    reach_noise: float = 0.05
    """A source reaches as far as it is brighter than this, in units of the noise of a pixel."""

    psf_error: float = 0.0
    """Error of a pixel that comes from the model, as a share of the model there; for PSFs that are not well known."""

    wing_radius: int = 0
    """Radius [pixels] out to which the PSF is continued by a power law, beyond its stamp; 0: it is not."""

    pair_cut: float = 0.003
    """Sources are coupled in a step while the autocorrelation of the PSF exceeds this share of its maximum."""

    rounds: int = 5
    """How often residuals are searched for more sources; 0: never."""

    significance: float = 6.0
    """Least significance of a source that is added [sigma]."""

    model_fraction: float = 0.01
    """What its significance must exceed in addition, as a share of the model's signal-to-noise there."""

    min_distance: float = 0.7
    """No source is added nearer than this to another [pixels]."""

    added_prior: float = 0.7
    """As `center_prior`, for sources that are added."""

    added_box: float = 1.5
    """As `center_box`, for sources that are added."""

    max_iterations: int = 10
    """Most steps of the last fit; those between rounds take `round_iterations`."""

    round_iterations: int = 2
    """Most steps in one round."""

    tolerance: float = 0.01
    """Converged when the next step promises to lower chi2 by less than this per source, and by less than 1 anywhere."""

    neighbours: int = 10
    """Nearest sources that are free when the errors of a source are computed."""

    def __post_init__(self) -> None:
        for name in ("center_prior", "psf_error", "model_fraction", "added_prior", "min_distance"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("center_box", "added_box", "reach_noise", "pair_cut", "significance", "tolerance"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name, least in {
            "wing_radius": 0,
            "rounds": 0,
            "max_iterations": 1,
            "round_iterations": 1,
            "neighbours": 0,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointFit:
    """Fitted point sources; rows of the first arrays are those of the peaks."""

    centers: DoubleArray
    """Centers (S, 2), (y, x) [pixels]."""

    flux: DoubleArray
    """Total flux (S, B) [image unit], of either sign; 0 where a source has no usable pixel."""

    flux_err: DoubleArray
    """Errors (S, B), with centers and neighbours free and the local misfit included; NaN without a usable pixel."""

    center_err: DoubleArray
    """Errors of the centers (S, 2) [pixels], likewise; the prior is part of what is known."""

    correlation: DoubleArray
    """Correlation (S, B) of the flux with that of the neighbour where it is largest; 0 alone, NaN without a pixel."""

    neighbor: IntArray
    """Row of that neighbour (S, B); -1: none, or one that was added."""

    chi2: DoubleArray
    """Mean of the squared residuals [sigma] in the core of each source (S,), weighted by the square of the PSF."""

    broadening: DoubleArray
    """How much wider than the PSF each source looks (S,): second moment per axis that is missing [pixels^2]."""

    broadening_err: DoubleArray
    """Formal errors of `broadening` (S,): a ratio above about 5 says that a point does not suffice."""

    added_centers: DoubleArray
    """Centers (A, 2) of the sources that were added, the most significant first."""

    added_flux: DoubleArray
    """Their fluxes (A, B)."""

    added_significance: DoubleArray
    """How much worse the fit is without them (A,) [sigma], neighbours and centers following."""

    iterations: int
    """Number of times that the model was compared with the pixels."""

    converged: bool
    """Whether the last fit converged."""

    loss: float
    """Half of chi2, with the priors of the centers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Psf:
    """What is computed once for the PSFs of all bands."""

    stamps: DoubleArray  # (B, P, Q)
    splines: FloatArray  # (B, n, 2, m), see kernels/points.py
    tables: DoubleArray  # (B, n, n), splines of the autocorrelation
    own: DoubleArray  # (B, 6), autocorrelation at zero
    outside: DoubleArray  # (B, R), largest value at a distance of r pixels or more
    slopes: DoubleArray  # (B, P, Q), square of the gradient
    laplacian: DoubleArray  # (B,), sum of the square of the part of the Laplacian that is orthogonal to the PSF
    pair_radius: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Data:
    """What is fitted, and what a source at each pixel would see; all (B, H, W).

    `coverage` is the mean weight for its flux, `steepness` the root of that for its center, in units of the former.
    """

    images: FloatArray
    weights: FloatArray
    coverage: DoubleArray
    steepness: DoubleArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Points:
    """Sources; those that are not listed were added."""

    base: IntArray  # (S, 2)
    home: DoubleArray  # (S, 2), middle of the prior and the box
    listed: BoolArray  # (S,)
    centers: DoubleArray  # (S, 2)
    flux: DoubleArray  # (S, B)
    amplitude: DoubleArray  # (S, B), root of the weight they see
    steepness: DoubleArray  # (S, B), of `_Data`
    reach: IntArray  # (S, B)
    prior: DoubleArray  # (S, 1), inverse variance of the prior


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """Sources with the model and the weighted residuals (B, H, W) that belong to them."""

    points: _Points
    model: FloatArray
    residuals: FloatArray
    loss: float


def _knots(stamps: DoubleArray) -> DoubleArray:
    """Spline coefficients (B, n, m) of stamps with odd sides, two knots per pixel, centred at [n // 2, m // 2].

    Values between pixels are those of the Fourier series, so that the spline adds an error of 1e-4 of the peak at most
    where the PSF is sampled.
    """
    padded = np.pad(stamps, ((0, 0), (_PAD, _PAD), (_PAD, _PAD)))
    n_bands, n, m = padded.shape
    half = n // 2
    narrow = scipy.fft.rfft2(padded)
    transform = np.zeros((n_bands, 2 * n, m + 1), dtype=complex)
    transform[:, : half + 1, : m // 2 + 1] = narrow[:, : half + 1]
    transform[:, -half:, : m // 2 + 1] = narrow[:, -half:]
    # The middle pixel comes to lie at 2 (n // 2) = n - 1.
    dense = np.roll(4 * scipy.fft.irfft2(transform, s=(2 * n, 2 * m)), (1, 1), axis=(1, 2))
    return np.stack([spline_filter(stamp, order=5, mode="mirror") for stamp in dense])


def _with_wings(stamps: DoubleArray, radius: int) -> DoubleArray:
    """Continue PSFs (B, P, Q) by power laws fitted between 0.6 and 1 of the radius of the stamp; each sums to one."""
    n_bands, p, q = stamps.shape
    edge = min(p, q) // 2
    if radius <= edge:
        return stamps
    grown = np.pad(stamps, ((0, 0), (radius - p // 2,) * 2, (radius - q // 2,) * 2))
    offsets = np.arange(-radius, radius + 1)
    distance = np.hypot(offsets[:, None], offsets)
    rings = np.arange(int(0.6 * edge), edge + 1)
    for b in range(n_bands):
        means = np.array([grown[b][np.abs(distance - r) <= 0.5].mean() for r in rings])
        if not (means > 0).all():
            continue
        slope, level = np.polyfit(np.log(rings), np.log(means), 1)
        beyond = (distance > edge) & (distance <= radius)
        # No steeper than what lies inside, and falling faster than r^-2, so that the light stays finite.
        grown[b][beyond] = np.exp(level) * distance[beyond] ** min(slope, -2.5)
        grown[b] /= grown[b].sum()
    return grown


def _prepare_psf(stamps: DoubleArray, settings: PointSettings) -> _Psf:
    n_bands, p, q = stamps.shape
    shape = [scipy.fft.next_fast_len(2 * n, real=True) for n in (p, q)]
    power = np.abs(scipy.fft.rfft2(stamps, s=shape)) ** 2
    lags_y, lags_x = min(p - 1, _MAX_PAIR_RADIUS), min(q - 1, _MAX_PAIR_RADIUS)
    lags = np.roll(scipy.fft.irfft2(power, s=shape), (lags_y, lags_x), axis=(1, 2))
    tables = _knots(lags[:, : 2 * lags_y + 1, : 2 * lags_x + 1])

    taps_y, taps_x, out = np.empty((3, 6)), np.empty((3, 6)), np.zeros((n_bands, 6))
    autocorrelations(tables, 0.0, 0.0, taps_y, taps_x, out)
    own = out.copy()
    pair_radius = 1.0
    while pair_radius < min(lags_y, lags_x) - 1:
        autocorrelations(tables, 0.0, pair_radius, taps_y, taps_x, out)
        along_x = out[:, 0].copy()
        autocorrelations(tables, pair_radius, 0.0, taps_y, taps_x, out)
        if (np.maximum(along_x, out[:, 0]) <= settings.pair_cut * own[:, 0]).all():
            break
        pair_radius += 0.25

    k_square = (2 * np.pi * scipy.fft.fftfreq(shape[0]))[:, None] ** 2 + (2 * np.pi * scipy.fft.rfftfreq(shape[1])) ** 2
    fourth = scipy.fft.irfft2(power * k_square**2, s=shape)[:, 0, 0]
    second = own[:, 3] + own[:, 5]
    usable = own[:, 0] > 0
    shared = np.divide(second**2, own[:, 0], out=np.zeros(n_bands), where=usable)

    y, x = np.indices((p, q))
    distance = np.maximum(np.abs(y - p // 2), np.abs(x - q // 2))
    radii = range(max(p, q) // 2 + 2)
    knots = _knots(stamps)
    return _Psf(
        stamps=stamps,
        splines=np.ascontiguousarray(knots.reshape(n_bands, knots.shape[1], -1, 2).swapaxes(2, 3), dtype=np.float32),
        tables=tables,
        own=own,
        outside=np.stack([np.abs(stamps * (distance >= r)).max(axis=(1, 2)) for r in radii], axis=1),
        slopes=np.gradient(stamps, axis=1) ** 2 + np.gradient(stamps, axis=2) ** 2,
        laplacian=fourth - shared,
        pair_radius=pair_radius,
    )


def _correlate(planes: NDArray[np.floating], stamps: NDArray[np.floating]) -> NDArray[np.floating]:
    """Correlate planes (B, H, W) with stamps (B, P, Q) of odd sides; zero beyond the edge."""
    _, h, w = planes.shape
    _, p, q = stamps.shape
    shape = [scipy.fft.next_fast_len(n + k // 2, real=True) for n, k in ((h, p), (w, q))]
    shape = [max(n, k) for n, k in zip(shape, (p, q), strict=True)]
    product = scipy.fft.rfft2(planes, s=shape) * np.conj(scipy.fft.rfft2(stamps.astype(planes.dtype), s=shape))
    full = scipy.fft.irfft2(product, s=shape)
    return np.ascontiguousarray(np.roll(full, (p // 2, q // 2), axis=(1, 2))[:, :h, :w])


def _prepare_data(images: FloatArray, weights: FloatArray, psf: _Psf) -> _Data:
    exact = weights.astype(np.float64)

    def mean_weight(squares: DoubleArray) -> DoubleArray:
        total = squares.sum(axis=(1, 2))[:, None, None]
        seen = _correlate(exact, squares)
        mean = np.divide(seen, total, out=np.zeros_like(seen), where=total > 0)
        # Below this only the rounding of the transforms is left.
        mean[mean < 1e-9 * weights.max(axis=(1, 2), initial=0.0, keepdims=True)] = 0.0
        return np.asarray(mean)

    coverage = mean_weight(psf.stamps**2)
    ratio = np.divide(mean_weight(psf.slopes), coverage, out=np.zeros_like(coverage), where=coverage > 0)
    return _Data(images=images, weights=weights, coverage=coverage, steepness=np.sqrt(ratio))


def _prior(listed: BoolArray, settings: PointSettings) -> DoubleArray:
    sigma = np.where(listed, settings.center_prior, settings.added_prior)
    # Sources without light would have no center without a prior.
    return np.asarray(np.divide(1.0, sigma**2, out=np.full(len(sigma), 1e-6), where=sigma > 0)[:, None])


def _seen(points: _Points, data: _Data, psf: _Psf, settings: PointSettings) -> _Points:
    """Update what the sources see: weights, and how far they reach."""
    amplitude = np.sqrt(data.coverage[:, points.base[:, 0], points.base[:, 1]].T)
    error = np.divide(1.0, np.sqrt(psf.own[:, 0]), out=np.zeros(len(psf.own)), where=psf.own[:, 0] > 0)
    level = np.maximum(np.abs(points.flux) * amplitude, 3.0 * error)
    reach = (level[:, :, None] * psf.outside > settings.reach_noise).sum(axis=2) + 1
    reach = np.where(amplitude > 0, np.maximum(reach, 4), -1)
    steepness = np.ascontiguousarray(data.steepness[:, points.base[:, 0], points.base[:, 1]].T)
    return replace(points, amplitude=amplitude, steepness=steepness, reach=reach.astype(np.int64))


def _select(points: _Points, keep: BoolArray) -> _Points:
    return _Points(**{name: getattr(points, name)[keep] for name in _Points.__slots__})


def _insert(points: _Points, pixels: IntArray, settings: PointSettings) -> _Points:
    n, n_bands = len(pixels), points.flux.shape[1]
    new = _Points(
        base=pixels,
        home=pixels.astype(np.float64),
        listed=np.zeros(n, dtype=bool),
        centers=pixels.astype(np.float64),
        flux=np.zeros((n, n_bands)),
        amplitude=np.zeros((n, n_bands)),
        steepness=np.zeros((n, n_bands)),
        reach=np.zeros((n, n_bands), dtype=np.int64),
        prior=_prior(np.zeros(n, dtype=bool), settings),
    )
    return _Points(**{name: np.concatenate([getattr(points, name), getattr(new, name)]) for name in _Points.__slots__})


def _compare(points: _Points, model: FloatArray, data: _Data) -> _State:
    """Compare a model with the pixels."""
    residuals = model.copy()
    loss = subtract_from(residuals, data.images, data.weights)
    loss += 0.5 * float((points.prior * (points.centers - points.home) ** 2).sum())
    return _State(points=points, model=model, residuals=residuals, loss=loss)


def _render(points: _Points, data: _Data, psf: _Psf) -> _State:
    model = np.zeros_like(data.images)
    everything = np.arange(len(points.base))
    add_points(model, psf.splines, points.base, points.reach, points.centers, points.flux, everything)
    return _compare(points, model, data)


def _moved(state: _State, points: _Points, chosen: IntArray, data: _Data, psf: _Psf) -> _State:
    """Exchange the chosen sources of a state by those of `points`."""
    if 2 * len(chosen) > len(points.base):
        return _render(points, data, psf)
    old, model = state.points, state.model.copy()
    add_points(model, psf.splines, old.base, old.reach, old.centers, -old.flux, chosen)
    add_points(model, psf.splines, points.base, points.reach, points.centers, points.flux, chosen)
    return _compare(points, model, data)


def _nearest(centers: DoubleArray) -> DoubleArray:
    """Distance (S,) of each source to its nearest neighbour; infinite for a lone one."""
    return np.asarray(cKDTree(centers).query(centers, 2)[0])[:, 1]


def close_pairs(positions: DoubleArray, distance: float) -> IntArray:
    """Pairs (n, 2) of positions (S, 2) that are not farther apart, the smaller number first, ascending."""
    pairs = cKDTree(positions).query_pairs(distance, output_type="ndarray").astype(np.int64)
    pairs.sort(axis=1)
    return np.ascontiguousarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def _tables(points: _Points, pairs: IntArray, psf: _Psf) -> DoubleArray:
    """Tables (n, B, 6) of pairs, see kernels/points.py."""
    return np.asarray(pair_tables(psf.tables, points.centers, pairs, points.amplitude))


def _groups(points: _Points, pairs: IntArray) -> tuple[IntArray, IntArray]:
    """Groups of near neighbours that precondition the normal equations."""
    square = ((points.centers[pairs[:, 0]] - points.centers[pairs[:, 1]]) ** 2).sum(axis=1)
    near = np.flatnonzero(square < _GROUP_LINK**2)
    order = near[np.argsort(square[near], kind="stable")]
    members, starts = join_pairs(pairs, order, len(points.base), _GROUP_SIZE)
    return members, starts


def _gradient(sums: DoubleArray, points: _Points) -> DoubleArray:
    """Derivatives (S, B + 2) of minus the loss, from `point_sums`."""
    of_center = -np.einsum("sb,sbi->si", points.flux, sums[:, :, 1:])
    return np.concatenate([sums[:, :, 0], of_center - points.prior * (points.centers - points.home)], axis=1)


def _blocks(points: _Points, psf: _Psf) -> tuple[DoubleArray, DoubleArray]:
    ridge = np.repeat(points.prior, 2, axis=1)
    of_flux, of_center = own_blocks(psf.own, points.amplitude, points.flux * points.steepness, ridge)
    return of_flux, of_center


def _solve_fluxes(state: _State, data: _Data, psf: _Psf, chosen: IntArray, pairs: IntArray) -> _State:
    """Solve for the fluxes of the chosen sources at fixed centers, in one step; the loss never rises."""
    points = state.points
    n_bands = points.flux.shape[1]
    sums = np.zeros((*points.flux.shape, 3))
    point_sums(state.residuals, psf.splines, points.base, points.reach, points.centers, chosen, False, sums)
    gradient = np.zeros((len(points.base), n_bands + 2))
    gradient[:, :n_bands] = sums[:, :, 0]
    inside = np.zeros(len(points.base), dtype=bool)
    inside[chosen] = True
    pairs = pairs[inside[pairs].all(axis=1)]
    tables = _tables(points, pairs, psf)
    nothing = np.zeros_like(points.flux)
    of_flux, of_center = own_blocks(psf.own, points.amplitude, nothing, np.ones((len(points.base), 2)))
    step, _ = solve_normal(
        gradient, pairs, tables, nothing, of_flux * (1 + 1e-5), of_center, *_groups(points, pairs), 0.02, 60
    )
    solved = _moved(state, replace(points, flux=points.flux + step[:, :n_bands]), chosen, data, psf)
    # Many sources in one place can make a step wild: they wait until their centers have moved.
    return solved if solved.loss <= state.loss else state


def _local_loss(state: _State, data: _Data) -> DoubleArray:
    """Twice the loss in 7 x 7 pixels around each source (S,)."""
    y, x = state.points.base.T
    return np.asarray(_square_sum(state.residuals, data)[y, x])


def _square_sum(residuals: FloatArray, data: _Data) -> DoubleArray:
    """chi2 in the 7 x 7 pixels around each pixel, (H, W)."""
    square = np.divide(residuals**2, data.weights, out=np.zeros_like(residuals), where=data.weights > 0)
    return np.asarray(49.0 * uniform_filter(square.sum(axis=0, dtype=np.float64), 7, mode="constant"))


def _fit(state: _State, data: _Data, psf: _Psf, settings: PointSettings, n_steps: int) -> tuple[_State, int, bool]:
    """Gauss-Newton steps in all fluxes and centers; returns the best state, comparisons made, and convergence.

    Each source is damped for itself (Levenberg-Marquardt): more after a step that left its surroundings worse.
    """
    n_bands = data.images.shape[0]
    n_sources = len(state.points.base)
    damping = np.full((n_sources, 1), 1e-2)
    local = _local_loss(state, data)
    sums = np.zeros((n_sources, n_bands, 3))
    stale = np.arange(n_sources)
    fresh = True
    pairs = close_pairs(state.points.centers, psf.pair_radius)
    most = np.empty((n_sources, 1))
    comparisons = 0
    converged = False
    for _ in range(n_steps):
        points = state.points
        if fresh:
            point_sums(state.residuals, psf.splines, points.base, points.reach, points.centers, stale, True, sums)
            gradient = _gradient(sums, points)
            tables = _tables(points, pairs, psf)
            groups = _groups(points, pairs)
            most = np.clip(_TO_NEAREST * _nearest(points.centers)[:, None], 0.1, _LARGEST_SHIFT)
            away = points.centers - points.home
            box = np.where(points.listed, settings.center_box, settings.added_box)[:, None]
            at_edge = (np.abs(away) >= box) & (away * gradient[:, n_bands:] > 0)
            gradient[:, n_bands:][at_edge] = 0.0
            of_flux, of_center = _blocks(points, psf)
            of_center[:, [0, 2]] += np.where(at_edge, 1e6 * of_center[:, [0, 2]], 0.0)
        damped = of_center.copy()
        damped[:, [0, 2]] *= 1.0 + damping
        step, _ = solve_normal(
            gradient,
            pairs,
            tables,
            points.flux * points.steepness,
            of_flux * (1.0 + damping),
            damped,
            *groups,
            0.05,
            40,
        )
        gain = np.abs((gradient * step).sum(axis=1))
        y, x = step[:, n_bands:].T
        size = (of_flux * step[:, :n_bands] ** 2).sum(axis=1)
        size += of_center[:, 0] * y**2 + 2.0 * of_center[:, 1] * y * x + of_center[:, 2] * x**2
        if gain.sum() <= settings.tolerance * n_sources and gain.max(initial=0.0) < 1.0:
            if len(stale) == n_sources:
                converged = True
                break
            # What was left alone is looked at once more.
            state = _render(points, data, psf)
            comparisons += 1
            stale, fresh = np.arange(n_sources), True
            continue
        chosen = np.flatnonzero(size > 0.1 * settings.tolerance)
        shift = np.zeros_like(points.centers)
        shift[chosen] = np.clip(step[chosen, n_bands:], -most[chosen], most[chosen])
        shift[at_edge] = 0.0
        change = np.zeros_like(points.flux)
        change[chosen] = step[chosen, :n_bands]
        centers = np.clip(points.centers + shift, points.home - box, points.home + box)
        trial = _moved(state, replace(points, centers=centers, flux=points.flux + change), chosen, data, psf)
        comparisons += 1
        cut = (np.abs(centers - points.centers - step[:, n_bands:]) > 0.02).any(axis=1)
        if size[chosen][cut[chosen]].max(initial=0.0) > 10.0 or gain.max() > 1000.0:
            trial = _solve_fluxes(trial, data, psf, np.flatnonzero(size > 0.1), pairs)
            comparisons += 1
        now = _local_loss(trial, data)
        worse = now > local + 1.0 + 0.003 * local
        damping = np.where(worse[:, None], np.minimum(10.0 * damping, 1e2), np.maximum(0.1 * damping, 1e-4))
        fresh = trial.loss <= state.loss
        if fresh:
            state, local = trial, now
            stale = _close_to(points.centers[chosen], points)
        else:
            most = 0.5 * most
    return state, comparisons, converged


def _model_flux(state: _State, psf: _Psf) -> DoubleArray:
    """Flux of a source that is as bright in its middle as the model is in each pixel, (B, H, W)."""
    peak = psf.outside[:, :1, None]
    return np.divide(state.model, peak, out=np.zeros(state.model.shape), where=peak > 0)


def _candidates(
    state: _State, data: _Data, psf: _Psf, settings: PointSettings, fraction: float, tried: BoolArray
) -> IntArray:
    """Find pixels (n, 2) where a source is missing, the most significant first."""
    points = state.points
    _, h, w = data.images.shape
    matched = _correlate(state.residuals, psf.stamps)
    normal = data.coverage * psf.own[:, 0, None, None]
    usable = normal > 0
    chi2 = np.divide(np.maximum(matched, 0.0) ** 2, normal, out=np.zeros_like(normal), where=usable).sum(axis=0)
    flux = _model_flux(state, psf)
    threshold = (settings.significance + fraction * np.sqrt((flux**2 * normal).sum(axis=0))) ** 2

    tree = cKDTree(points.centers)
    far = np.argwhere((chi2 >= threshold) & (chi2 == maximum_filter(chi2, 3)) & ~tried)
    if len(far):
        far = far[tree.query(far)[0] > _NEAR]

    steps = np.arange(-3, 4)
    around = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    near = np.unique((points.base[:, None] + around).reshape(-1, 2), axis=0)
    near = near[((near >= 0) & (near < (h, w))).all(axis=1)]
    distance, host = (np.asarray(found) for found in tree.query(near))
    close = (distance <= _NEAR) & (distance >= settings.min_distance)
    near, host = near[close], host[close]
    of_center = _blocks(points, psf)[1]
    value = companion_significance(
        near,
        host,
        matched,
        psf.tables,
        psf.own,
        points.centers,
        points.flux * points.steepness,
        points.amplitude,
        of_center,
    )
    # No source can explain more than there is.
    value = np.minimum(value, _square_sum(state.residuals, data)[near[:, 0], near[:, 1]])
    good = (value >= threshold[near[:, 0], near[:, 1]]) & ~tried[near[:, 0], near[:, 1]]
    near, host, value = near[good], host[good], value[good]
    # One companion of a source at a time.
    ranking = np.lexsort((near[:, 1], near[:, 0], -value, host))
    best = ranking[np.unique(host[ranking], return_index=True)[1]]
    near, value = near[best], value[best]

    pixels = np.concatenate([far, near]).astype(np.int64)
    value = np.concatenate([chi2[far[:, 0], far[:, 1]], value])
    order = np.lexsort((pixels[:, 1], pixels[:, 0], -value))
    chosen: list[int] = []
    for i in order:
        square = ((pixels[chosen] - pixels[i]) ** 2).sum(axis=1)
        # What is faint beside another may be its residual.
        if ((square > 25) & ((square > 150) | (value[i] > 0.01 * value[chosen]))).all():
            chosen.append(i)
    return pixels[chosen]


class _Covariances(NamedTuple):
    """Covariances of chosen sources, neighbours free."""

    own: DoubleArray
    """Of their fluxes and positions, shape (N, B + 2, B + 2)."""

    cross: DoubleArray
    """Of their fluxes with those of neighbours, shape (N, K, B)."""

    neighbors: IntArray
    """These neighbours, shape (N, K); -1: none."""


def _covariances(points: _Points, psf: _Psf, settings: PointSettings, chosen: IntArray) -> _Covariances:
    pairs = close_pairs(points.centers, psf.pair_radius)
    tables = _tables(points, pairs, psf)
    square = ((points.centers[pairs[:, 0]] - points.centers[pairs[:, 1]]) ** 2).sum(axis=1)
    first, second = pairs.T.ravel(), pairs[:, ::-1].T.ravel()
    order = np.lexsort((second, np.tile(square, 2), first))
    starts = np.searchsorted(first[order], np.arange(len(points.base) + 1))
    of_flux, of_center = _blocks(points, psf)
    rows = np.tile(np.arange(len(pairs)), 2)[order]
    neighbors = second[order]
    own, cross = marginal_covariances(
        chosen,
        starts,
        neighbors,
        rows,
        pairs,
        tables,
        points.flux * points.steepness,
        of_flux,
        of_center,
        settings.neighbours,
    )
    place = starts[chosen][:, None] + np.arange(settings.neighbours)
    there = place < starts[chosen + 1][:, None]
    nearest = np.append(neighbors, -1)[np.where(there, place, -1)]
    return _Covariances(own=own, cross=cross, neighbors=nearest)


def _correlations(covariances: _Covariances, n_bands: int) -> tuple[DoubleArray, IntArray]:
    """Correlation (S, B) of the flux of every source with that of the neighbour where it is largest, and which (S, B).

    0 and -1 for a source alone. The covariances are those of all sources.
    """
    if covariances.neighbors.shape[1] == 0:
        nothing = np.zeros((len(covariances.own), n_bands))
        return nothing, np.full(nothing.shape, -1)
    variance = np.diagonal(covariances.own, axis1=1, axis2=2)[:, :n_bands]
    product = variance[:, None] * variance[covariances.neighbors]
    known = (covariances.neighbors >= 0)[:, :, None] & (product > 0)
    scale = np.sqrt(np.where(known, product, 1.0))
    # The two variances are those with other neighbours free.
    correlation = np.where(known, np.clip(covariances.cross / scale, -1.0, 1.0), 0.0)
    worst = np.abs(correlation).argmax(axis=1)[:, None]
    largest = np.take_along_axis(correlation, worst, axis=1)[:, 0]
    neighbors = np.take_along_axis(covariances.neighbors[:, :, None] + np.zeros_like(known), worst, axis=1)[:, 0]
    return largest, np.where(largest != 0, neighbors, -1)


def _cost_of_removal(points: _Points, psf: _Psf, settings: PointSettings, chosen: IntArray) -> DoubleArray:
    """How much chi2 rises without each of the chosen sources, everything else following."""
    n_bands = points.flux.shape[1]
    covariance = _covariances(points, psf, settings, chosen).own[:, :n_bands, :n_bands]
    flux = points.flux[chosen]
    return np.asarray((flux * np.linalg.solve(covariance, flux[:, :, None])[:, :, 0]).sum(axis=1))


def _worth_keeping(state: _State, data: _Data, psf: _Psf, settings: PointSettings, strict: bool) -> BoolArray:
    """Which sources stay: listed ones; added ones that are positive, not on another, and lower chi2 enough.

    That is by the square of the significance that a source must have, with the share of the model if `strict`, by a
    quarter of it without the share otherwise. Of sources that are near each other only the least goes.
    """
    points = state.points
    keep = np.ones(len(points.base), dtype=bool)
    added = np.flatnonzero(~points.listed)
    if len(added) == 0:
        return keep
    least = np.full(len(added), 0.25 * settings.significance**2)
    if strict:
        y, x = points.base[added].T
        total = _model_flux(state, psf)[:, y, x].T
        snr = (total - points.flux[added]) * points.amplitude[added] * np.sqrt(psf.own[:, 0])
        least = (settings.significance + settings.model_fraction * np.sqrt((snr**2).sum(axis=1))) ** 2
    cost = _cost_of_removal(points, psf, settings, added)
    positive = (points.flux[added] * points.amplitude[added]).sum(axis=1) > 0
    apart = _nearest(points.centers)[added] > 0.5 * settings.min_distance
    useless = np.flatnonzero(~(positive & apart & (cost >= least)))
    dropped: list[int] = []
    for i in added[useless[np.argsort(cost[useless], kind="stable")]]:
        if (((points.centers[dropped] - points.centers[i]) ** 2).sum(axis=1) > _ALONE**2).all():
            dropped.append(i)
    keep[dropped] = False
    return keep


def _search(state: _State, data: _Data, psf: _Psf, settings: PointSettings) -> tuple[_State, _Data, int]:
    """Fit in rounds, and add what the residuals show; returns the state, its data and the comparisons made.

    The share of the model that a candidate must exceed falls from round to round, so that what is brightest is fitted
    first. A round that does not pay is taken back.
    """
    penalty = 0.5 * settings.significance**2
    weights = data.weights
    tried = np.zeros(data.images.shape[1:], dtype=bool)
    fraction = max(_FIRST_FRACTION, settings.model_fraction)
    best, lowest = state, np.inf
    comparisons = 0
    for round_ in range(settings.rounds + 1):
        if settings.psf_error > 0:
            # Pixels in which the model is bright count less; losses of different weights are not compared.
            data, lowest = _discounted(data, weights, state.model, psf, settings), np.inf
            state = _render(_seen(state.points, data, psf, settings), data, psf)
        state, n, _ = _fit(state, data, psf, settings, settings.round_iterations)
        comparisons += n
        cost = state.loss + penalty * float((~state.points.listed).sum())
        if cost <= lowest:
            best, lowest = state, cost
        else:
            state = best
        if round_ == settings.rounds:
            break
        pixels = _candidates(state, data, psf, settings, fraction, tried)
        if len(pixels) == 0 and fraction <= settings.model_fraction:
            break
        fraction = max(settings.model_fraction, fraction * _EASIER)
        if len(pixels) == 0:
            continue
        tried[pixels[:, 0], pixels[:, 1]] = True
        keep = _worth_keeping(state, data, psf, settings, False)
        points = _insert(_select(state.points, keep), pixels, settings)
        changed = np.concatenate([pixels, state.points.centers[~keep]])
        state = _render(_seen(points, data, psf, settings), data, psf)
        state = _solve_fluxes(
            state, data, psf, _close_to(changed, state.points), close_pairs(state.points.centers, psf.pair_radius)
        )
        comparisons += 2
        points = state.points
        keep = points.listed | ((points.flux * points.amplitude).sum(axis=1) > 0)
        if not keep.all():
            state = _render(_select(points, keep), data, psf)
            state = _solve_fluxes(
                state, data, psf, _close_to(changed, state.points), close_pairs(state.points.centers, psf.pair_radius)
            )
            comparisons += 2
    return state, data, comparisons


def _close_to(pixels: DoubleArray, points: _Points) -> IntArray:
    """Sources whose gradient changes with the light at some pixels (n, 2)."""
    return np.flatnonzero(cKDTree(pixels).query(points.centers)[0] < _TOUCHED)


def _discounted(data: _Data, weights: FloatArray, model: FloatArray, psf: _Psf, settings: PointSettings) -> _Data:
    """Add the error of a model that is wrong by `psf_error` to that of the pixels."""
    error = (settings.psf_error * model) ** 2
    return _prepare_data(data.images, (weights / (1.0 + weights * error)).astype(np.float32), psf)


def _finish(state: _State, data: _Data, psf: _Psf, settings: PointSettings) -> tuple[_State, int, bool]:
    """Take added sources away that are not needed, and fit until convergence."""
    comparisons = 0
    for _ in range(_PRUNINGS):
        state, n, _ = _fit(state, data, psf, settings, settings.round_iterations)
        keep = _worth_keeping(state, data, psf, settings, True)
        comparisons += n
        if keep.all():
            break
        state = _render(_select(state.points, keep), data, psf)
        comparisons += 1
    state, n, converged = _fit(state, data, psf, settings, settings.max_iterations)
    return state, comparisons + n, converged


def _checked(
    images: ArrayLike, weights: ArrayLike, psfs: ArrayLike, peaks: ArrayLike
) -> tuple[FloatArray, FloatArray, DoubleArray, DoubleArray]:
    images = np.asarray(images)
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    psfs = np.ascontiguousarray(psfs, dtype=np.float64)
    peaks = np.asarray(peaks, dtype=np.float64)
    if images.ndim != 3:
        raise ShapeError(f"images must have shape (bands, height, width), got {images.shape}")
    if weights.shape != images.shape:
        raise ShapeError(f"weights must have the shape of images, {images.shape}, got {weights.shape}")
    if psfs.ndim != 3 or len(psfs) != len(images) or psfs.shape[1] % 2 == 0 or psfs.shape[2] % 2 == 0:
        raise ShapeError(f"psfs must have shape ({len(images)}, P, Q) with odd P and Q, got {psfs.shape}")
    if peaks.ndim != 2 or peaks.shape[1] != 2:
        raise ShapeError(f"peaks must have shape (sources, 2), got {peaks.shape}")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError("weights must be finite and >= 0, 0 where a pixel is not used")
    if not np.isfinite(psfs).all():
        raise InputError("psfs must be finite, zero in a band that is not used")
    height, width = images.shape[1:]
    y, x = np.rint(peaks).T
    outside = np.flatnonzero(~((y >= 0) & (y < height) & (x >= 0) & (x < width)))
    if len(outside):
        raise InputError(f"peaks must lie in the image of {images.shape[1:]} pixels, got {peaks[outside[0]].tolist()}")
    used = (weights > 0) & np.asarray(psfs.any(axis=(1, 2)))[:, None, None]
    if not np.isfinite(images[used]).all():
        raise InputError("images must be finite where weights are positive")
    weights = np.where(used, weights, np.float32(0))
    return np.where(used, images, 0).astype(np.float32), weights, psfs, peaks


def _width_evidence(sums: DoubleArray, points: _Points, psf: _Psf) -> tuple[DoubleArray, DoubleArray]:
    """Second moment per axis that is missing, and its error, from `core_sums`.

    A source of small variance v per axis is P + v/2 (P_yy + P_xx); of the Laplacian only the part counts that the flux
    cannot take.
    """
    normal = (points.amplitude**2 * points.flux**2 * psf.laplacian).sum(axis=1)
    slope = (points.flux * sums[:, :, 4]).sum(axis=1)
    nothing = np.full(len(normal), np.nan)
    half = np.divide(slope, normal, out=nothing.copy(), where=normal > 0)
    error = np.divide(1.0, np.sqrt(normal), out=nothing, where=normal > 0)
    return 2.0 * half, 2.0 * error


def fit_points(
    images: ArrayLike,
    weights: ArrayLike,
    psfs: ArrayLike,
    peaks: ArrayLike,
    settings: PointSettings | None = None,
) -> PointFit:
    """Fit many point sources with free centers and one flux per band, jointly.

    For crowded fields of stars. Sources that are missing in `peaks`, close companions among them, are added to soak up
    their light, and are reported apart.

    Parameters
    ----------
    images : array_like, shape (B, H, W)
        Flux per pixel [image unit], background subtracted. Any value, also NaN, where weights are zero.
    weights : array_like, shape (B, H, W)
        Inverse variance [image unit^-2]; 0: the pixel is not used.
    psfs : array_like, shape (B, P, Q)
        PSF of each band, odd sides, sums to one; all zero: the band is not used. A FWHM of 3.3 pixels or more keeps the
        error of the interpolation below 1e-4 of the peak.
    peaks : array_like, shape (S, 2)
        Where the sources are, (y, x) [pixels], inside the image, to about a pixel.
    settings : PointSettings, optional
        None: the defaults.

    Returns
    -------
    fit : PointFit
        One row per peak, in their order.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    InputError
        If a used pixel, a weight or a PSF is not finite, or a peak lies outside the image.

    Notes
    -----
    Damped Gauss-Newton steps in all fluxes and centers (Levenberg-Marquardt), accepted only if they lower
    ``chi2 / 2 + prior``. The gradient is exact, from pixels. The normal matrix comes from the autocorrelation of the
    PSF at the separations of pairs, times the weights that the sources see, and is solved by conjugate gradients; so
    its approximations (pairs cut at a distance, weights taken as constant within a PSF) slow convergence, but do not
    move the result. They do enter the errors, which are as good as the weights are smooth.

    In rounds, sources are added where the residuals demand it with `significance` plus a share of the local model: by a
    matched filter, and within 3 pixels of a source by what one would gain with that source free. Those that turn out
    not to be needed, negative, or on top of another are taken away.

    The order of the peaks does not matter. Cost and memory grow linearly with sources and pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from kermes.simulation import MoffatPsf
    >>> psf = MoffatPsf(fwhm_pix=4.0, beta=3.5).stamp()
    >>> fit = fit_points(100 * psf[None], np.ones((1, 41, 41)), psf[None], [(20, 20)])
    >>> fit.flux.round(1), fit.converged
    (array([[100.]]), True)
    """
    settings = PointSettings() if settings is None else settings
    pixels, inverse_variance, stamps, home = _checked(images, weights, psfs, peaks)
    n_sources, n_bands = len(home), len(pixels)
    psf = _prepare_psf(_with_wings(stamps, settings.wing_radius), settings)
    data = _prepare_data(pixels, inverse_variance, psf)

    order = np.lexsort((home[:, 1], home[:, 0]))
    home = np.ascontiguousarray(home[order])
    base = np.rint(home).astype(np.int64)
    listed = np.ones(n_sources, dtype=bool)
    normal = (data.coverage * psf.own[:, 0, None, None])[:, base[:, 0], base[:, 1]].T
    matched = _correlate(inverse_variance * pixels, psf.stamps)[:, base[:, 0], base[:, 1]].T
    points = _Points(
        base=base,
        home=home,
        listed=listed,
        centers=home.copy(),
        flux=np.divide(matched, normal, out=np.zeros_like(normal), where=normal > 0),
        amplitude=np.zeros_like(normal),
        steepness=np.zeros_like(normal),
        reach=np.zeros(normal.shape, dtype=np.int64),
        prior=_prior(listed, settings),
    )
    state = _render(_seen(points, data, psf, settings), data, psf)
    everything, pairs = np.arange(n_sources), close_pairs(state.points.centers, psf.pair_radius)
    for _ in range(2):
        state = _solve_fluxes(state, data, psf, everything, pairs)
    state = _render(_seen(state.points, data, psf, settings), data, psf)
    state, data, searching = _search(state, data, psf, settings)
    state = _render(_seen(state.points, data, psf, settings), data, psf)
    state, finishing, converged = _finish(state, data, psf, settings)

    points = state.points
    covariances = _covariances(points, psf, settings, np.arange(len(points.base)))
    near = np.minimum(points.reach, _CORE)
    sums = core_sums(state.residuals, data.weights, psf.splines, points.base, near, points.centers)
    core, squares = sums[:, :, 3].sum(axis=1), sums[:, :, 2].sum(axis=1)
    chi2 = np.divide(core, squares, out=np.full(len(core), np.nan), where=squares > 0)
    errors = np.sqrt(np.diagonal(covariances.own, axis1=1, axis2=2) * np.fmax(chi2, 1.0)[:, None])
    seen = points.amplitude > 0
    errors[:, :n_bands][~seen] = np.nan
    broadening, broadening_err = _width_evidence(sums, points, psf)

    rows = np.empty(n_sources, dtype=np.int64)
    rows[order] = np.flatnonzero(points.listed)
    added = np.flatnonzero(~points.listed)
    correlation, neighbor = _correlations(covariances, n_bands)
    numbers = np.full(len(points.base) + 1, -1)
    numbers[rows] = np.arange(n_sources)
    significance = np.sqrt(np.maximum(_cost_of_removal(points, psf, settings, added), 0.0))
    ranking = np.argsort(-significance, kind="stable")
    return PointFit(
        centers=points.centers[rows],
        flux=np.where(seen, points.flux, 0.0)[rows],
        flux_err=errors[rows, :n_bands],
        center_err=errors[rows, n_bands:],
        correlation=np.where(seen, correlation, np.nan)[rows],
        neighbor=numbers[neighbor[rows]],
        chi2=chi2[rows],
        broadening=broadening[rows],
        broadening_err=broadening_err[rows],
        added_centers=points.centers[added][ranking],
        added_flux=points.flux[added][ranking],
        added_significance=significance[ranking],
        iterations=searching + finishing + 5,
        converged=converged,
        loss=state.loss,
    )
