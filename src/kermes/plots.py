"""Pictures of scenes and results, made without pyplot: safe in threads and without a display."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import imsave
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from kermes.catalog import outcome_color
from kermes.coadd import wavelength_order
from kermes.errors import InputError, ShapeError
from kermes.geometry import Box
from kermes.kernels import pictures as kernels

if TYPE_CHECKING:
    from kermes.coadd import Coadd
    from kermes.result import ObjectHandle, Result

FloatArray = NDArray[np.float64]
ImageArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]
RgbArray = NDArray[np.uint8]

UNKNOWN_GREY = 128
"""Grey of pixels that are valid in no band."""

RESIDUAL_RANGE = 5.0
"""Residual that has the deepest colour [sigma]."""

_BLACK = -1.0  # sigma; a little below the sky, so that its noise is seen
_SOFTENING = 3.0  # sigma; brightness is linear below and logarithmic above
_LEAST_WHITE = 30.0  # sigma; what is drawn white at least, so that noise alone stays dark
_BRIGHT = 5.0  # sigma; brighter pixels decide on the balance of colours
_MAX_GAIN = 4.0
_MOST_SAMPLED = 1_000_000  # pixels that the scale of a large image is found from
_ABOVE_NOISE = 3.0  # sigma, all bands together
_WIDTH = 12.0  # inches
_STRIP_HEIGHT = 2.1  # inches
_MAX_NUMBERS = 150  # with more peaks the numbers would hide the image


# ---------------------------------------------------------------- colour


def _channel_weights(bands: Sequence[str]) -> FloatArray:
    """Share of each band in red, green and blue, shape (3, B); each channel sums to one."""
    order = wavelength_order(bands)
    place = np.empty(len(bands))
    place[order] = np.linspace(2.0, 0.0, len(bands)) if len(bands) > 1 else 1.0
    weights = np.maximum(1.0 - np.abs(np.arange(3)[:, None] - place), 0.0)
    # One band is grey; between two bands, green is both.
    weights[weights.sum(axis=1) == 0] = 1.0
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColourScale:
    """How flux becomes colour; pictures that are to be compared share one."""

    noise: FloatArray
    """Noise per pixel of each band [unit of the images], shape (B,)."""

    gains: FloatArray
    """Factors of red, green and blue, shape (3,), that make the typical source white."""

    white: float
    """Brightness that is drawn white, in units of the noise."""


def _noise(images: ImageArray, valid: BoolArray) -> FloatArray:
    """Noise of each band (B,) from the scatter of its pixels about their median; 1 where that fails."""
    noise = np.ones(len(images))
    for b, (image, good) in enumerate(zip(images, valid, strict=True)):
        if good.any():
            scatter = 1.4826 * float(np.median(np.abs(image[good] - np.median(image[good]))))
            noise[b] = scatter if scatter > 0 else 1.0
    return noise


def _channels(images: ImageArray, bands: Sequence[str], noise: FloatArray, valid: BoolArray) -> ImageArray:
    """Red, green and blue in units of the noise, shape (3, H, W); NaN where no band is valid."""
    channels = np.empty((3, *images.shape[1:]), dtype=np.float32)
    kernels.mix_channels(images.astype(np.float32), valid, noise, _channel_weights(bands), channels)
    return channels


def _checked(images: ArrayLike, bands: Sequence[str], valid: ArrayLike | None) -> tuple[ImageArray, BoolArray]:
    """Images as an array, and where they can be drawn."""
    array = np.asarray(images)
    if array.ndim != 3 or len(array) != len(bands):
        raise ShapeError(
            f"images must have shape (bands, height, width) with {len(bands)} for bands {tuple(bands)}, "
            f"got {array.shape}"
        )
    good = np.isfinite(array)
    if valid is not None:
        try:
            good &= np.broadcast_to(np.asarray(valid, dtype=bool), array.shape)
        except ValueError:
            raise ShapeError(f"valid must have the shape of images {array.shape}, got {np.shape(valid)}") from None
    return array, good


def colour_scale(
    images: ArrayLike, bands: Sequence[str], *, noise: ArrayLike | None = None, valid: ArrayLike | None = None
) -> ColourScale:
    """Find a scale that shows both the noise and the brightest pixels, and makes the typical source white.

    Parameters
    ----------
    images : array_like, shape (B, H, W)
        Flux per pixel, sky subtracted.
    bands : sequence of str
        Names of the bands.
    noise : array_like, shape (B,), optional
        Noise per pixel [unit of the images]. None: from the scatter of the pixels.
    valid : array_like, shape (B, H, W) or (H, W), optional
        False where a pixel is not to be used, as are all that are not finite.

    Returns
    -------
    scale : ColourScale

    Raises
    ------
    ShapeError
        If the arrays do not fit together.
    """
    array, good = _checked(images, bands, valid)
    sigma = _noise(array, good) if noise is None else np.asarray(noise, dtype=np.float64)
    if sigma.shape != (len(bands),):
        raise ShapeError(
            f"noise must have one value per band: {len(bands)} for bands {tuple(bands)}, got {sigma.shape}"
        )
    channels = _channels(array, bands, sigma, good)
    pixels = channels[:, np.isfinite(channels).all(axis=0)].T
    brightness = pixels.mean(axis=1)
    bright = brightness > _BRIGHT
    if not bright.any():
        return ColourScale(noise=sigma, gains=np.ones(3), white=_LEAST_WHITE)
    # Bounded, so that one odd source does not turn the noise of a channel into its colour.
    share = np.median(pixels[bright] / brightness[bright, None], axis=0)
    gains = np.clip(1.0 / np.maximum(share, 1e-6), 1.0 / _MAX_GAIN, _MAX_GAIN)
    white = float(np.quantile((pixels * gains).mean(axis=1), 0.999))
    return ColourScale(noise=sigma, gains=gains, white=max(white, _LEAST_WHITE))


def lupton_rgb(
    images: ArrayLike, bands: Sequence[str], *, scale: ColourScale | None = None, valid: ArrayLike | None = None
) -> RgbArray:
    """Combine bands to one colour image in which faint things are seen and bright ones keep their colour.

    Follows Lupton et al. (2004). Bands are spread over blue, green and red in the order of wavelength, or in the order
    given if a name is not known; one band is grey.

    Parameters
    ----------
    images : array_like, shape (B, H, W)
        Flux per pixel, sky subtracted.
    bands : sequence of str
        Names of the bands.
    scale : ColourScale, optional
        None: what suits these images.
    valid : array_like, shape (B, H, W) or (H, W), optional
        False where a pixel is not to be drawn, as are all that are not finite. A pixel that is valid in some bands is
        drawn from those.

    Returns
    -------
    rgb : ndarray, shape (H, W, 3), uint8
        Mid grey where no band is valid.

    Raises
    ------
    ShapeError
        If the arrays do not fit together.
    """
    array, good = _checked(images, bands, valid)
    scale = colour_scale(array, bands, valid=good) if scale is None else scale
    channels = _channels(array, bands, scale.noise, good)
    rgb = np.empty((*array.shape[1:], 3), dtype=np.uint8)
    kernels.stretch(channels, scale.gains, _BLACK, _SOFTENING, scale.white, np.uint8(UNKNOWN_GREY), rgb)
    return rgb


def _typical_noise(variance: ImageArray, valid: BoolArray) -> FloatArray:
    """Median noise of each band (B,); 1 for a band without a valid pixel."""
    noise = np.ones(len(variance))
    for b, good in enumerate(valid):
        if good.any():
            noise[b] = np.sqrt(np.median(variance[b][good]))
    return noise


def _significance(image: ImageArray, model: ImageArray, variance: ImageArray, valid: BoolArray) -> ImageArray:
    """Residual / sigma summed over the valid bands, in units of its own noise, shape (H, W); NaN without one."""
    total = np.zeros(image.shape[1:], dtype=np.float32)
    for observed, modelled, spread, good in zip(image, model, variance, valid, strict=True):
        total[good] += (observed[good] - modelled[good]) / np.sqrt(spread[good])
    n_valid = valid.sum(axis=0)
    result: ImageArray = np.divide(total, np.sqrt(n_valid), out=np.full_like(total, np.nan), where=n_valid > 0)
    return result


# ---------------------------------------------------------------- panels


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """Make the content of a PNG file of a figure."""
    file = BytesIO()
    # Packed less tightly than by default: a fifth larger, in two thirds of the time.
    figure.savefig(file, format="png", dpi=dpi, pil_kwargs={"compress_level": 3})
    return file.getvalue()


def _margins(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float, space: tuple[float, float]
) -> dict[str, float]:
    """Margins [inches] of panels on `width` x `height` inches, as a GridSpec wants them.

    Fixed, because finding them from the texts would take as long as drawing. `space` is what lies between panels, in
    units of their width and height.
    """
    return {
        "left": left / width,
        "right": 1.0 - right / width,
        "bottom": bottom / height,
        "top": 1.0 - top / height,
        "wspace": space[0],
        "hspace": space[1],
    }


def _scene_height(shape: Sequence[int], n_panels: int = 4) -> float:
    """Height of a figure in which image, models and residual fill the width [inches]."""
    return float(np.clip(9.9 / n_panels * shape[0] / shape[1] + 0.9, 2.2, 10.0))


def _extent(box: Box) -> tuple[float, float, float, float]:
    """Edges of the pixels of a box, as imshow wants them."""
    return box.x0 - 0.5, box.x1 - 0.5, box.y0 - 0.5, box.y1 - 0.5


def _mark(axes: Axes, peaks: FloatArray, names: Sequence[Any], colours: Sequence[str]) -> None:
    """Mark and number peaks (N, 2) without changing the limits of the axes."""
    if not len(peaks):
        return
    axes.autoscale(False)
    size = 16 if len(peaks) <= _MAX_NUMBERS else 4
    axes.scatter(peaks[:, 1], peaks[:, 0], s=size, marker="+", linewidths=0.7, c=list(colours))
    if len(peaks) <= _MAX_NUMBERS:
        for (y, x), name, colour in zip(peaks, names, colours, strict=True):
            axes.annotate(
                str(name),
                (x, y),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=6,
                color=colour,
                clip_on=True,
                path_effects=[withStroke(linewidth=1.2, foreground="black")],
            )


def _draw_scene(
    figure: Figure | SubFigure,
    height: float,
    image: ImageArray,
    model: ImageArray,
    variance: ImageArray,
    valid: BoolArray,
    bands: Sequence[str],
    origin: tuple[int, int],
    peaks: FloatArray,
    names: Sequence[Any],
    colours: Sequence[str],
    scale: ColourScale,
    frame: ImageArray | None = None,
) -> None:
    """Draw image, model frame, model and residual side by side; `height` is that of the figure [inches]."""
    extent = _extent(Box(*origin, *image.shape[1:]))
    margins = _margins(_WIDTH, height, left=0.6, right=1.1, bottom=0.55, top=0.35, space=(0.05, 0.0))
    panels = [*figure.subplots(1, 3 if frame is None else 4, sharex=True, sharey=True, gridspec_kw=margins)]
    panels[0].imshow(lupton_rgb(image, bands, scale=scale, valid=valid), extent=extent, origin="lower")
    _mark(panels[0], peaks, names, colours)
    panels[0].set_title(f"image ({' '.join(bands)})")
    if frame is not None:
        # Sharper, and so brighter: on a scale of its own.
        sharper = replace(scale, white=colour_scale(frame, bands, noise=scale.noise).white)
        panels[1].imshow(lupton_rgb(frame, bands, scale=sharper), extent=extent, origin="lower")
        panels[1].set_title("model")
    panels[-2].imshow(lupton_rgb(model, bands, scale=scale), extent=extent, origin="lower")
    panels[-2].set_title("model" if frame is None else "model as observed")
    residual = panels[-1].imshow(
        np.ma.masked_invalid(_significance(image, model, variance, valid)),
        extent=extent,
        origin="lower",
        cmap="RdBu_r",
        vmin=-RESIDUAL_RANGE,
        vmax=RESIDUAL_RANGE,
    )
    panels[-1].set_facecolor((UNKNOWN_GREY / 255,) * 3)
    panels[-1].set_title("residual")
    bar = panels[-1].inset_axes((1.05, 0.1, 0.05, 0.8))
    figure.colorbar(residual, cax=bar, label="σ, all bands together", extend="both")
    for panel in panels:
        panel.tick_params(labelsize="small")
    panels[0].set_xlabel("x [pixels]")
    panels[0].set_ylabel("y [pixels]")


def show_scene(
    image: ArrayLike,
    model: ArrayLike,
    *,
    variance: ArrayLike,
    bands: Sequence[str],
    valid: ArrayLike | None = None,
    peaks: ArrayLike | None = None,
    origin: tuple[int, int] = (0, 0),
    frame: ArrayLike | None = None,
) -> Figure:
    """Draw an image, its model, and what is left in units of the noise.

    Parameters
    ----------
    image, model : array_like, shape (B, H, W)
        Flux per pixel, the model as observed.
    variance : array_like, shape (B, H, W) or what broadcasts to it
        Variance of the image.
    bands : sequence of str
        Names of the bands.
    valid : array_like, shape (B, H, W) or (H, W), optional
        False where a pixel is not to be drawn, as are all that are not finite or have no positive variance.
    peaks : array_like, shape (N, 2), optional
        Positions (y, x) to mark and to number from 0, in the coordinates of `origin`.
    origin : tuple of int, optional
        Coordinates (y, x) of the first pixel.
    frame : array_like, shape (B, H, W), optional
        The model in the model frame, drawn between image and model on a scale of its own.

    Returns
    -------
    figure : matplotlib.figure.Figure
        The residual is the sum over the bands of residual / sigma, divided by the root of their number: noise has a
        width of 1. Pixels that are valid in no band are grey.

    Raises
    ------
    ShapeError
        If the arrays do not fit together.
    """
    array, good = _checked(image, bands, valid)
    modelled = np.asarray(model, dtype=np.float64)
    if modelled.shape != array.shape:
        raise ShapeError(f"model must have the shape of image {array.shape}, got {modelled.shape}")
    sharp = None if frame is None else np.asarray(frame, dtype=np.float64)
    if sharp is not None and sharp.shape != array.shape:
        raise ShapeError(f"frame must have the shape of image {array.shape}, got {sharp.shape}")
    try:
        spread = np.broadcast_to(np.asarray(variance, dtype=np.float64), array.shape)
    except ValueError:
        raise ShapeError(f"variance must have the shape of image {array.shape}, got {np.shape(variance)}") from None
    good &= np.isfinite(spread) & (spread > 0)
    positions = np.asarray([] if peaks is None else peaks, dtype=np.float64).reshape(-1, 2)
    scale = colour_scale(array, bands, noise=_typical_noise(spread, good), valid=good)
    height = _scene_height(array.shape[1:], 3 if sharp is None else 4)
    figure = _new_figure(_WIDTH, height)
    _draw_scene(
        figure,
        height,
        array,
        modelled,
        spread,
        good,
        bands,
        origin,
        positions,
        range(len(positions)),
        ["white"] * len(positions),
        scale,
        sharp,
    )
    return figure


# ---------------------------------------------------------------- results


def column_values(table: Table, name: str) -> FloatArray:
    """One column as floats, NaN where it is masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(table[name]).astype(np.float64), np.nan))


