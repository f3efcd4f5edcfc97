"""The fit of profile sources: which neighbours are fitted together, in which order, and what each source is taken for.

Sources are points, exponential or Sersic profiles, or an exponential disc with a Sersic bulge, with a centre and shapes
that all bands share and a flux of its own in each band. Neighbours are fitted jointly in groups; between groups sweeps
go back and forth until nothing changes. Positions and shapes follow from Levenberg-Marquardt steps with the fluxes, a
linear problem, eliminated (variable projection, Golub & Pereyra 1973, with the approximation of Kaufman 1975).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from statistics import median
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kermes.config import ProfileConfig
from kermes.geometry import Box
from kermes.kernels import correlations, residuals
from kermes.kernels import groups as group_kernels
from kermes.kernels import profile_fitting as kernels
from kermes.kernels import stamps as stamp_kernels
from kermes.kernels.normal_equations import Variances
from kermes.kernels.stamps import DOUBLE, EXPONENTIAL, N_KINDS, N_SHAPE, POINT, SERSIC, Modes, Sources
from kermes.point_fitting import PointFit, PointSettings, close_pairs, fit_points
from kermes.scene import ProfileComponent, Scene, Source, kernel_table

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]

KINDS = ("point", "exponential", "sersic", "double")
"""Names of the kinds of sources, in the order of the numbers that kernels use."""

SIDES = np.array([24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384], dtype=np.int64)
"""Sides of the stamps that groups are fitted on [pixels]."""

LEVELS = np.array([300.0, 3000.0])
"""Signal-to-noise above which fainter Fourier modes are used."""

THRESHOLDS = (2e-3, 3e-4, 1e-4)
"""Modes in which no PSF is stronger than this are left out, for each level."""

FIRST_MODES = 2048
"""So many modes have room at first, those of a few small stamps."""

LONGEST_STEP = np.array([0.7, 0.7, 0.7, 0.5, 0.5, 0.5, 0.7, 0.5, 0.5, 0.5])
"""Longest step of each shape parameter."""

CONTRAST = 6.0
"""Signal-to-noise of a galaxy over that of its core above the surroundings; hardly any has more."""

FEWEST_CROWDED, POOR_CHI2 = 5, 3.0
"""A dense blend of at least so many sources that is left with such a chi2 is tried as a crowd of points."""

LEAST_SEEN = 0.7
"""Share of the power of the PSF on valid pixels below which the core of a star counts as masked."""

_ROUGH = PointSettings(rounds=0, max_iterations=4)

LEAST_BROADENING = 0.3
"""Second moment beyond that of the PSF [pixels^2] below which a source in a crowded field stays a point."""

CENTER_FLOOR = 5e-4
"""Error of centres that more light does not lower, that of sampled PSFs [pixels]."""

CONVERGED = 0.1
"""The fit has converged when the last sweep has lowered half the chi2 by less than this per source."""

STRUCTURED_SNR = (30.0, 60.0)
"""Structure of sources below the first signal-to-noise is lost in the noise; it counts in full above the second."""

STRUCTURED_CHI2 = (1.2, 1.4)
"""The same for the mean chi2 of the core of a source."""

CORE = 4.0
"""Radius of that core [widths of the PSF]."""

LEAST_RADIUS = 0.3
"""Smallest half-light radius of what is not a point [pixels]."""

FEW = 32
"""Of so many sources all pairs are looked at: a tree takes longer to grow."""

OUTSHONE = 3.0
"""The brightest source of a blend is fitted before those that have less than one over this of its signal-to-noise."""

MOST_SHEAR = 1.6
"""Largest of each component of the log-shear."""


@dataclass(slots=True, eq=False)
class ModeBank:
    """Fourier modes of one set of PSFs, made when a side and level is needed first."""

    psfs: DoubleArray
    """Shape (B, P, Q); zero in a band that cannot be used."""

    modes: Modes = field(init=False)
    norms: DoubleArray = field(init=False)
    """Root of the sum of squares of each PSF, shape (B,)."""

    sigmas: DoubleArray = field(init=False)
    """Width of the Gaussian that has the same effective area as each PSF [pixels], shape (B,); 0 without a PSF."""

    width: float = field(init=False)
    """Median of them over the bands that have a PSF; 0 if none has."""

    _single: FloatArray = field(init=False)
    _room: tuple[FloatArray, FloatArray] = field(init=False)
    """Arrays that hold `modes.frequencies` and `modes.psf`, and have room for more."""

    _lock: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        self.norms = np.sqrt(np.einsum("byx,byx->b", self.psfs, self.psfs))
        widths = [1 / (2 * np.sqrt(np.pi) * norm) if norm > 0 else 0.0 for norm in self.norms.tolist()]
        self.sigmas = np.array(widths)
        self.width = median([width for width in widths if width > 0] or [0.0])
        self._single = self.psfs.astype(np.float32)
        self._room = self._room_for(FIRST_MODES)
        self.modes = Modes(
            sets=np.full((len(SIDES), len(THRESHOLDS)), -1, dtype=np.int64),
            offsets=np.zeros(1, dtype=np.int64),
            lengths=np.zeros(0, dtype=np.int64),
            starts=np.zeros(1, dtype=np.int64),
            frequencies=np.zeros(0, dtype=np.float32),
            psf=np.zeros(0, dtype=np.float32),
        )

    def _room_for(self, n_modes: int) -> tuple[FloatArray, FloatArray]:
        """Make arrays for so many modes."""
        return np.empty(2 * n_modes, dtype=np.float32), np.empty(2 * len(self.psfs) * n_modes, dtype=np.float32)

    def require(self, stamps: IndexArray) -> Modes:
        """Give the modes, with what some stamps need."""
        if (self.modes.sets[stamps[:, 0], stamps[:, 3]] < 0).any():
            # Blends in other threads may have the same PSFs.
            with self._lock:
                sets = self.modes.sets
                missing = {(int(k), int(level)) for k, level in stamps[:, [0, 3]] if sets[k, level] < 0}
                for k, level in sorted(missing):
                    self._add(k, level)
        return self.modes

    def _add(self, k: int, level: int) -> None:
        side, old = int(SIDES[k]), self.modes
        first, lengths = int(old.offsets[-1]), np.empty(side, dtype=np.int64)

        def fill() -> int:
            return first + int(
                stamp_kernels.transform_modes(self._single, side, THRESHOLDS[level], first, lengths, *self._room)
            )

        last = fill()
        if 2 * last > len(self._room[0]):
            # Four times as much: what is not filled takes no memory, and what is there is rarely copied.
            self._room = self._room_for(4 * last)
            for new, values in zip(self._room, (old.frequencies, old.psf), strict=True):
                new[: len(values)] = values
            last = fill()
        sets = old.sets.copy()
        sets[k, level] = len(old.offsets) - 1
        # A new tuple: another thread may be reading the old one, and what that holds is not changed.
        self.modes = Modes(
            sets=sets,
            offsets=np.append(old.offsets, last),
            lengths=np.concatenate([old.lengths, lengths]),
            starts=np.append(old.starts, old.starts[-1] + side),
            frequencies=self._room[0][: 2 * last],
            psf=self._room[1][: 2 * len(self.psfs) * last],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clumps:
    """Points that are part of a galaxy: they stand out of its profile."""

    owners: IndexArray
    """Numbers of the sources that they belong to, shape (C,)."""

    centers: DoubleArray
    """Shape (C, 2)."""

    fluxes: DoubleArray
    """Shape (C, B)."""

    stamps: IndexArray
    """Where their light lies, see `Sources`, shape (C, 4)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProfileFit:
    """Profile sources fitted to a blend; positions in pixels of the blend."""

    sources: Sources
    """State of all sources, listed ones first; without clumps."""

    clumps: Clumps
    """Parts of them that stand out of their profiles."""

    n_listed: int
    """Number of sources that were asked for."""

    variances: Variances
    """What is known of their fluxes and shapes."""

    doubt: DoubleArray
    """What the variances of the fluxes hold of the choice of kinds, shape (S, B)."""

    correlations: Correlations
    """How their fluxes hang together."""

    significance: DoubleArray
    """Signal-to-noise at which sources that nobody listed were found, shape (S - n_listed,)."""

    evidence: DoubleArray
    """By how much the penalised loss of the best simpler kind is higher, shape (S,); NaN where none was tried."""

    residual: FloatArray
    """What the likelier kinds of sources leave, shape (B, H, W)."""

    iterations: int
    """Number of Levenberg-Marquardt steps per source, rounded up."""

    converged: bool
    """Whether the last sweep changed the loss by less than was asked for."""

    @property
    def flux(self) -> DoubleArray:
        """Total fluxes, shape (S, B)."""
        flux: DoubleArray = self.sources.fluxes.sum(axis=1)
        if len(self.clumps.owners):
            np.add.at(flux, self.clumps.owners, self.clumps.fluxes)
        return flux

    @property
    def flux_err(self) -> DoubleArray:
        """Error of the total fluxes with everything else free, shape (S, B); NaN where nothing is known."""
        return np.asarray(np.sqrt(self.variances.flux))

    @property
    def center_err(self) -> DoubleArray:
        """Error of the centres, shape (S, 2) [pixels]."""
        return np.asarray(np.sqrt(self.variances.shape[:, :2]))


