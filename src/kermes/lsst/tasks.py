"""Pipeline tasks: deblend a patch in all bands, measure its objects in one band, deblend one detector of a visit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.table import Column, Table
from lsst.pex import config as pex_config
from lsst.pipe.base import (
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base import connectionTypes as connections

from kermes.coadd import Coadd
from kermes.errors import ConfigError, DataWarning, InputError
from kermes.forced import forced_photometry
from kermes.geometry import Box
from kermes.io.scarlet_results import scarlet_of_result
from kermes.lsst.butler import DETECTOR, PATCH, PATCH_BAND, read_image
from kermes.lsst.config import ConfigFields, config_of_fields
from kermes.lsst.images import box_of, coadd_of_images, has_data, in_order
from kermes.result import Result
from kermes.tile import deblend

NUMBERS = 1 << 24
"""Numbers of objects that each patch has to itself."""


def first_number(tract: int, patch: int, patches_per_tract: int) -> int:
    """Find what is added to the numbers of a patch, so that no two objects of a sky map have the same.

    Parameters
    ----------
    tract, patch : int
        Their numbers.
    patches_per_tract : int
        Number of patches that the sky map makes of a tract at most.

    Returns
    -------
    first : int
        ``(tract * patches_per_tract + patch) * 2**24``; below 2**53 for up to 5e8 patches, so that numbers survive as
        floating-point numbers.

    Raises
    ------
    InputError
        If the patch lies outside of its tract.
    """
    if not 0 <= patch < patches_per_tract or tract < 0:
        raise InputError(f"patch must be one of the {patches_per_tract} of tract {tract}, got {patch}")
    return (tract * patches_per_tract + patch) * NUMBERS


def _run(coadd: Any, fields: Any, peaks: Any, n_cores: int, log: Any) -> Result:
    """Deblend; what kermes warns of goes to the log."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", DataWarning)
        result = deblend(coadd, peaks=peaks, config=config_of_fields(fields), workers=n_cores)
    for remark in remarks:
        log.warning("%s", remark.message)
    return result


def _with_columns(table: Table, values: Mapping[str, tuple[Any, str]]) -> Table:
    """Put further columns, with their descriptions, behind the number of each object."""
    out = table.copy(copy_data=False)
    out.meta.clear()
    for place, (name, (value, meaning)) in enumerate(values.items(), start=1):
        column = np.broadcast_to(value, len(table)).copy()
        out.add_column(Column(column, name=name, description=meaning), index=place)
    return out


def _note(metadata: Any, result: Result) -> None:
    """Put the ledger and the time into the metadata of the task."""
    ledger = result.ledger()
    metadata["n_peaks"], metadata["n_objects"] = ledger["peaks"], ledger["rows"]
    metadata["n_blends"], metadata["n_candidates"] = len(result.blends), len(result.candidates)
    for name in ("outcomes", "reasons"):
        metadata[name] = ledger[name]
    metadata["seconds"] = float(result.timings["total"])


def _check_settings(config: Any) -> None:
    try:
        config_of_fields(config.kermes)
    except ConfigError as error:
        raise pex_config.FieldValidationError(type(config).kermes, config, str(error)) from None


# ---------------------------------------------------------------- all bands of a patch


class DeblendPatchConnections(
    PipelineTaskConnections,
    dimensions=PATCH,
    defaultTemplates={"coaddName": "deep_coadd", "objectName": "object_kermes"},
):
    """What the task reads and writes."""

    coadds = connections.Input(
        doc="Coadds of cells, one per band.",
        name="{coaddName}",
        storageClass="CellCoadd",
        dimensions=PATCH_BAND,
        multiple=True,
        deferLoad=True,
        minimum=1,
    )
    detections = connections.Input(
        doc="Peaks to deblend: columns y and x in pixels of the tract, or ra and dec.",
        name="{objectName}_detections",
        storageClass="ArrowAstropy",
        dimensions=PATCH,
    )
    objects = connections.Output(
        doc="One row for every peak.", name="{objectName}", storageClass="ArrowAstropy", dimensions=PATCH
    )
    parents = connections.Output(
        doc="One row for every footprint.", name="{objectName}_parents", storageClass="ArrowAstropy", dimensions=PATCH
    )
    models = connections.Output(
        doc="Tables and models of all objects.",
        name="{objectName}_models",
        storageClass="KermesResult",
        dimensions=PATCH,
    )
    scarlet_models = connections.Output(
        doc="The same models as the LSST pipelines read them, drawn on pixels.",
        name="{objectName}_scarlet_models",
        storageClass="KermesScarletModels",
        dimensions=PATCH,
    )

    def __init__(self, *, config: DeblendPatchConfig | None = None) -> None:
        super().__init__(config=config)
        if config is not None and not config.use_detections:
            del self.detections
        if config is not None and not config.write_scarlet:
            del self.scarlet_models