def _brightest(result: Result, n: int) -> list[int]:
    """Numbers of the `n` objects with the most light, each band in units of its median error."""
    brightness = np.zeros(len(result.objects))
    for band in result.bands:
        flux = column_values(result.objects, f"{band}_flux")
        error = column_values(result.objects, f"{band}_flux_err")
        usable = error[np.isfinite(error) & (error > 0)]
        brightness += np.nan_to_num(flux / np.median(usable) if len(usable) else flux, posinf=0.0, neginf=0.0)
    order = np.argsort(-brightness, kind="stable")[:n]
    return [int(number) for number in np.asarray(result.objects["object_id"])[order]]


def _stamp_image(stamps: Sequence[Any], box: Box) -> FloatArray:
    """Copy stamps of all bands onto `box`, shape (B, h, w), NaN where they do not reach."""
    image = np.full((len(stamps), *box.shape), np.nan)
    for plane, stamp in zip(image, stamps, strict=True):
        plane[stamp.box.within(box)] = stamp.array[box.within(stamp.box)]
    return image


def _close_up(model: FloatArray, box: Box, noise: FloatArray, peak: tuple[float, float]) -> Box:
    """Square around an object, as large as its model is above half the noise, 10 to 60 pixels to each side."""
    y, x = (round(position) for position in peak)
    bright = np.asarray((model > 0.5 * noise[:, None, None]).any(axis=0))
    seen = Box.where(bright).shift(*box.origin)
    reach = 0 if seen.is_empty else max(y - seen.y0, seen.y1 - y, x - seen.x0, seen.x1 - x)
    square = Box(y, x, 1, 1).grow(int(np.clip(reach, 10, 60)))
    return square & box if (y, x) in box else square


