"""Settings: frozen dataclasses inside, TOML at the edge."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from kermes.errors import ConfigError, FileError

Scheme = Literal["amsgrad", "adam", "nadam", "padam", "adamx", "radam", "fista"]
Weighting = Literal["angle", "flat", "nearest"]
Edges = Literal["ramp", "clip", "patch"]
StrayRule = Literal["trim", "r-to-peak", "r-to-footprint", "nearest-footprint"]
StrayToPoints = Literal["never", "necessary", "always"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _make_floats(settings: Any) -> None:
    """Make floats of whole numbers given for what may be a fraction: kernels would be compiled anew for them."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.type == "float" and isinstance(value, int | np.number):
            object.__setattr__(settings, setting.name, float(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    """How footprints and peaks are found when none are given."""

    method: Literal["psf", "wavelet"] = "psf"
    """What is looked for: "psf": what is like a point source, and stands out of its surroundings; "wavelet": what
    stands out of the noise in starlet planes, structure of any width from that of the PSF to eight times as wide."""

    threshold: float = 5.0
    """A pixel of the smoothed detection image above this many sigma belongs to a footprint."""

    peak_threshold: float = 5.0
    """A local maximum counts as a peak above this many sigma."""

    min_separation: float = 4.0
    """Of two peaks closer than this [pixels], the brighter one is kept."""

    min_area: int = 4
    """Footprints with fewer pixels are dropped."""

    grow: int = 3
    """Footprints are grown by this many pixels, to hold the wings."""

    background: int = 0
    """Mesh [pixels] of a local background that is taken off the images in which footprints and peaks are looked for,
    but not off those that are fitted; 0: none. Needs photutils."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(self.method in ("psf", "wavelet"), f"detection.method must be 'psf' or 'wavelet', got {self.method!r}")
        _check(self.threshold > 0, f"detection.threshold must be positive, got {self.threshold}")
        _check(self.peak_threshold > 0, f"detection.peak_threshold must be positive, got {self.peak_threshold}")
        _check(self.min_separation >= 0, f"detection.min_separation must be >= 0, got {self.min_separation}")
        _check(self.min_area >= 1, f"detection.min_area must be >= 1, got {self.min_area}")
        _check(self.grow >= 0, f"detection.grow must be >= 0, got {self.grow}")
        _check(
            self.background == 0 or self.background >= 8,
            f"detection.background must be 0 or at least 8, got {self.background}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionConfig:
    """How large parents are divided into blends."""

    largest_side: int = 256
    """A blend whose peaks lie farther apart than this along an axis [pixels] is divided; 0: none is."""

    most_sources: int = 1000
    """So is one with more sources."""

    coupling: float = 0.3
    """Neighbours on the other side of a cut are fitted along where a flux would else be wrong by more than this many
    standard deviations,"""

    farthest: float = 32.0
    """and are closer than this [pixels]."""

    bright_snr: float = 3000.0
    """Blends with a source above this signal-to-noise are fitted first, above ten times as much before all, and their
    light is held fixed wherever it falls into other blends. 0: all blends are fitted on their own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(
            self.largest_side == 0 or self.largest_side >= 32,
            f"partition.largest_side must be 0 or at least 32, got {self.largest_side}",
        )
        _check(self.most_sources >= 2, f"partition.most_sources must be >= 2, got {self.most_sources}")
        for name in ("coupling", "farthest"):
            _check(getattr(self, name) > 0, f"partition.{name} must be positive, got {getattr(self, name)}")
        _check(self.bright_snr >= 0, f"partition.bright_snr must be >= 0, got {self.bright_snr}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """What the fit of one blend may cost; what is predicted to cost more gets a simpler model."""

    operations: float = 1e12
    """Most predicted floating-point operations of one blend."""

    memory: float = 1.0
    """Most predicted memory of one blend [GB]."""

    total_memory: float = 1.5
    """Most predicted memory of all blends in work at the same time, with what waits for a slower one [GB]; there may be
    fewer of them than workers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        for name in ("operations", "memory", "total_memory"):
            _check(getattr(self, name) > 0, f"budget.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InitializationConfig:
    """How the first model of each source is made."""

    detection_image: Literal["deconvolved", "chi2", "wavelet"] = "deconvolved"
    """Image the first shapes are cut from: all bands deconvolved to the model PSF, their plain chi2 sum, or what stands
    out of the noise in its wavelet planes, the fine and the coarse ones apart for two components."""

    threshold: float = 1.0
    """First shapes end where the detection image falls below this many sigma (wavelet planes: always below 3)."""

    min_snr: float = 25.0
    """Sources above twice this signal-to-noise get two components."""

    max_components: int = 2
    """At most this many components per source; 0: every source is a point source."""

    disk_percentile: float = 25.0
    """Two components split the first shape at this percentage of its peak (but for wavelets)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(
            self.detection_image in ("deconvolved", "chi2", "wavelet"),
            f"initialization.detection_image must be 'deconvolved', 'chi2' or 'wavelet', got {self.detection_image!r}",
        )
        _check(self.threshold >= 0, f"initialization.threshold must be >= 0, got {self.threshold}")
        _check(self.min_snr > 0, f"initialization.min_snr must be positive, got {self.min_snr}")
        _check(
            self.max_components in (0, 1, 2),
            f"initialization.max_components must be 0, 1 or 2, got {self.max_components}",
        )
        _check(
            0 < self.disk_percentile < 100,
            f"initialization.disk_percentile must lie between 0 and 100, got {self.disk_percentile}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How the sources of one blend are fitted."""

    max_iterations: int = 100
    """Give up after this many iterations."""

    exact_every: int = 4
    """The model is compared with the pixels each time after this many iterations; in between its gradient is carried on
    as if all pixels of a band had the same weight. 1: always."""

    patience: int = 8
    """The fit has converged when over so many iterations the loss has fallen by less than `tolerance`."""

    tolerance: float = 1e-2
    """Smallest fall of the loss that counts, relative to itself or to what noise alone leaves if that is more."""

    spectrum_step: float = 1e-2
    """Step of the spectra, relative to their mean over the bands."""

    morphology_step: float = 1e-2
    """Step of the morphologies, relative to their peak."""

    background_threshold: float = 0.5
    """A pixel of a morphology fainter than this many sigma in every band is set to zero."""

    resize_every: int = 4
    """The boxes follow the morphologies each time after this many iterations; 0: they stay."""

    monotonic: bool = True
    """Whether morphologies fall monotonically from their centre."""

    symmetric: bool = False
    """Whether morphologies are symmetric about their centre: of a pixel and its mirror the smaller one counts."""

    scheme: Scheme = "amsgrad"
    """How steps follow from gradients: six schemes of AdaProx, or FISTA. The steps of padam grow with the signal."""

    monotonic_weighting: Weighting = "angle"
    """Which of its neighbours closer to the centre a pixel must not exceed: their mean weighted by direction, their
    plain mean, or the one towards the centre alone."""

    min_gradient: float = 0.0
    """Share by which monotonic morphologies fall at least from one pixel to the next."""

    symmetry_strength: float = 0.0
    """How far each step pulls a morphology to the mean of itself and its mirror image, 0 to 1; instead of
    `symmetric`."""

    connected: bool = False
    """Whether pixels of a morphology that no path of light joins to its centre are set to zero."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(self.max_iterations >= 0, f"fit.max_iterations must be >= 0, got {self.max_iterations}")
        _check(self.exact_every >= 1, f"fit.exact_every must be >= 1, got {self.exact_every}")
        _check(self.patience >= 1, f"fit.patience must be >= 1, got {self.patience}")
        _check(0 < self.tolerance < 1, f"fit.tolerance must lie between 0 and 1, got {self.tolerance}")
        _check(self.spectrum_step > 0, f"fit.spectrum_step must be positive, got {self.spectrum_step}")
        _check(self.morphology_step > 0, f"fit.morphology_step must be positive, got {self.morphology_step}")
        _check(
            self.background_threshold >= 0, f"fit.background_threshold must be >= 0, got {self.background_threshold}"
        )
        _check(self.resize_every >= 0, f"fit.resize_every must be >= 0, got {self.resize_every}")
        schemes, weightings = get_args(Scheme), get_args(Weighting)
        _check(self.scheme in schemes, f"fit.scheme must be one of {', '.join(schemes)}, got {self.scheme!r}")
        _check(
            self.monotonic_weighting in weightings,
            f"fit.monotonic_weighting must be one of {', '.join(weightings)}, got {self.monotonic_weighting!r}",
        )
        _check(
            self.patience > 4 or self.scheme != "radam",
            f"fit.patience must be > 4 with fit.scheme 'radam', which rests at first, got {self.patience}",
        )
        _check(0 <= self.min_gradient < 1, f"fit.min_gradient must be >= 0 and below 1, got {self.min_gradient}")
        _check(
            0 <= self.symmetry_strength <= 1,
            f"fit.symmetry_strength must lie between 0 and 1, got {self.symmetry_strength}",
        )
        _check(
            not (self.symmetric and self.symmetry_strength > 0),
            f"fit.symmetry_strength must be 0 when fit.symmetric is true, got {self.symmetry_strength}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """How point sources and galaxy profiles are fitted. A prior of width 0 is switched off."""

    link: float = 13.0
    """Neighbours closer than this [pixels] are fitted jointly."""

    largest_group: int = 5
    """Most sources that are fitted jointly; between groups the fit goes back and forth."""

    steps: int = 3
    """Most Levenberg-Marquardt steps per visit to a group."""

    max_sweeps: int = 2
    """Give up after this many last sweeps over all groups that are not settled."""

    tolerance: float = 0.03
    """A visit ends when a step lowers half the chi2 by less than this."""

    radius: float = 1.4
    """Half-light radius that galaxies are expected to have [pixels]."""

    radius_width: float = 0.35
    """Width of the prior on the logarithm of the half-light radius."""

    shear_width: float = 0.25
    """Width of the prior on each component of the log-shear e; an axis ratio is exp(-e)."""

    center_width: float = 0.4
    """Width of the prior on each coordinate of the centre, about the peak [pixels]."""

    center_box: float = 1.5
    """Farthest that a centre may be from its peak along each axis [pixels]."""

    index_width: float = 0.35
    """Width of the prior on the logarithm of Sersic indices, about 1 and about `bulge_index`."""

    bulge_index: float = 3.0
    """Sersic index that bulges are expected to have."""

    largest_radius: float = 4.0
    """Largest half-light radius at a signal-to-noise of 10 [pixels]; it grows with its power 0.3. 0: no limit."""

    sersic_snr: float = 30.0
    """A free Sersic index is tried above this signal-to-noise."""

    double_snr: float = 100.0
    """A disc with a bulge is tried above this signal-to-noise."""

    extended_penalty: float = 1.5
    """How much half the chi2, priors included, must fall for a source not to be a point."""

    sersic_penalty: float = 2.0
    """The same for a free Sersic index."""

    double_penalty: float = 12.0
    """The same for a disc with a bulge."""

    average_kinds: bool = True
    """Whether a source that may be a point or a galaxy gets the mean flux of both, as likely as each is. Its shape is
    that of the likelier one."""

    bright_snr: float = 300.0
    """Sources above this signal-to-noise are fitted first."""

    brightness_ratio: float = 40.0
    """Sources whose signal-to-noise differs by more are not fitted jointly but in turn."""

    residual_rounds: int = 2
    """How many times sources that nobody listed are looked for in what is left of the data; 0: never."""

    residual_snr: float = 4.5
    """Such a source stands out by at least this signal-to-noise,"""

    residual_share: float = 0.05
    """and this share of that of the model there,"""

    residual_distance: float = 2.5
    """and is farther than this from every other source [pixels]."""

    clump_radius: float = 4.0
    """What stands out within this many half-light radii of a galaxy is taken for a part of it, a clump,"""

    clump_share: float = 0.25
    """if its signal-to-noise is below this share of the galaxy's."""

    crowded_sources: int = 30
    """A blend of at least so many sources may be a crowded field of stars, where all are points at first;"""

    crowded_areas: float = 5.0
    """it is if there are fewer pixels per source than this many areas of the PSF."""

    model_error: float = 0.02
    """Error of the model of a bright source relative to it, as its neighbours see it."""

    heed_structure: bool = True
    """Whether that of a galaxy is larger where residuals say that it is not as smooth as a profile."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        for name in ("link", "radius", "bulge_index", "center_box", "tolerance", "brightness_ratio"):
            _check(getattr(self, name) > 0, f"profiles.{name} must be positive, got {getattr(self, name)}")
        for name in (
            "radius_width",
            "shear_width",
            "center_width",
            "index_width",
            "largest_radius",
            "sersic_snr",
            "double_snr",
            "extended_penalty",
            "sersic_penalty",
            "double_penalty",
            "bright_snr",
            "model_error",
            "residual_rounds",
            "residual_snr",
            "residual_share",
            "residual_distance",
            "clump_radius",
            "crowded_sources",
            "crowded_areas",
            "clump_share",
        ):
            _check(getattr(self, name) >= 0, f"profiles.{name} must be >= 0, got {getattr(self, name)}")
        _check(
            1 <= self.largest_group <= 12, f"profiles.largest_group must lie between 1 and 12, got {self.largest_group}"
        )
        _check(self.steps >= 1, f"profiles.steps must be >= 1, got {self.steps}")
        _check(self.max_sweeps >= 1, f"profiles.max_sweeps must be >= 1, got {self.max_sweeps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatesConfig:
    """How the single-band deblender makes templates and shares the light among them. A limit of 0 is none."""

    image: str = "each"
    """Image that templates are made from: "each" band for itself, or one for all bands: "all" of them, added up by
    their noise, or the name of a band."""

    find_points: bool = True
    """Whether peaks that the PSF fits have it for a template."""

    point_chi2: float = 1.5
    """Largest chi2 per degree of freedom of a point source at its peak,"""

    point_chi2_derivatives: float = 1.5
    """when the derivatives of the PSF are fitted along,"""

    point_chi2_moved: float = 1.5
    """and when it is moved to where they say."""

    point_moves: int = 3
    """Most times that it is moved. After the first one it need not be a point for the derivatives of the PSF, which do
    not reach far for a bright star."""

    tiny_footprint: int = 2
    """Footprints that leave a stamp of at most so many pixels on a side are not fitted."""

    unbiased: bool = True
    """Whether the smaller one of two mirrored pixels is corrected for its noise, which makes it too small."""

    edges: Edges = "ramp"
    """Templates that are bright at the edge of the footprint: "ramp" continues them, on the image, or on the PSF where
    there is none; "clip" cuts them; "patch" takes pixels without a mirror as they are at the edge of the image."""

    median_half: int = 2
    """Templates are smoothed by a median of so many pixels to each side; 0: they are not."""

    monotonic: bool = True
    """Whether templates fall from the peak outwards."""

    weight: bool = False
    """Whether templates are multiplied by what a joint fit to the image says."""

    drop_similar: bool = False
    """Whether of two templates that are alike one is left out."""

    largest_similarity: float = 0.5
    """Those are alike whose normalised product is larger than this."""

    stray: StrayRule = "trim"
    """What becomes of positive pixels of the footprint that no template reaches: "trim" gives them to nobody; others
    share them by 1 / (1 + d^2) of the distance to peaks or to templates, or give each to the nearest template."""

    stray_to_points: StrayToPoints = "necessary"
    """When point sources get a part of them: "necessary": if there is no other source."""

    stray_clip: float = 0.001
    """Smaller shares of a pixel are left out."""

    scale_variance: bool = True
    """Whether the variance of a pixel of a child is that of its share; false: that of the pixel."""

    most_peaks: int = 0
    """Of a footprint, the brightest so many peaks get templates, and all others are points at their peaks."""

    largest_area: int = 0
    """Footprints with more pixels are not shared among templates: their sources are points at their peaks;"""

    largest_side: int = 0
    """so are those with a longer side [pixels],"""

    least_axis_ratio: float = 0.0
    """longer ones, minor over major axis,"""

    most_masked: float = 1.0
    """and those with a larger share of invalid pixels."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(bool(self.image), "templates.image must be 'each', 'all' or the name of a band, got an empty name")
        for name in ("point_chi2", "point_chi2_derivatives", "point_chi2_moved"):
            _check(getattr(self, name) > 0, f"templates.{name} must be positive, got {getattr(self, name)}")
        for name in (
            "point_moves",
            "tiny_footprint",
            "median_half",
            "largest_similarity",
            "stray_clip",
            "most_peaks",
            "largest_area",
            "largest_side",
            "least_axis_ratio",
            "most_masked",
        ):
            _check(getattr(self, name) >= 0, f"templates.{name} must be >= 0, got {getattr(self, name)}")
        for name, kind in (("edges", Edges), ("stray", StrayRule), ("stray_to_points", StrayToPoints)):
            known = get_args(kind)
            _check(
                getattr(self, name) in known,
                f"templates.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}",
            )
        _check(self.stray_clip < 1, f"templates.stray_clip must be below 1, got {self.stray_clip}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeFormConfig:
    """When and how free shapes are laid over profiles that do not suffice."""

    min_snr: float = 20.0
    """Sources below this signal-to-noise, all bands together, keep their profile as it is."""

    point_snr: float = 300.0
    """The same for point sources, of which only the PSF can be wrong."""

    significance: float = -2.0
    """How much more of the chi2 a correction must explain at first sight than noise would, in units of the root of the
    number of parameters that the data determine. Where profiles suffice it is -5, and rarely above -3: they have been
    fitted to the noise, too."""

    strength: float = 2.0
    """Expected difference between a free shape and its profile, pixel by pixel, relative to it; 0: profiles alone."""

    floor: float = 0.1
    """Where a profile of the model frame is fainter than this many sigma in all bands, it stays as it is."""

    tolerance: float = 0.2
    """The fit ends when a step promises less than this part of what noise alone would promise at first sight."""

    max_iterations: int = 20
    """Most steps of the fit."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        for name in ("min_snr", "point_snr", "strength", "tolerance"):
            _check(getattr(self, name) >= 0, f"free_form.{name} must be >= 0, got {getattr(self, name)}")
        _check(self.floor > 0, f"free_form.floor must be positive, got {self.floor}")
        _check(self.max_iterations >= 1, f"free_form.max_iterations must be >= 1, got {self.max_iterations}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one run; the defaults work."""

    model: Literal["kermes", "scarlet-lite", "templates"] = "kermes"
    """What a source is modelled as: points and galaxy profiles fitted jointly, the free shapes of scarlet lite, or the
    symmetric templates of the single-band deblender."""

    add_sources: bool = False
    """Whether what the model "kermes" finds in the residuals becomes objects too, after the listed ones, in a second
    run; else it is reported in the table of candidates."""

    model_psf_sigma: float = 0.8
    """Width of the Gaussian PSF of the model frame [pixels]; must be narrower than every observed PSF. 0: the widest
    up to 0.8 that all observed PSFs permit, at least 0.5."""

    kernel_regularization: float = 0.0
    """Floor on the power of the model PSF, relative to its largest, where observed PSFs are divided by it; 0: none.
    1e-4 tames the noise of measured PSFs."""

    correlated_noise: bool = True
    """Whether it is measured how much more noise sums over the PSF have than independent pixels, where no footprints
    are given, and fits and errors heed it; false: noise is independent, unless `Coadd.noise_factors` is given."""

    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Used when no peaks or footprints are given."""

    partition: PartitionConfig = field(default_factory=PartitionConfig)
    """Which sources are fitted together."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What a blend may cost."""

    profiles: ProfileConfig = field(default_factory=ProfileConfig)
    """Fit of one blend with the model "kermes"."""

    free_form: FreeFormConfig = field(default_factory=FreeFormConfig)
    """Free shapes over profiles with the model "kermes"."""

    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    """First model of each source with the model "scarlet-lite"."""

    fit: FitConfig = field(default_factory=FitConfig)
    """Fit of one blend with the model "scarlet-lite"."""

    templates: TemplatesConfig = field(default_factory=TemplatesConfig)
    """How the model "templates" shares the light of a footprint; other models where they do not work."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _make_floats(self)
        _check(
            self.model in ("kermes", "scarlet-lite", "templates"),
            f"model must be 'kermes', 'scarlet-lite' or 'templates', got {self.model!r}",
        )
        _check(
            self.model_psf_sigma == 0 or 0.5 <= self.model_psf_sigma <= 10,
            f"model_psf_sigma must be 0 or lie between 0.5 and 10 pixels, got {self.model_psf_sigma}",
        )
        _check(
            0 <= self.kernel_regularization < 1,
            f"kernel_regularization must be >= 0 and below 1, got {self.kernel_regularization}",
        )


def _merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value


@lru_cache(maxsize=1)
def _adapter() -> Any:
    """Checker of settings, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def config_from_dict(settings: Mapping[str, Any], origin: str = "config") -> Config:
    """Make a Config from nested dictionaries; `origin` is what messages call them.

    Raises
    ------
    ConfigError
        Naming every unknown key and every value of a wrong type or range.
    """
    from pydantic import ValidationError

    try:
        checked: Config = _adapter().validate_python(dict(settings))
        return checked
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
            + (f", got {problem['input']!r}" if not isinstance(problem["input"], dict) else "")
            for problem in error.errors()
        )
        raise ConfigError(f"{origin} is not a valid configuration: {problems}") from None


def load_config(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read settings from a TOML file.

    Parameters
    ----------
    path : path, optional
        None: start from the defaults.
    overrides : iterable of str, optional
        TOML assignments such as ``"fit.tolerance=1e-3"``; they win over the file. A value that is
        not TOML is taken as a string, so that ``"model=scarlet-lite"`` works.

    Raises
    ------
    FileError
        If the file cannot be read.
    ConfigError
        If it is not TOML, or holds unknown keys or wrong values.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise FileError(f"config must be a readable TOML file, got {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config must be TOML, got {path}: {error}") from None
    return _changed(settings, overrides, origin="config" if path is None else str(path))


def changed_config(config: Config, overrides: Iterable[str]) -> Config:
    """Change some settings, by TOML assignments as in `load_config`; errors likewise."""
    return _changed(tomllib.loads(to_toml(config)), overrides, origin="config")


def _changed(settings: dict[str, Any], overrides: Iterable[str], origin: str) -> Config:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"set must have the form key=value, got {override!r}")
        try:
            change = tomllib.loads(override)
        except tomllib.TOMLDecodeError:
            try:
                change = tomllib.loads(f"{key} = '''{value.strip()}'''")
            except tomllib.TOMLDecodeError:
                raise ConfigError(f"set must have the form key=value, got {override!r}") from None
        _merge(settings, change)
    return config_from_dict(settings, origin=origin)


def to_toml(config: Config) -> str:
    """Write all settings as TOML, in the order of the dataclasses."""

    def lines(value: Any, prefix: str) -> list[str]:
        plain, tables = [], []
        for item in dataclasses.fields(value):
            content = getattr(value, item.name)
            if dataclasses.is_dataclass(content):
                name = f"{prefix}{item.name}"
                tables += ["", f"[{name}]", *lines(content, f"{name}.")]
            else:
                text = str(content).lower() if isinstance(content, bool) else repr(content).replace("'", '"')
                plain.append(f"{item.name} = {text}")
        return plain + tables

    return "\n".join(lines(config, "")) + "\n"


def field_docstrings(settings: Any, prefix: str = "") -> dict[str, str]:
    """Find the docstring under each field of nested dataclasses, by dotted name."""
    definition = ast.parse(inspect.getsource(type(settings))).body[0]
    assert isinstance(definition, ast.ClassDef)
    meanings: dict[str, str] = {}
    for line, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr):
            meanings[prefix + line.target.id] = inspect.cleandoc(str(ast.literal_eval(text.value)))
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            meanings |= field_docstrings(value, f"{prefix}{item.name}.")
    return meanings