class DeblendPatchConfig(PipelineTaskConfig, pipelineConnections=DeblendPatchConnections):
    """Settings of the task."""

    kermes = pex_config.ConfigField(dtype=ConfigFields, doc="Settings of the deblender, as of kermes.Config.")
    bands = pex_config.ListField(
        dtype=str,
        default=[],
        doc="Bands to use, in this order. A band without a coadd has columns without values. Empty: all that there "
        "are, by wavelength.",
    )
    use_detections = pex_config.Field(
        dtype=bool, default=False, doc="Whether to read the peaks from a catalog; else they are detected."
    )
    write_scarlet = pex_config.Field(
        dtype=bool, default=False, doc="Whether to write the models as .scarlet files of the LSST pipelines as well."
    )

    def validate(self) -> None:
        """Check values that depend on each other."""
        super().validate()
        _check_settings(self)


class DeblendPatchTask(PipelineTask):
    """Deblend the coadds of a patch in all bands together."""

    ConfigClass = DeblendPatchConfig
    _DefaultName = "deblendPatch"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:
        """Read the coadds of a patch, deblend them, and write what came out."""
        inputs = butlerQC.get(inputRefs)
        handles = {str(handle.dataId["band"]): handle for handle in inputs["coadds"]}
        wanted = list(self.config.bands) or in_order(handles)
        missing = [band for band in wanted if band not in handles]
        bands = [band for band in wanted if band in handles]
        if not bands:
            raise NoWorkFound(f"there is no coadd in any of the bands {', '.join(wanted)}")
        data_id = butlerQC.quantum.dataId
        name = f"tract {data_id['tract']}, patch {data_id['patch']}"
        images = {band: read_image(handles[band].get, f"{name}, band {band}") for band in bands}
        coadd, inner = self._coadd(images, missing, name)
        del images  # as large as the coadd, and not needed while it is deblended
        sky_map = data_id.records["skymap"]
        outputs = self._deblend(
            coadd,
            inner,
            detections=inputs.get("detections"),
            missing_bands=missing,
            tract=data_id["tract"],
            patch=data_id["patch"],
            patches_per_tract=sky_map.patch_nx_max * sky_map.patch_ny_max,
            n_cores=butlerQC.resources.num_cores,
        )
        butlerQC.put(outputs, outputRefs)

    def run(
        self,
        images: Mapping[str, Any],
        *,
        detections: Table | None = None,
        missing_bands: list[str] | None = None,
        tract: int = 0,
        patch: int = 0,
        patches_per_tract: int = 1,
        n_cores: int = 1,
    ) -> Struct:
        """Deblend coadds that are in memory.

        Parameters
        ----------
        images : mapping of band to CellCoadd
        detections : Table, optional
            Peaks; None: they are detected.
        missing_bands : list of str, optional
            Bands that have no coadd; their columns have no values.
        tract, patch, patches_per_tract
            What the numbers of the objects are made of; see `first_number`.
        n_cores : int, optional
            Number of threads; the answer does not depend on it.

        Returns
        -------
        outputs : Struct
            ``objects``, ``parents``, ``models`` and, if asked for, ``scarlet_models``.

        Raises
        ------
        NoWorkFound
            If no pixel has data, or nothing is detected.
        """
        coadd, inner = self._coadd(images, missing_bands or [], f"tract {tract}, patch {patch}")
        return self._deblend(
            coadd,
            inner,
            detections=detections,
            missing_bands=missing_bands or [],
            tract=tract,
            patch=patch,
            patches_per_tract=patches_per_tract,
            n_cores=n_cores,
        )

    def _coadd(self, images: Mapping[str, Any], missing_bands: list[str], name: str) -> tuple[Coadd, Box]:
        """Make a coadd of the images, which are not needed afterwards; and the inner part of the patch."""
        if not any(has_data(image) for image in images.values()):
            raise NoWorkFound("no pixel of the patch has data")
        if missing_bands:
            self.log.warning("%s has no coadd in the bands %s", name, ", ".join(missing_bands))
        coadd = coadd_of_images(images, bands=list(self.config.bands) or list(images), name=name)
        return coadd, box_of(next(iter(images.values())).patch.inner_bbox)

    def _deblend(
        self,
        coadd: Coadd,
        inner: Box,
        *,
        detections: Table | None,
        missing_bands: list[str],
        tract: int,
        patch: int,
        patches_per_tract: int,
        n_cores: int,
    ) -> Struct:
        result = _run(coadd, self.config.kermes, detections, n_cores, self.log)
        if not len(result):
            raise NoWorkFound("nothing is detected in the patch")
        if max(len(result), len(result.candidates)) >= NUMBERS:
            raise InputError(f"a patch must have fewer than {NUMBERS} objects, got {len(result)}")
        result = result.renumbered(first_number(tract, patch, patches_per_tract))
        _note(self.metadata, result)
        self.metadata["missing_bands"] = " ".join(missing_bands)
        self.log.info(
            "%s: %d objects in %d blends, bands %s, %.1f s on %d cores",
            coadd.name,
            len(result),
            len(result.blends),
            " ".join(coadd.bands),
            result.timings["total"],
            n_cores,
        )
        objects = _with_columns(
            result.objects,
            {
                "tract": (tract, "Number of the tract"),
                "patch": (patch, "Number of the patch in its tract"),
                "is_patch_inner": (
                    _inside(result.objects, inner),
                    "Its peak lies in the part of the patch that no other patch has",
                ),
            },
        )
        outputs = Struct(objects=objects, parents=result.parents, models=result)
        if self.config.write_scarlet:
            outputs.scarlet_models = scarlet_of_result(result).models
        return outputs