def _draw_spectrum(axes: Axes, result: Result, index: int) -> None:
    """Draw the fluxes of one row of the objects, with their errors."""
    objects = result.objects
    bands = [result.bands[b] for b in wavelength_order(result.bands)]
    places = np.arange(len(bands))
    for kind, style in (("flux", "o-"), ("redistributed_flux", "s")):
        if f"{bands[0]}_{kind}" not in objects.colnames:
            continue
        flux = np.array([column_values(objects, f"{band}_{kind}")[index] for band in bands])
        error = np.array([column_values(objects, f"{band}_{kind}_err")[index] for band in bands])
        if not np.isfinite(flux).any():
            continue
        label = "model" if kind == "flux" else "re-distributed"
        axes.errorbar(places, flux, yerr=np.where(error > 0, error, 0.0), fmt=style, markersize=3, lw=1, label=label)
    axes.axhline(0.0, color="0.7", lw=0.7, zorder=0)
    axes.set_xticks(places, bands, fontsize="small")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.yaxis.get_offset_text().set_fontsize("x-small")
    axes.margins(x=0.15)
    unit = objects[f"{bands[0]}_flux"].unit
    axes.set_ylabel("flux" + (f" [{unit}]" if unit else ""), fontsize="small")


def _leave_out_ticks(panels: Sequence[Axes], label: str) -> None:
    """Label a strip of pictures; they have no ticks, and what is never drawn need not be made."""
    for axes in panels:
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(axes is panels[0])
    panels[0].set_yticks([])
    panels[0].set_ylabel(label, fontsize="small")