@lru_cache(maxsize=8)
def _prior(config: ProfileConfig) -> DoubleArray:
    """Inverse variance, mean and limits of the parameters of a shape at the position 0, shape (4, N_SHAPE)."""
    ln_radius = np.log(config.radius)
    mean = [0.0, 0.0, ln_radius, 0.0, 0.0, 0.0, ln_radius - np.log(2.0), 0.0, 0.0, np.log(config.bulge_index)]
    shape_widths = [config.radius_width, config.shear_width, config.shear_width, config.index_width]
    widths = np.array([config.center_width, config.center_width, *shape_widths, *shape_widths])
    weight = np.divide(1.0, np.square(widths), out=np.zeros(N_SHAPE), where=widths > 0)
    box, least = config.center_box, np.log(LEAST_RADIUS)
    low = [least, -MOST_SHEAR, -MOST_SHEAR, np.log(0.5)]
    high = [np.inf, MOST_SHEAR, MOST_SHEAR, np.log(6.0)]
    return np.array([weight, mean, [-box, -box, *low, *low], [box, box, *high, *high]])


def _new_sources(peaks: DoubleArray, n_bands: int, config: ProfileConfig) -> Sources:
    """Exponential sources without light, at the prior mean."""
    n = len(peaks)
    weight, shapes, low, high = block = np.empty((4, n, N_SHAPE))
    block[:] = _prior(config)[:, None]
    block[1:, :, :2] += peaks
    return Sources(
        kinds=np.full(n, EXPONENTIAL),
        shapes=shapes,
        fluxes=np.zeros((n, 2, n_bands)),
        mean=shapes.copy(),
        weight=weight,
        low=low,
        high=high,
        stamps=np.full((n, 4), -1, dtype=np.int64),
        evidence=np.full((n, N_KINDS), np.nan),
        partners=np.full((n, config.largest_group), -1, dtype=np.int64),
        doubt=np.zeros((n, config.largest_group, n_bands)),
        lean=np.zeros((n, config.largest_group, n_bands)),
    )