def _inside(objects: Table, box: Box) -> Any:
    y, x = (np.floor(np.asarray(objects[name]) + 0.5) for name in "yx")
    return (y >= box.y0) & (y < box.y1) & (x >= box.x0) & (x < box.x1)


# ---------------------------------------------------------------- one band of a patch


class ForcedPatchConnections(
    PipelineTaskConnections,
    dimensions=PATCH_BAND,
    defaultTemplates={"coaddName": "deep_coadd", "objectName": "object_kermes"},
):
    """What the task reads and writes."""

    coadd = connections.Input(
        doc="Coadd of cells of one band.", name="{coaddName}", storageClass="CellCoadd", dimensions=PATCH_BAND
    )
    models = connections.Input(
        doc="Models of all objects of the patch.",
        name="{objectName}_models",
        storageClass="KermesResult",
        dimensions=PATCH,
    )
    forced = connections.Output(
        doc="One row for every object.", name="{objectName}_forced", storageClass="ArrowAstropy", dimensions=PATCH_BAND
    )


class ForcedPatchConfig(PipelineTaskConfig, pipelineConnections=ForcedPatchConnections):
    """Settings of the task: there are none but the connections."""


class ForcedPatchTask(PipelineTask):
    """Measure the objects of a patch in one band, with positions and shapes held and all fluxes fitted together."""

    ConfigClass = ForcedPatchConfig
    _DefaultName = "forcedPatch"

    def run(self, coadd: Any, models: Result) -> Struct:
        """Measure.

        Parameters
        ----------
        coadd : CellCoadd
        models : Result
            Of the same patch.

        Returns
        -------
        outputs : Struct
            ``forced``, a table with the rows of the objects.

        Raises
        ------
        NoWorkFound
            If no pixel has data.
        """
        if not has_data(coadd):
            raise NoWorkFound("no pixel of the patch has data in this band")
        table = forced_photometry(models, coadd_of_images([coadd]))
        self.metadata["n_objects"] = len(table)
        self.log.info("measured %d objects in band %s", len(table), coadd.band)
        return Struct(forced=table)