def _draw_object(panels: Sequence[Axes], obj: ObjectHandle, result: Result, scale: ColourScale, first: bool) -> None:
    """Fill one strip; without a coadd there are only model and spectrum."""
    coadd, bands, row = result.coadd, result.bands, obj.row
    models = [*obj.stamps("model").values()]
    peak = float(row["y"]), float(row["x"])
    view = _close_up(np.array([stamp.array for stamp in models]), models[0].box, scale.noise, peak)
    model = np.nan_to_num(_stamp_image(models, view))

    images = {"model": model}
    if coadd is not None:
        observed = np.full(model.shape, np.nan)
        source, target = view.within(coadd.box), coadd.box.within(view)
        pixels, valid = coadd.images[(slice(None), *source)], coadd.valid[(slice(None), *source)]
        observed[(slice(None), *target)] = np.where(valid, pixels, np.nan)
        unknown = np.isnan(observed)
        images = {"image": observed, "model": model}
        kinds = {"re-distributed": "redistributed", "neighbours subtracted": "neighbor_subtracted"}
        for title, kind in [*kinds.items()][int(result.is_part) :]:  # a part cannot share pixels out
            stamps = [*obj.stamps(kind).values()]
            images[title] = np.where(unknown, np.nan, _stamp_image(stamps, view))
    own = replace(scale, white=colour_scale(model, bands, noise=scale.noise).white)
    for axes, (title, image) in zip(panels[:-1], images.items(), strict=True):
        axes.imshow(lupton_rgb(image, bands, scale=own), extent=_extent(view), origin="lower")
        if first:
            axes.set_title(title, fontsize="medium")
    _mark(panels[0], np.array([peak]), [""], ["white"])
    _leave_out_ticks(panels[:-1], f"object {obj.object_id}\n{row['outcome']}")
    _draw_spectrum(panels[-1], result, row.index)
    if first:
        panels[-1].set_title("spectrum", fontsize="medium")
        panels[-1].legend(fontsize="x-small", frameon=False)


