"""Sizes of what the tasks write for one patch, beside what catalogs with the pixels of footprints would take.

python benchmarks/lsst_sizes.py REPOSITORY COLLECTION [--inputs COLLECTION] [--tract T] [--patch P]
"""

import argparse

from lsst.daf.butler import Butler

from kermes.io.tables import footprint_bytes
from kermes.lsst import read_coadd


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository")
    parser.add_argument("collection")
    parser.add_argument("--inputs", default="kermes/inputs")
    parser.add_argument("--skymap", default="kermes_sim")
    parser.add_argument("--tract", type=int, default=0)
    parser.add_argument("--patch", type=int, default=0)
    options = parser.parse_args()
    patch = {"skymap": options.skymap, "tract": options.tract, "patch": options.patch}
    with Butler.from_config(options.repository, collections=[options.collection, options.inputs]) as butler:

        def size(name, **more):
            return butler.getURI(name, patch, **more).size() / 1e6

        result = butler.get("object_kermes_models", patch).with_coadd(read_coadd(butler, **patch))
        bands = result.bands
        catalog, models = size("object_kermes"), size("object_kermes_models")
        forced = sum(size("object_kermes_forced", band=band) for band in bands)
        pixels = {kind: len(footprint_bytes(result, kind)) / 1e6 for kind in ("model", "redistributed")}
    n = len(result)
    heavy = pixels["redistributed"]
    print(f"{n} objects, {len(bands)} bands, {result.shape[0]} x {result.shape[1]} pixels; sizes in MB")
    print(f"{'':36}{'as written':>12}{'with footprint pixels':>24}{'ratio':>8}")
    rows = (
        ("catalog of objects", catalog, catalog + heavy),
        ("catalog of objects and models", catalog + models, catalog + heavy),
        (f"forced catalogs, {len(bands)} bands", forced, forced + heavy),
    )
    for name, written, with_pixels in rows:
        print(f"{name:36}{written:12.1f}{with_pixels:24.1f}{with_pixels / written:8.1f}")
    print(f"models: {1e6 * models / n:.0f} bytes per object; footprint pixels: {1e6 * heavy / n:.0f}")


if __name__ == "__main__":
    main()
