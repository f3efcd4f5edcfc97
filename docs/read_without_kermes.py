"""Read one object of a kermes result with pyarrow and numpy alone: python read_without_kermes.py OUT OBJECT_ID."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def read_object(folder, object_id):
    """Give the row of an object, its components, the bands and the PSF of its blend."""
    metadata = json.loads(Path(folder, "metadata.json").read_text())
    (row,) = pq.read_table(f"{folder}/objects.parquet", filters=[("object_id", "=", object_id)]).to_pylist()
    components = pq.read_table(f"{folder}/models.parquet", filters=[("object_id", "=", object_id)]).to_pylist()
    for component in components:
        shape = (-1, component["height"], component["width"])
        if component["steps"]:  # whole numbers, and the step of each plane
            pixels = np.array(component["levels"]).reshape(shape) * np.array(component["steps"])[:, None, None]
        else:  # as they were fitted; none for a profile
            pixels = np.array(component["morphology"]).reshape(shape)
        if component["kind"] == "factorized":  # one plane, times the spectrum
            pixels = np.array(component["spectrum"])[:, None, None] * pixels
        component["pixels"] = pixels
    (blend,) = pq.read_table(f"{folder}/blends.parquet", filters=[("blend_id", "=", row["blend_id"])]).to_pylist()
    stamps = pq.read_table(f"{folder}/psfs.parquet", filters=[("psf_id", "=", blend["psf_id"])]).to_pylist()
    psfs = {psf["band"]: np.array(psf["pixels"]).reshape(psf["height"], psf["width"]) for psf in stamps}
    return row, components, metadata["bands"], psfs


if __name__ == "__main__":
    row, components, bands, psfs = read_object(sys.argv[1], int(sys.argv[2]))
    for band in bands:
        print(f"{band}: flux {row[f'{band}_flux']:.4g} +- {row[f'{band}_flux_err']:.2g}, PSF {psfs[band].shape}")
    for component in components:
        place = component["y0"], component["x0"], component["height"], component["width"]
        print(f"{component['kind']} in the box (y0, x0, height, width) = {place}")