def result_scale(result: Result, ids: Sequence[int] | None = None) -> ColourScale:
    """Find the scale on which a result is drawn.

    Parameters
    ----------
    result : Result
    ids : sequence of int, optional
        Objects that are to be drawn.

    Returns
    -------
    scale : ColourScale
        From the images, of large ones every n-th row and column; where there are none, from the models, or from that of
        the first of `ids`.
    """
    coadd = result.coadd
    if coadd is None and ids:
        return colour_scale([result[ids[0]].model(band).array for band in result.bands], result.bands)
    if coadd is None:
        return colour_scale(result.model_image(), result.bands)
    step = int(np.ceil(np.sqrt(coadd.images[0].size / _MOST_SAMPLED)))
    sampled = (slice(None), slice(None, None, step), slice(None, None, step))
    valid = coadd.valid[sampled]
    noise = _typical_noise(coadd.variance[sampled], valid)
    return colour_scale(coadd.images[sampled], coadd.bands, noise=noise, valid=valid)


def _strips_size(result: Result, n: int) -> tuple[float, float]:
    """Width and height of `n` strips [inches]."""
    return _WIDTH if result.coadd is not None else 5.5, _STRIP_HEIGHT * max(n, 1) + 0.3


def _n_images(result: Result) -> int:
    """How many pictures there are of an object; without images one, and a part cannot share pixels out."""
    return 1 if result.coadd is None else 3 if result.is_part else 4


def _draw_objects(figure: Figure | SubFigure, result: Result, ids: Sequence[int], scale: ColourScale) -> None:
    n_images = _n_images(result)
    width, height = _strips_size(result, len(ids))
    margins = _margins(width, height, left=0.6, right=0.15, bottom=0.3, top=0.3, space=(0.1, 0.22))
    # The spectrum starts a column later, which leaves room for its labels.
    ratios = [1.0] * n_images + [0.15, 1.4]
    grid = figure.add_gridspec(len(ids), n_images + 2, width_ratios=ratios, **margins)
    for k, object_id in enumerate(ids):
        panels = [figure.add_subplot(grid[k, column]) for column in (*range(n_images), n_images + 1)]
        _draw_object(panels, result[object_id], result, scale, first=k == 0)


def show_objects(result: Result, ids: Sequence[int] | None = None, n: int = 5) -> Figure:
    """Draw objects one by one: image, model, re-distributed flux, neighbours subtracted, and spectrum.

    Parameters
    ----------
    result : Result
        Without a coadd only model and spectrum are drawn.
    ids : sequence of int, optional
        Values of `object_id`, in the order of the strips. None: the brightest.
    n : int, optional
        How many of the brightest.

    Returns
    -------
    figure : matplotlib.figure.Figure
        One strip per object, each on one scale of brightness; at most 121 pixels wide around its peak.

    Raises
    ------
    InputError
        If an object is not in the result.
    """
    chosen = _brightest(result, n) if ids is None else [int(object_id) for object_id in ids]
    figure = _new_figure(*_strips_size(result, len(chosen)))
    if chosen:
        _draw_objects(figure, result, chosen, result_scale(result, chosen))
    return figure