def _unknown_variances(n_sources: int, n_bands: int, largest_group: int) -> Variances:
    return Variances(
        flux=np.full((n_sources, n_bands), np.nan),
        shape=np.full((n_sources, 7), np.nan),
        cross=np.zeros((n_sources, largest_group, n_bands)),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Correlations:
    """How the fluxes of sources hang together, everything else free."""

    strongest: DoubleArray
    """Correlation of the flux with that of the neighbour where it is largest, shape (S, B); 0: alone, NaN: unknown."""

    neighbor: IndexArray
    """Number of that neighbour, shape (S, B); -1: none."""

    condition: DoubleArray
    """Condition number of the correlations of the fluxes that were fitted together, in the worst band, shape (S,)."""


def correlate(variances: Variances, members: IndexArray, offsets: IndexArray) -> Correlations:
    """Find how the fluxes of the sources of each group hang together.

    Parameters
    ----------
    variances : Variances
    members, offsets : ndarray, shape (S,), (G + 1,)
        Groups: group g has members[offsets[g]:offsets[g + 1]].
    """
    strongest, neighbor = np.empty(variances.flux.shape), np.empty(variances.flux.shape, dtype=np.int64)
    condition = np.empty(len(strongest))
    correlations.correlate_groups(variances, members, offsets, strongest, neighbor, condition)
    return Correlations(strongest=strongest, neighbor=neighbor, condition=condition)


@lru_cache(maxsize=FEW)
def _all_pairs(n: int) -> IndexArray:
    """Pairs of n numbers, the smaller first, ascending, shape (n (n - 1) / 2, 2)."""
    return np.stack(np.triu_indices(n, 1), axis=1)


def possible_pairs(positions: DoubleArray, link: float) -> IndexArray:
    """Pairs of sources, the smaller number first, ascending: of many only those that are not farther apart."""
    n = len(positions)
    return _all_pairs(n) if n <= FEW else close_pairs(positions, link)


class _Engine:
    """The state of one fit and the sweeps over it."""

    def __init__(
        self,
        images: FloatArray,
        weights: FloatArray,
        bank: ModeBank,
        peaks: DoubleArray,
        config: ProfileConfig,
        most: int = DOUBLE,
    ) -> None:
        """`most` is the most complex kind that a source may become."""
        self.most = most
        self.significance = np.zeros(0)
        self.config, self.bank, self.table = config, bank, kernel_table()
        self.weights = self.soft_weights = weights
        self.images, self.residual = images, images.copy()
        self.sources = _new_sources(peaks, len(images), config)
        if most == POINT:
            self.sources.kinds[:] = POINT
        self.n_listed = len(peaks)
        # Which are held to the size of faint ones; those that were found later are not.
        self.small = np.zeros(len(peaks), dtype=bool)
        # Which source each one is a clump of; -1: of none.
        self.owners = np.full(len(peaks), -1)
        total = weights.sum(axis=(1, 2), dtype=np.float64)
        n_valid = np.array([np.count_nonzero(plane) for plane in weights])
        self.noise = np.sqrt(np.divide(n_valid, total, out=np.zeros(len(total)), where=total > 0))
        self.penalties = np.array([0.0, config.extended_penalty, config.sersic_penalty, config.double_penalty])
        n_bands = len(images)
        self.variances = _unknown_variances(len(peaks), n_bands, config.largest_group)
        self.doubt = self.lean = np.zeros((len(peaks), n_bands))
        self.steps = 0
        self.snr = np.zeros(len(peaks))
        self.members, self.offsets = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.settled = np.zeros(0, dtype=bool)
        self.regroup(np.ones(len(peaks)))

    def regroup(self, brightness: DoubleArray) -> None:
        """Join neighbours anew.

        In whatever order sources are listed, the faintest of a group chooses its kind first, before a richer profile of
        a bright neighbour takes up its light.
        """
        config, shapes = self.config, self.sources.shapes
        self.members, self.offsets, self.settled = group_kernels.regroup(
            shapes,
            brightness,
            possible_pairs(shapes[:, :2], config.link),
            config.link,
            config.largest_group,
            config.brightness_ratio,
            self.snr,
            self.members,
            self.offsets,
            self.settled,
        )
        self.lonely = np.zeros(len(self.settled), dtype=bool)

    def update(self) -> None:
        """Estimate signal-to-noise, and from it how large sources may be; what is larger is drawn anew."""
        above = np.empty(len(self.snr), dtype=bool)
        residuals.estimate(
            self.sources, self.noise, self.bank.norms, self.small, self.config.largest_radius, self.snr, above
        )
        if above.any():
            self._limit(above)

    def _limit(self, above: NDArray[np.bool_]) -> None:
        """Make sources that are larger than they may be, shape (S,), as large as that."""
        too_large = np.flatnonzero(above)
        shapes, cap = self.sources.shapes, self.sources.high[:, 2].copy()
        self.settled[np.logical_or.reduceat(above[self.members], self.offsets[:-1])] = False
        self.draw(too_large, 1.0)
        for part, p in enumerate((2, 6)):
            # As bright as before in the middle: light that was far out is not to be heaped up there.
            self.sources.fluxes[:, part] *= np.exp(2 * np.minimum(cap - shapes[:, p], 0.0))[:, None]
            np.minimum(shapes[:, p], cap, out=shapes[:, p])
        self.draw(too_large, -1.0)

    def distrust_wings(self) -> None:
        """Lower the signal-to-noise of what does not stand out: at first, sources on bright wings take their light."""
        residuals.limit_by_contrast(
            self.images, self.weights, self.sources.shapes, self.bank.sigmas, CONTRAST, self.snr
        )

    def soften(self) -> None:
        """Add the error of imperfect models of bright sources, as their neighbours see it."""
        bright = np.flatnonzero(self.snr > self.config.bright_snr)
        if len(bright) and self.config.model_error > 0:
            image = np.zeros_like(self.residual)
            stamp_kernels.draw_sources(
                image, self.table, self.bank.modes, SIDES, self.sources, bright, self.config.model_error
            )
            self.soft_weights = self.weights / (1 + self.weights * image * image)
            # What is around the bright ones counts less now.
            self.settled &= self.lonely

    def heed_structure(self) -> None:
        """Let the neighbours of galaxies that are not as smooth as profiles trust these less.

        As `soften` does, with what residuals tell of each galaxy: see `kermes.measurement.misfit_factors`. Structure is
        alike within the area of the PSF, 4 pi sigma^2 pixels, and so counts as so many times the variance of pixels
        that know nothing of each other if the galaxy is much wider than the PSF, and half of that if it is as wide.
        """
        if len(self.snr) < 2:
            return
        chi2, reach = np.empty(len(self.snr)), np.full(len(self.snr), CORE * self.bank.width)
        residuals.core_chi2(self.residual, self.weights, self.sources, reach, chi2)
        if chi2.max() <= STRUCTURED_CHI2[0]:
            return
        # Not all at once: in another cut-out of the same pixels both may be a little above or below.
        share = np.interp(chi2, STRUCTURED_CHI2, (0.0, 1.0)) * np.interp(self.snr, STRUCTURED_SNR, (0.0, 1.0))
        shared = 2 * np.pi * np.square(self.bank.sigmas)
        image, found = self.residual[:0], False
        for s in np.flatnonzero(share).tolist():
            if not len(image):
                image = np.zeros_like(self.residual)
            k, y0, x0, _ = self.sources.stamps[s].tolist()
            box = Box(y0, x0, int(SIDES[k]), int(SIDES[k])) & Box.of_shape(image.shape[1:])
            window = (slice(None), box.y, box.x)
            stamp_kernels.draw_sources(image, self.table, self.bank.modes, SIDES, self.sources, np.array([s]), 1.0)
            model = np.ascontiguousarray(image[window])
            image[window] = 0
            eta2 = share[s] * self._structure(s, model, box)
            if eta2 > 0:
                if not found:
                    self.soft_weights, found = self.soft_weights.copy(), True
                weights = self.weights[window]
                variance = (eta2 * shared).astype(np.float32)[:, None, None] * np.square(model)
                self.soft_weights[window] = np.minimum(self.soft_weights[window], weights / (1 + weights * variance))
        if found:
            self.settled[:] = False

    def _structure(self, s: int, model: FloatArray, box: Box) -> float:
        """Variance of the light of a source relative to its model (B, h, w) on a box that residuals tell of."""
        room, variance = np.zeros((2, self.residual.shape[2]), dtype=np.float32), np.empty(1)
        residuals.fill_structure(
            self.residual,
            self.weights,
            model.reshape(len(model), -1),
            np.array([[*box.origin, *box.shape]]),
            np.array([0, model[0].size]),
            np.floor(self.sources.shapes[s : s + 1, :2] + 0.5).astype(np.int64),
            self.bank.width,
            room[0],
            room[1],
            variance,
        )
        return float(variance[0])

    def admit_misfit(self) -> None:
        """Scale the variances by the chi2 of the core of each source where that is above one, and add the doubt."""
        self.doubt, self.lean = np.empty((2, len(self.snr), len(self.residual)))
        kernels.admit_misfit(
            self.residual,
            self.weights,
            self.sources,
            self.bank.width,
            CENTER_FLOOR,
            self.variances,
            self.doubt,
            self.lean,
        )

    def join_clumps(self) -> None:
        """Make the variances of fluxes those of galaxies with their clumps, before `correlate` and `admit_misfit`.

        A clump whose flux is not known in a band has none there.
        """
        flux, cross = self.variances.flux, self.variances.cross
        clumps = np.flatnonzero(self.owners >= 0)
        if not len(clumps):
            return
        groups = np.repeat(np.arange(len(self.settled)), np.diff(self.offsets))
        group, place = np.empty((2, len(flux)), dtype=np.int64)
        group[self.members] = groups
        place[self.members] = np.arange(len(flux)) - self.offsets[groups]
        for c in clumps.tolist():
            owner = self.owners[c]
            flux[owner] += np.nan_to_num(flux[c])
            if group[c] != group[owner]:
                continue
            members = self.members[groups == group[c]]
            flux[owner] += 2 * cross[owner, place[c]]
            # The row and the column of the clump are added to those of its owner.
            cross[owner] += cross[c]
            cross[members, place[owner]] += cross[members, place[c]]
            cross[c] = cross[members, place[c]] = 0

    def average(self) -> None:
        """Give sources the mean flux of the kinds that they might be, after `admit_misfit`.

        The residual stays that of the likelier ones.
        """
        self.sources.fluxes[:, 0] += self.lean

    def draw(self, rows: IndexArray, factor: float) -> None:
        """Add some sources, times a factor, to the residual, each on the stamp that it has."""
        if len(rows) == 0:
            return
        stamp_kernels.draw_sources(self.residual, self.table, self.bank.modes, SIDES, self.sources, rows, factor)

    def place(self) -> None:
        """Give all sources the stamps of their groups."""
        stamps = np.empty((len(self.offsets) - 1, 4), dtype=np.int64)
        stamp_kernels.plan_stamps(self.sources, self.members, self.offsets, self.snr, SIDES, LEVELS, stamps)
        self.bank.require(stamps)
        self.sources.stamps[self.members] = np.repeat(stamps, np.diff(self.offsets), axis=0)

    def add_residual_peaks(self) -> NDArray[np.bool_]:
        """Add point sources where much is left of the data; returns which groups' members to visit, shape (S,)."""
        config = self.config
        limit = 4 * len(self.snr) + 10
        found, values = np.empty((limit, 2)), np.empty(limit)
        n = residuals.search(
            self.images,
            self.residual,
            self.weights,
            self.bank.sigmas,
            self.sources.shapes,
            config.residual_snr,
            config.residual_share,
            config.residual_distance,
            found,
            values,
        )
        if n == 0:
            return np.zeros(len(self.snr), dtype=bool)
        found, values = found[:n], values[:n]
        owners = _hosts(found, values, self)
        new = _new_sources(found, len(self.residual), config)
        new.kinds[:] = POINT
        self.sources = Sources(*(np.concatenate(pair) for pair in zip(self.sources, new, strict=True)))
        n_before = len(self.snr)
        unknown = _unknown_variances(n, len(self.residual), config.largest_group)
        self.variances = Variances(*(np.concatenate(pair) for pair in zip(self.variances, unknown, strict=True)))
        self.snr = np.concatenate([self.snr, values])
        self.small = np.concatenate([self.small, np.zeros(n, dtype=bool)])
        self.significance = np.concatenate([self.significance, values])
        self.owners = np.concatenate([self.owners, owners])
        self.regroup(np.maximum(self.snr, 5.0))
        touched = np.arange(len(self.snr)) >= n_before
        touched[owners[owners >= 0]] = True
        for position in found:
            distance = np.hypot(*(self.sources.shapes[:, :2] - position).T)
            touched |= distance < config.link
        return touched

    def loss(self) -> float:
        """Half the chi2 of what is left."""
        return 0.5 * float(residuals.total_chi2(self.residual, self.weights)[0])

    def candidates(self, skip: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """Which kinds each source may become, shape (S, N_KINDS)."""
        config, listed = self.config, np.arange(len(self.snr)) < self.n_listed
        may = np.zeros((len(self.snr), N_KINDS), dtype=bool)
        may[:, POINT] = True
        may[:, EXPONENTIAL] = listed
        may[:, SERSIC] = listed & (self.snr > config.sersic_snr)
        may[:, DOUBLE] = listed & (self.snr > config.double_snr)
        may[:, self.most + 1 :] = False
        if skip is not None:
            may[skip] = False
        return may

    def sweep(
        self,
        steps: int,
        chosen: NDArray[np.bool_] | None = None,
        candidates: NDArray[np.bool_] | None = None,
        errors: bool = False,
        update: bool = False,
    ) -> bool:
        """Visit the groups that have a chosen member, the brightest first, but for those that are settled.

        With `update` that comes next. Returns whether there are any groups to visit.
        """
        n_sources, n_groups = len(self.snr), len(self.settled)
        stamps, wanted = np.empty((n_groups, 4), dtype=np.int64), np.empty(n_groups, dtype=bool)
        above = np.empty(n_sources, dtype=bool)
        if chosen is None:
            chosen = np.ones(n_sources, dtype=bool)
        if candidates is None:
            candidates = np.zeros((n_sources, N_KINDS), dtype=bool)
        modes = self.bank.modes
        while True:
            done = kernels.sweep(
                self.residual,
                self.weights,
                self.soft_weights,
                self.table,
                modes,
                SIDES,
                LEVELS,
                self.sources,
                self.members,
                self.offsets,
                self.snr,
                self.config.bright_snr,
                chosen,
                LONGEST_STEP,
                steps,
                self.config.tolerance,
                candidates,
                self.penalties,
                self.variances,
                errors,
                self.settled,
                self.lonely,
                stamps,
                wanted,
                update,
                self.noise,
                self.bank.norms,
                self.small,
                self.config.largest_radius,
                above,
            )
            if done != kernels.MODES_MISSING:
                break
            modes = self.bank.require(stamps[wanted])
        if update and above.any():
            self._limit(above)
        if done == kernels.NOTHING_TO_VISIT:
            return False
        self.steps += int(done)
        return True


def fit_profiles(
    images: FloatArray,
    weights: FloatArray,
    bank: ModeBank,
    peaks: DoubleArray,
    config: ProfileConfig,
    most: int = DOUBLE,
) -> ProfileFit:
    """Fit point sources and galaxy profiles to a blend.

    Parameters
    ----------
    images : ndarray, shape (B, H, W)
        Finite everywhere.
    weights : ndarray, shape (B, H, W)
        Inverse variance; 0 where a pixel is not used.
    bank : ModeBank
        PSFs of the blend.
    peaks : ndarray, shape (S, 2)
        Positions (y, x) in pixels of the blend.
    config : ProfileConfig
    most : int
        The most complex kind that a source may become.

    Returns
    -------
    fit : ProfileFit
    """
    _load_kernels()
    if _is_crowded(weights, bank, len(peaks), config.crowded_sources, config.crowded_areas):
        return _fit_crowded(images, weights, bank, peaks, config, most)
    fit = _fit_in_groups(images, weights, bank, peaks, config, most)
    if _is_crowded(weights, bank, len(peaks), FEWEST_CROWDED, 2 * config.crowded_areas):
        # Groups that are cut out of a dense crowd can drive each other far from the truth.
        chi2 = _chi2(fit.residual, weights)
        if chi2 > POOR_CHI2:
            points = _fit_crowded(images, weights, bank, peaks, config, most)
            if _chi2(points.residual, weights) < chi2:
                return points
    return fit


@cache
def _load_kernels() -> None:
    """Load the code that only blends with bright sources need, or compile it, with the first blend.

    It takes more memory than a blend does, which would be that of some blend in the middle of the work.
    """
    image = np.zeros((1, 8, 8), dtype=np.float32)
    engine = _Engine(image, np.ones_like(image), ModeBank(np.ones((1, 3, 3))), np.full((1, 2), 4.0), ProfileConfig())
    engine.draw(np.zeros(1, dtype=np.int64), 1.0)


def _chi2(residual: FloatArray, weights: FloatArray) -> float:
    """Mean of the squared residuals [sigma] of the valid pixels."""
    total, n_pixels = residuals.total_chi2(residual, weights)
    return float(total / max(n_pixels, 1))


def _fit_in_groups(
    images: FloatArray, weights: FloatArray, bank: ModeBank, peaks: DoubleArray, config: ProfileConfig, most: int
) -> ProfileFit:
    """Fit all sources, neighbours jointly, in sweeps over the groups."""
    engine = _Engine(images, weights, bank, peaks, config, most)
    engine.sweep(0, update=True)
    engine.distrust_wings()
    engine.regroup(np.maximum(engine.snr, 5.0))
    bright = engine.snr > config.bright_snr
    if bright.any():
        _fit_bright_first(engine, bright)
    # Around bright sources twice: what the first visits leave of them is still much to those that come late.
    for _ in range(2 if bright.any() else 1):
        engine.sweep(config.steps, update=True)
    engine.soften()
    engine.sweep(config.steps, candidates=engine.candidates(bright), update=True)
    for _ in range(config.residual_rounds):
        touched = engine.add_residual_peaks()
        if not touched.any():
            break
        # More sources explain the same light: simpler profiles may do now, richer ones need not be tried. What is a
        # point may still turn out to be a galaxy: it has the mean flux of both. Two steps, as the last sweeps go on.
        simpler = np.arange(N_KINDS) <= np.maximum(engine.sources.kinds, EXPONENTIAL)[:, None]
        engine.sweep(2, touched, engine.candidates(~touched) & simpler, update=True)
    if config.heed_structure:
        engine.heed_structure()
    loss, converged = engine.loss(), False
    for _ in range(config.max_sweeps):
        before = loss
        if engine.sweep(2):
            loss = engine.loss()
        converged = abs(before - loss) < CONVERGED * len(engine.snr)
        if converged:
            break
    engine.sweep(0, errors=True)
    engine.join_clumps()
    correlations = correlate(engine.variances, engine.members, engine.offsets)
    engine.admit_misfit()
    if config.average_kinds:
        engine.average()
    return _finish(engine, correlations, converged)


def _finish(engine: _Engine, correlations: Correlations, converged: bool) -> ProfileFit:
    owners = engine.owners
    fit = ProfileFit(
        sources=engine.sources,
        clumps=_clumps(engine),
        n_listed=engine.n_listed,
        variances=engine.variances,
        doubt=engine.doubt,
        correlations=correlations,
        significance=engine.significance,
        evidence=_evidence(engine.sources),
        residual=engine.residual,
        iterations=-(-engine.steps // max(engine.n_listed, 1)),
        converged=converged,
    )
    return _taken(fit, np.flatnonzero(owners < 0)) if (owners >= 0).any() else fit


def _clumps(engine: _Engine) -> Clumps:
    """Take the clumps out of the sources of a fit, each on a stamp of its own: those of their groups are large."""
    clumps = np.flatnonzero(engine.owners >= 0)
    sources = Sources(*(values[clumps] for values in engine.sources))
    sources.stamps[:] = -1
    stamps = np.empty((len(clumps), 4), dtype=np.int64)
    if len(clumps):
        every = np.arange(len(clumps) + 1)
        stamp_kernels.plan_stamps(sources, every[:-1], every, engine.snr[clumps], SIDES, LEVELS, stamps)
    return Clumps(
        owners=engine.owners[clumps], centers=sources.shapes[:, :2], fluxes=sources.fluxes[:, 0], stamps=stamps
    )


def _taken(fit: ProfileFit, rows: IndexArray) -> ProfileFit:
    """Keep some of the sources of a fit, all that were listed among them."""
    number = np.full(len(fit.evidence) + 1, -1)
    number[rows] = np.arange(len(rows))
    correlations = fit.correlations
    return replace(
        fit,
        sources=Sources(*(values[rows] for values in fit.sources)),
        variances=Variances(*(values[rows] for values in fit.variances)),
        doubt=fit.doubt[rows],
        correlations=Correlations(
            strongest=correlations.strongest[rows],
            neighbor=number[correlations.neighbor[rows]],
            condition=correlations.condition[rows],
        ),
        significance=fit.significance[rows[fit.n_listed :] - fit.n_listed],
        evidence=fit.evidence[rows],
    )


def _is_crowded(weights: FloatArray, bank: ModeBank, n_sources: int, fewest: float, areas: float) -> bool:
    """Whether there are at least so many sources, and fewer pixels for each than so many areas of the PSF."""
    if n_sources < fewest:
        return False
    area = 4 * np.pi * bank.width**2
    return bool(np.count_nonzero(weights.max(axis=0) > 0) < areas * area * n_sources)


def _fit_crowded(
    images: FloatArray, weights: FloatArray, bank: ModeBank, peaks: DoubleArray, config: ProfileConfig, most: int
) -> ProfileFit:
    """Fit all sources as points, jointly; then those that look wider as galaxies.

    Of stars whose cores are masked only the wings are seen, which the normal equations of points do not know: they are
    fitted in turn with all others.
    """
    usable = np.where(weights > 0, images, np.float32(0.0))
    hidden = _is_hidden(weights, bank.psfs, peaks)
    light = np.zeros_like(usable)
    stars: Sources | None = None
    masked = hidden
    for settings in [None, _ROUGH, _ROUGH, PointSettings()] if hidden.any() else [PointSettings()]:
        if settings is None:
            # The stars first, as if they were alone: they outshine what is around them.
            engine = _Engine(images, weights, bank, peaks, config, POINT)
        else:
            points = fit_points(usable - light, weights, bank.psfs, peaks[~hidden], settings)
            engine = _engine_of_points(images, weights, bank, peaks, hidden, points, stars, config, most)
        masked = np.append(hidden, np.zeros(len(engine.snr) - len(hidden), dtype=bool))
        if hidden.any():
            engine.sweep(config.steps, masked)
            stars = engine.sources
            light = np.zeros_like(usable)
            stamp_kernels.draw_sources(light, engine.table, bank.modes, SIDES, stars, np.flatnonzero(masked), 1.0)
    listed, n = np.flatnonzero(~hidden), len(peaks)
    engine.variances.flux[listed] = np.square(points.flux_err)
    engine.variances.shape[listed, :2] = np.square(points.center_err)
    wide = np.zeros(len(engine.snr), dtype=bool)
    wide[listed] = (points.broadening > 5 * points.broadening_err) & (points.broadening > LEAST_BROADENING)
    wide &= engine.snr > config.sersic_snr
    if wide.any() and most > POINT:
        engine.sweep(config.steps, wide, engine.candidates(~wide), update=True)
        engine.sweep(0, wide & (engine.sources.kinds != POINT), errors=True)
    if hidden.any():
        engine.sweep(0, masked, errors=True)
    engine.steps += points.iterations * n
    strongest, neighbor = np.full((2, *engine.variances.flux.shape), np.nan)
    strongest[listed], neighbor[:] = points.correlation, -1
    neighbor[listed] = np.append(listed, -1)[points.neighbor]
    unknown = np.full(len(strongest), np.nan)
    correlations = Correlations(strongest=strongest, neighbor=neighbor.astype(np.int64), condition=unknown)
    return _finish(engine, correlations, points.converged)


def _is_hidden(weights: FloatArray, psfs: DoubleArray, peaks: DoubleArray) -> NDArray[np.bool_]:
    """Whether in most bands less than `LEAST_SEEN` of what tells about a point at a peak is on valid pixels, (S,)."""
    _, height, width = weights.shape
    half = [min(4, n // 2) for n in psfs.shape[1:]]
    dy, dx = (offset.ravel() for offset in np.mgrid[-half[0] : half[0] + 1, -half[1] : half[1] + 1])
    power = np.square(psfs[:, dy + psfs.shape[1] // 2, dx + psfs.shape[2] // 2])
    y, x = np.floor(peaks + 0.5).astype(np.int64).T[:, :, None] + np.stack([dy, dx])[:, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    seen = (weights[:, np.where(inside, y, 0), np.where(inside, x, 0)] > 0) | ~inside
    used = (weights > 0).any(axis=(1, 2)) & (power > 0).any(axis=1)
    dark = np.einsum("bsp,bp->bs", seen[used], power[used]) < LEAST_SEEN * power[used].sum(axis=1)[:, None]
    return np.asarray(2 * dark.sum(axis=0) > used.sum())


def _engine_of_points(
    images: FloatArray,
    weights: FloatArray,
    bank: ModeBank,
    peaks: DoubleArray,
    hidden: NDArray[np.bool_],
    points: PointFit,
    stars: Sources | None,
    config: ProfileConfig,
    most: int,
) -> _Engine:
    """Take over fitted points, with hidden stars as they are in `stars`, without light if that is None."""
    n = len(peaks)
    centers = peaks.copy()
    centers[~hidden] = points.centers
    engine = _Engine(images, weights, bank, np.concatenate([centers, points.added_centers]), config, most)
    engine.n_listed = n
    sources = engine.sources
    sources.kinds[:] = POINT
    sources.fluxes[:n][~hidden, 0] = points.flux
    sources.fluxes[n:, 0] = points.added_flux
    if stars is not None:
        sources.fluxes[:n][hidden] = stars.fluxes[:n][hidden]
        sources.shapes[:n][hidden] = stars.shapes[:n][hidden]
    engine.significance = points.added_significance
    engine.update()
    engine.regroup(np.maximum(engine.snr, 5.0))
    engine.place()
    engine.draw(np.arange(len(engine.snr)), -1.0)
    return engine


def _hosts(positions: DoubleArray, snr: DoubleArray, engine: _Engine) -> IndexArray:
    """In which much brighter galaxies something found (N, 2) lies, and so is a clump of it; -1: in none."""
    sources, config = engine.sources, engine.config
    hosts = np.flatnonzero((sources.kinds != POINT) & (engine.snr * config.clump_share > snr.min(initial=np.inf)))
    if not len(hosts):
        return np.full(len(positions), -1)
    y, x, ln_r, e1, e2 = (sources.shapes[hosts, p] for p in range(5))
    dy, dx = positions[:, :1] - y, positions[:, 1:] - x
    shear = np.hypot(e1, e2)
    ratio = np.where(shear > 1e-4, np.sinh(shear) / np.maximum(shear, 1e-4), 1.0)
    # Squared distance in half-light radii, measured along the ellipse.
    square = ((dy**2 + dx**2) * np.cosh(shear) - (e1 * (dx**2 - dy**2) + 2 * e2 * dx * dy) * ratio) / np.exp(2 * ln_r)
    inside = (square < config.clump_radius**2) & (snr[:, None] < config.clump_share * engine.snr[hosts])
    nearest = hosts[np.where(inside, square, np.inf).argmin(axis=1)]
    return np.where(inside.any(axis=1), nearest, -1)


def _evidence(sources: Sources) -> DoubleArray:
    """Smallest rise of the penalised loss to any simpler kind than the chosen one."""
    simpler = np.arange(N_KINDS) < sources.kinds[:, None]
    return np.asarray(np.fmin.reduce(np.where(simpler, sources.evidence, np.nan), axis=1))


def _fit_bright_first(engine: _Engine, bright: NDArray[np.bool_]) -> None:
    """Fit bright sources while those that they outshine have no light yet, then with their fluxes."""
    faint = ~bright & (engine.snr.max() > engine.config.brightness_ratio * np.maximum(engine.snr, 5.0))
    engine.draw(np.flatnonzero(faint), 1.0)
    engine.sources.fluxes[faint] = 0.0
    joined = np.logical_or.reduceat(bright[engine.members], engine.offsets[:-1])
    first = np.zeros(len(bright), dtype=bool)
    first[engine.members] = np.repeat(joined, np.diff(engine.offsets))
    first &= ~faint
    # What the bright ones are is settled first: their neighbours would take up what a wrong profile leaves. Likewise
    # those that the brightest outshines stay small at first: of a large galaxy they would take its disc, and keep it.
    outshone = OUTSHONE * engine.snr < engine.snr.max()
    if (first & outshone).any() and engine.config.largest_radius > 0:
        engine.small = outshone
        engine.sources.high[outshone, 2] = np.log(engine.config.largest_radius)
        engine.sweep(8, first & ~outshone, update=True)
        engine.sweep(5, first & ~outshone, engine.candidates(~first | outshone))
        engine.small = np.zeros_like(outshone)
        engine.update()
    engine.sweep(8, first, update=True)
    engine.sweep(5, first, engine.candidates(), update=True)
    engine.soften()
    engine.sweep(0, ~first)
    engine.sweep(4, bright)
    engine.sweep(0, ~bright, update=True)
    engine.soften()


def scene_of_fit(fit: ProfileFit, peaks: IndexArray, box: Box, unit: float, sigma: float) -> Scene:
    """Describe the sources of a fit, the listed ones first.

    Parameters
    ----------
    fit : ProfileFit
    peaks : ndarray, shape (S, 2)
        Peaks in pixels of the blend.
    box : Box
        The blend, as array index of the coadd.
    unit : float
        Unit of the fluxes of the fit.
    sigma : float
        Width of the PSF of the model frame [pixels].
    """
    shapes, kinds = fit.sources.shapes, fit.sources.kinds.tolist()
    centers, stamps = shapes[:, :2] + box.origin, (fit.sources.stamps[:, :3] + [0, box.y0, box.x0]).tolist()
    of_sources = (fit.sources.fluxes * unit).astype(np.float32)
    clumps = _clump_components(fit.clumps, box, unit, sigma)
    sources = []
    found = np.floor(shapes[fit.n_listed :, :2] + 0.5).astype(np.int64)
    for s, (y, x) in enumerate(np.concatenate([peaks, found]).tolist()):
        k, top, left = stamps[s]
        side = int(SIDES[k])
        kind, shape, spectra = kinds[s], shapes[s], of_sources[s]
        own: dict[str, Any] = {"center": centers[s], "sigma": sigma, "box": Box(top, left, side, side)}
        components = [
            ProfileComponent(
                spectrum=spectra[0],
                radius=0.0 if kind == POINT else float(np.exp(shape[2])),
                shear=np.zeros(2) if kind == POINT else shape[3:5].copy(),
                index=float(np.exp(shape[5])) if kind == SERSIC else 1.0,
                **own,
            )
        ]
        if kind == DOUBLE:
            components.append(
                ProfileComponent(
                    spectrum=spectra[1],
                    radius=float(np.exp(shape[6])),
                    shear=shape[7:9].copy(),
                    index=float(np.exp(shape[9])),
                    **own,
                )
            )
        components += clumps.get(s, [])
        sources.append(Source(peak=(y + box.y0, x + box.x0), components=tuple(components)))
    return Scene(sources=tuple(sources), box=box)


def _clump_components(clumps: Clumps, box: Box, unit: float, sigma: float) -> dict[int, list[ProfileComponent]]:
    """Describe the clumps of each source that has any, see `scene_of_fit`."""
    components: dict[int, list[ProfileComponent]] = {}
    spectra = (clumps.fluxes * unit).astype(np.float32)
    for owner, center, spectrum, (k, top, left, _) in zip(
        clumps.owners.tolist(), clumps.centers + box.origin, spectra, clumps.stamps.tolist(), strict=True
    ):
        side = int(SIDES[k])
        components.setdefault(owner, []).append(
            ProfileComponent(
                spectrum=spectrum,
                center=center,
                radius=0.0,
                shear=np.zeros(2),
                index=1.0,
                sigma=sigma,
                box=Box(top + box.y0, left + box.x0, side, side),
            )
        )
    return components