# ---------------------------------------------------------------- one detector of a visit


class DeblendVisitConnections(
    PipelineTaskConnections,
    dimensions=DETECTOR,
    defaultTemplates={"imageName": "visit_image", "sourceName": "source_kermes"},
):
    """What the task reads and writes."""

    image = connections.Input(
        doc="Calibrated image of one detector.", name="{imageName}", storageClass="VisitImage", dimensions=DETECTOR
    )
    detections = connections.Input(
        doc="Peaks to deblend: columns y and x in pixels of the detector, or ra and dec.",
        name="{sourceName}_detections",
        storageClass="ArrowAstropy",
        dimensions=DETECTOR,
    )
    sources = connections.Output(
        doc="One row for every peak.", name="{sourceName}", storageClass="ArrowAstropy", dimensions=DETECTOR
    )
    models = connections.Output(
        doc="Tables and models of all sources.",
        name="{sourceName}_models",
        storageClass="KermesResult",
        dimensions=DETECTOR,
    )

    def __init__(self, *, config: DeblendVisitConfig | None = None) -> None:
        super().__init__(config=config)
        if config is not None and not config.use_detections:
            del self.detections


class DeblendVisitConfig(PipelineTaskConfig, pipelineConnections=DeblendVisitConnections):
    """Settings of the task."""

    kermes = pex_config.ConfigField(dtype=ConfigFields, doc="Settings of the deblender, as of kermes.Config.")
    use_detections = pex_config.Field(
        dtype=bool, default=False, doc="Whether to read the peaks from a catalog; else they are detected."
    )

    def setDefaults(self) -> None:
        """Choose the single-band deblender."""
        super().setDefaults()
        self.kermes.model = "templates"

    def validate(self) -> None:
        """Check values that depend on each other."""
        super().validate()
        _check_settings(self)


class DeblendVisitTask(PipelineTask):
    """Deblend the image of one detector of a visit with the single-band deblender."""

    ConfigClass = DeblendVisitConfig
    _DefaultName = "deblendVisit"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:
        """Read the image, deblend it, and write what came out."""
        inputs = butlerQC.get(inputRefs)
        data_id = butlerQC.quantum.dataId
        outputs = self.run(
            inputs["image"],
            detections=inputs.get("detections"),
            visit=data_id["visit"],
            detector=data_id["detector"],
            n_cores=butlerQC.resources.num_cores,
        )
        butlerQC.put(outputs, outputRefs)

    def run(
        self, image: Any, *, detections: Table | None = None, visit: int = 0, detector: int = 0, n_cores: int = 1
    ) -> Struct:
        """Deblend an image that is in memory.

        Parameters
        ----------
        image : VisitImage
        detections : Table, optional
            Peaks; None: they are detected.
        visit, detector : int
            Go into the table; the numbers of the sources are unique within a visit.
        n_cores : int, optional
            Number of threads; the answer does not depend on it.

        Returns
        -------
        outputs : Struct
            ``sources`` and ``models``.

        Raises
        ------
        NoWorkFound
            If no pixel has data, or nothing is detected.
        """
        if not has_data(image):
            raise NoWorkFound("no pixel of the detector has data")
        coadd = coadd_of_images([image], name=f"visit {visit}, detector {detector}")
        result = _run(coadd, self.config.kermes, detections, n_cores, self.log)
        if not len(result):
            raise NoWorkFound("nothing is detected in the image")
        result = result.renumbered(detector * NUMBERS)
        _note(self.metadata, result)
        self.log.info("visit %d, detector %d: %d sources", visit, detector, len(result))
        sources = _with_columns(
            result.objects,
            {"visit": (visit, "Number of the visit"), "detector": (detector, "Number of the detector")},
        )
        return Struct(sources=sources, models=result)