def show_object(obj: ObjectHandle, *, scale: ColourScale | None = None) -> Figure:
    """Draw one object in a narrow place: the pictures of `show_objects` two by two, and the spectrum below.

    Parameters
    ----------
    obj : ObjectHandle
        Of a result without a coadd, only model and spectrum are drawn.
    scale : ColourScale, optional
        Noise and balance of colours; None: those of the whole result, `result_scale`.

    Returns
    -------
    figure : matplotlib.figure.Figure
    """
    result = obj.result
    n_images = _n_images(result)
    n_rows = -(-n_images // 2)
    width, height = 6.0, 3.0 * n_rows + 2.6
    figure = _new_figure(width, height)
    margins = _margins(width, height, left=0.7, right=0.15, bottom=0.3, top=0.3, space=(0.05, 0.2))
    grid = figure.add_gridspec(n_rows + 1, 2, height_ratios=[3.0] * n_rows + [2.0], **margins)
    panels = [figure.add_subplot(grid[k // 2, k % 2]) for k in range(n_images)]
    panels.append(figure.add_subplot(grid[n_rows, :]))
    _draw_object(panels, obj, result, result_scale(result, [obj.object_id]) if scale is None else scale, first=True)
    return figure


_PARTS = (
    "data",
    "data above noise",
    "flux below noise",
    "model",
    "rendered model",
    "observation",
    "residual",
)


def _draw_parts(panels: Sequence[Axes], obj: ObjectHandle, result: Result, coadd: Coadd, scale: ColourScale) -> None:
    """Fill the seven panels of one object."""
    bands, row = result.bands, obj.row
    rendered_stamps = [obj.model(band) for band in bands]
    peak = float(row["y"]), float(row["x"])
    view = (
        _close_up(np.array([s.array for s in rendered_stamps]), rendered_stamps[0].box, scale.noise, peak) & coadd.box
    )
    cut = (slice(None), *view.within(coadd.box))
    data, variance, valid = coadd.images[cut], coadd.variance[cut], coadd.valid[cut]
    rendered = np.nan_to_num(_stamp_image(rendered_stamps, view))
    model = np.nan_to_num(_stamp_image([obj.model(band, convolved=False) for band in bands], view))
    own = _stamp_image([obj.neighbor_subtracted(band) for band in bands], view)
    # What lies beyond the model of the object is none of its light; no neighbours were subtracted there.
    observation = np.where(np.isnan(own), data, own)
    bright = _significance(data, np.zeros_like(data), variance, valid) > _ABOVE_NOISE
    white = colour_scale(rendered, bands, noise=scale.noise).white
    sharper = colour_scale(model, bands, noise=scale.noise).white
    everywhere = np.ones_like(valid)
    images: list[tuple[ImageArray, float, BoolArray]] = [
        (data, white, valid),
        (np.where(bright, data, 0), white, valid),
        (np.where(bright, 0, data), white, valid),
        (model, sharper, everywhere),
        (rendered, white, everywhere),
        (observation, white, valid),
    ]
    for axes, (image, own_white, shown) in zip(panels, images, strict=False):
        rgb = lupton_rgb(image, bands, scale=replace(scale, white=own_white), valid=shown)
        axes.imshow(rgb, extent=_extent(view), origin="lower")
    panels[-1].imshow(
        np.ma.masked_invalid(_significance(observation, rendered, variance, valid)),
        extent=_extent(view),
        origin="lower",
        cmap="RdBu_r",
        vmin=-RESIDUAL_RANGE,
        vmax=RESIDUAL_RANGE,
    )
    panels[-1].set_facecolor((UNKNOWN_GREY / 255,) * 3)
    _leave_out_ticks(panels, f"object {obj.object_id}\n{row['model']}")


def show_parts(result: Result, ids: Sequence[int] | None = None, n: int = 3) -> Figure:
    """Draw what of an object stands out of the noise, what does not, and how its model accounts for both.

    Parameters
    ----------
    result : Result
    ids : sequence of int, optional
        Values of `object_id`, one strip each. None: the brightest.
    n : int, optional
        How many of the brightest.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Seven panels per object: the data; the pixels of it above three sigma, all bands together, and the rest; the
        model in the model frame, on a scale of its own, and as observed; what is observed with all neighbours
        subtracted; and the residual, up to five sigma.

    Raises
    ------
    InputError
        If an object is not in the result, or the result has no coadd.
    """
    if result.coadd is None:
        raise InputError("result must have its images to be drawn: open it with coadd=, got none")
    chosen = _brightest(result, n) if ids is None else [int(object_id) for object_id in ids]
    rows = max(len(chosen), 1)
    width, height = _WIDTH, _WIDTH / len(_PARTS) * rows + 0.4
    figure = _new_figure(width, height)
    margins = _margins(width, height, left=0.5, right=0.1, bottom=0.1, top=0.3, space=(0.04, 0.04))
    panels = figure.subplots(rows, len(_PARTS), squeeze=False, gridspec_kw=margins)
    for axes, title in zip(panels[0], _PARTS, strict=True):
        axes.set_title(title, fontsize="medium")
    scale = result_scale(result)
    for strip, object_id in zip(panels, chosen, strict=False):
        _draw_parts(strip, result[object_id], result, result.coadd, scale)
    return figure


def show_result(result: Result, n: int = 5) -> Figure:
    """Draw a whole result: image, model frame, model as observed, residual, and strips of the brightest objects.

    Parameters
    ----------
    result : Result
    n : int, optional
        How many objects get a strip.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Objects are marked and numbered by `object_id`; orange: not modelled in full, see the column ``outcome``.

    Raises
    ------
    InputError
        If the result has no coadd.
    """
    coadd = result.coadd
    if coadd is None:
        raise InputError("result must have its images to be drawn: open it with coadd=, got none")
    chosen, scale = _brightest(result, n), result_scale(result)
    scene_height, (_, strips_height) = _scene_height(result.shape), _strips_size(result, len(chosen))
    figure = _new_figure(_WIDTH, scene_height + (strips_height if chosen else 0.0))
    scene_part: Figure | SubFigure = figure
    if chosen:
        parts: Any = figure.subfigures(2, 1, hspace=0.0, height_ratios=[scene_height, strips_height])
        scene_part = parts[0]
        _draw_objects(parts[1], result, chosen, scale)
    objects = result.objects
    _draw_scene(
        scene_part,
        scene_height,
        coadd.images,
        result.model_image(),
        coadd.variance,
        coadd.valid,
        result.bands,
        result.origin,
        np.stack([column_values(objects, "y"), column_values(objects, "x")], axis=1),
        list(objects["object_id"]),
        ["white" if str(outcome) == "full" else "orange" for outcome in objects["outcome"]],
        scale,
        result.model_image(convolved=False),
    )
    return figure


def show_region(result: Result, box: Box, ids: Sequence[int] | None = None) -> Figure:
    """Draw a part of a result: image, model frame, model as observed and residual.

    Parameters
    ----------
    result : Result
        With its coadd.
    box : Box
        Pixels to draw, in the coordinates of the coadd, cut at the edge of the image.
    ids : sequence of int, optional
        Values of `object_id` to mark and number; None: all objects in the box.

    Returns
    -------
    figure : matplotlib.figure.Figure
        As that of `show_result`, without strips.

    Raises
    ------
    InputError
        If an object is not in the result, the result has no coadd, or the box no pixel of the image.
    """
    if result.coadd is None:
        raise InputError("result must have its images to be drawn: open it with coadd=, got none")
    part = result.coadd.cutout(box)
    objects = result.objects
    peaks = np.stack([column_values(objects, "y"), column_values(objects, "x")], axis=1)
    inside = [(round(y), round(x)) in part.box for y, x in peaks.tolist()]
    rows = np.flatnonzero(inside) if ids is None else np.array([result[number].index for number in ids], dtype=int)
    height = _scene_height(part.shape)
    figure = _new_figure(_WIDTH, height)
    _draw_scene(
        figure,
        height,
        part.images,
        result.model_image(box=part.box),
        part.variance,
        part.valid,
        result.bands,
        part.origin,
        peaks[rows],
        [int(number) for number in np.asarray(objects["object_id"])[rows]],
        ["white" if str(outcome) == "full" else "orange" for outcome in np.asarray(objects["outcome"])[rows]],
        colour_scale(part.images, part.bands, noise=_typical_noise(part.variance, part.valid), valid=part.valid),
        result.model_image(box=part.box, convolved=False),
    )
    return figure


def show_tile(result: Result, color: str = "outcome", *, ax: Axes | None = None, size: float = 12.0) -> Figure:
    """Draw footprints and peaks of a whole result, coloured by a column.

    Parameters
    ----------
    result : Result
    color : str, optional
        Column of the table of objects: "outcome", a flag, or any number. Objects without a value are grey.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None: a new figure.
    size : float, optional
        Area of a mark [points^2].

    Returns
    -------
    figure : matplotlib.figure.Figure
        That of `ax`. Numbers are coloured between their 2 and 98 per cent.

    Raises
    ------
    InputError
        If there is no such column.
    """
    objects = result.objects
    if color not in objects.colnames:
        raise InputError(f"color must be a column of the table of objects, got {color!r}")
    height, width = result.shape
    figure, axes = _figure_and_axes(ax, 8.0, float(np.clip(6.5 * height / max(width, 1), 3.0, 12.0)))
    if ax is None:
        figure.set_layout_engine("constrained")  # leaves room for the legend
    axes.add_collection(LineCollection(list(_edges(result)), colors="0.6", linewidths=0.5, zorder=1))
    y, x = column_values(objects, "y"), column_values(objects, "x")
    values = np.asarray(objects[color])
    if values.dtype.kind in "iuf":
        numbers = column_values(objects, color)
        known = np.isfinite(numbers)
        low, high = np.percentile(numbers[known], [2, 98]) if known.any() else (0.0, 1.0)
        axes.scatter(x[~known], y[~known], s=size, c="0.7", zorder=2)
        marks = axes.scatter(x[known], y[known], s=size, c=numbers[known], vmin=low, vmax=high, zorder=3)
        unit = objects[color].unit
        figure.colorbar(marks, ax=axes, label=color + (f" [{unit}]" if unit else ""), extend="both")
    else:
        for value in sorted({str(each) for each in values}):
            chosen = values.astype(str) == value
            label = f"{value or 'none'}: {chosen.sum()}"
            shade = {"True": "red", "False": "0.7"}.get(value) or outcome_color(value)
            axes.scatter(x[chosen], y[chosen], s=size, c=shade, label=label)
        axes.legend(title=color, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    box = Box(*result.origin, *result.shape)
    axes.set(xlim=(box.x0 - 0.5, box.x1 - 0.5), ylim=(box.y0 - 0.5, box.y1 - 0.5), aspect="equal")
    axes.set_xlabel("x [pixels]")
    axes.set_ylabel("y [pixels]")
    return figure


def _edges(result: Result) -> FloatArray:
    """Edges between pixels of different footprints, shape (N, 2, 2): both ends (x, y) of each."""
    labels = np.zeros(result.shape, dtype=np.int64)
    for number, footprint in result.footprints.items():
        for row, first, end in footprint.spans.tolist():
            labels[row, first:end] = number
    padded = np.pad(labels, 1)
    rows, columns = np.nonzero(padded[1:, :] != padded[:-1, :])
    flat = np.stack([[columns - 1.5, rows - 0.5], [columns - 0.5, rows - 0.5]])
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([[columns - 0.5, rows - 1.5], [columns - 0.5, rows - 0.5]])
    segments = np.concatenate([flat, upright], axis=2).transpose(2, 0, 1)
    return np.asarray(segments + [result.origin[1], result.origin[0]])


def show_timing(result: Result, *, ax: Axes | None = None) -> Figure:
    """Draw how long each blend took, against the number of its sources, and how it ended.

    Parameters
    ----------
    result : Result
        With its timings; those of blends that were not fitted are left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; None: a new figure.

    Returns
    -------
    figure : matplotlib.figure.Figure
        That of `ax`. Blends that did not converge are orange; the size of a mark grows with the iterations.

    Raises
    ------
    InputError
        If the result has no timings, as one that was read from files of other programs.
    """
    seconds = np.asarray(result.timings.get("blends", []), dtype=np.float64)
    blends = result.blends
    if len(seconds) != len(blends):
        raise InputError("result must have the timings of its blends, got none")
    figure, axes = _figure_and_axes(ax, 7.0, 5.0)
    known = np.isfinite(seconds)
    converged = np.asarray(blends["converged"], dtype=bool)
    iterations = column_values(blends, "iterations")
    for label, chosen, shade in (("converged", converged, "tab:blue"), ("not converged", ~converged, "tab:orange")):
        used = known & chosen
        area = 8.0 + 40.0 * np.nan_to_num(iterations[used]) / max(float(np.nanmax(iterations, initial=1.0)), 1.0)
        n, label = np.asarray(blends["n_sources"])[used], f"{label}: {used.sum()}"
        axes.scatter(n, 1e3 * seconds[used], s=area, c=shade, alpha=0.5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="sources of the blend", ylabel="time [ms]")
    total = float(np.nansum(seconds))
    each = 1e3 * total / max(len(result), 1)
    axes.set_title(f"{len(result)} objects, {total:.1f} s of one core, {each:.1f} ms per object")
    axes.legend(fontsize="small")
    return figure


def show_convergence(result: Result, *, ax: Axes | None = None) -> Figure:
    """Draw how many iterations each blend took, and how well its models then fit.

    Parameters
    ----------
    result : Result
    ax : matplotlib.axes.Axes, optional
        Where to draw; None: a new figure.

    Returns
    -------
    figure : matplotlib.figure.Figure
        That of `ax`. A mark for each blend with a chi2, larger for more sources; orange: it did not converge. The grey
        line is the chi2 of noise.
    """
    blends = result.blends
    figure, axes = _figure_and_axes(ax, 7.0, 5.0)
    iterations, chi2, n = (column_values(blends, name) for name in ("iterations", "chi2", "n_sources"))
    known = np.isfinite(chi2) & (chi2 > 0)
    converged = np.asarray(blends["converged"], dtype=bool)
    axes.axhline(1.0, color="0.7", lw=1.0, zorder=0)
    for label, chosen, shade in (("converged", converged, "tab:blue"), ("not converged", ~converged, "tab:orange")):
        used = known & chosen
        label = f"{label}: {used.sum()}"
        axes.scatter(iterations[used], chi2[used], s=8.0 + 4.0 * n[used], c=shade, alpha=0.5, label=label)
    axes.set(yscale="log", xlabel="iterations", ylabel="chi2 of the blend", xlim=(0, None))
    axes.legend(fontsize="small")
    return figure


def _figure_and_axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Give what is drawn on: the axes of the caller, or those of a new figure of that size [inches]."""
    if ax is None:
        figure = _new_figure(width, height)
        return figure, figure.subplots()
    root = ax.get_figure(root=True)
    assert root is not None
    return root, ax


# ---------------------------------------------------------------- notebooks

_THUMBNAIL = 240  # pixels, longer side
_MOST_DRAWN = 300  # objects of which a result without images is drawn


def _img(content: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" style="image-rendering: pixelated">'


def _thumbnail(images: ImageArray, bands: Sequence[str], valid: BoolArray | None = None) -> str:
    """Draw a small picture as HTML; every n-th pixel of a large image."""
    step = -(-max(images.shape[1:]) // _THUMBNAIL)
    small = images[:, ::step, ::step]
    rgb = lupton_rgb(small, bands, valid=None if valid is None else valid[:, ::step, ::step])
    enlarged = max(1, _THUMBNAIL // (2 * max(rgb.shape[:2])))
    file = BytesIO()
    imsave(file, np.repeat(np.repeat(rgb[::-1], enlarged, axis=0), enlarged, axis=1), format="png")
    return _img(file.getvalue())


def _beside(picture: str, text: str) -> str:
    return f'<div style="display: flex; gap: 1em; align-items: center">{picture}<pre>{escape(text)}</pre></div>'


def coadd_html(coadd: Coadd) -> str:
    """Show a coadd in a notebook: a small picture and what it is made of."""
    height, width = coadd.shape
    lines = [
        coadd.name,
        f"bands   {' '.join(coadd.bands)}",
        f"pixels  {height} x {width} from y = {coadd.origin[0]}, x = {coadd.origin[1]}",
        f"valid   {100 * coadd.valid.mean():.1f} %",
        f"unit    {coadd.unit or 'not known'}",
        f"PSF     {'field' if callable(coadd.psfs) else 'one per band'}",
        f"sky     {'WCS' if coadd.wcs is not None else 'none'}",
    ]
    return _beside(_thumbnail(coadd.images, coadd.bands, coadd.valid), "\n".join(lines))


def result_html(result: Result) -> str:
    """Show a result in a notebook: a small picture of its models, and its ledger."""
    ledger = result.ledger()
    counts = ", ".join(f"{n} {name}" for name, n in ledger["outcomes"].items())
    height, width = result.shape
    lines = [
        f"{len(result)} objects in {len(result.blends)} blends, {len(result.candidates)} candidates",
        f"outcome  {counts or 'none'}",
        f"model    {result.config.model}",
        f"bands    {' '.join(result.bands)}",
        f"pixels   {height} x {width} from y = {result.origin[0]}, x = {result.origin[1]}",
        f"images   {'at hand' if result.coadd is not None else 'not at hand: kermes.open(path, coadd=...)'}",
    ]
    if result.coadd is not None:
        picture = _thumbnail(result.coadd.images, result.bands, result.coadd.valid)
    elif 0 < len(result) <= _MOST_DRAWN:
        picture = _thumbnail(result.model_image(), result.bands)
    else:
        picture = ""
    return _beside(picture, "\n".join(lines))


def object_html(obj: ObjectHandle) -> str:
    """Show an object in a notebook: its strip of pictures."""
    picture = png_bytes(show_objects(obj.result, [obj.object_id]), dpi=80)
    row = obj.row
    text = f"object {obj.object_id}: {row['model'] or 'no model'}, {row['outcome']}, chi2 {row['chi2']:.2f}"
    return f"<div>{_img(picture)}<pre>{escape(text)}</pre></div>"
