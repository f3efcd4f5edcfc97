"""The server behind the page: it answers with tiles, rows, objects and refits."""

from __future__ import annotations

import base64
import json
import logging
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from anyio import to_thread
from astropy.coordinates import SkyCoord
from astropy.wcs import NoConvergence
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from kermes import plots, report
from kermes.edits import Edit, apply_edits, read_edits, write_edits
from kermes.errors import FileError, InputError, KermesError
from kermes.geometry import Box
from kermes.result import Result
from kermes.store import write_result
from kermes.viewer.paging import Pages
from kermes.viewer.pictures import FINEST, TILE, Layer, Look, Outlines, Pictures, return_memory
from kermes.viewer.selection import Colouring, as_json, colouring, matching, ordered

logger = logging.getLogger(__name__)

PORT = 8642
"""Port that is tried first, so that links stay good."""

_PORTS_TRIED = 20
_DPI = 110
_THREADS = 6  # that answer at the same time
_MOST_ROWS = 1000  # that are sent at a time
_CACHED = {"Cache-Control": "private, max-age=86400"}
_NOT_CACHED = {"Cache-Control": "no-store"}
# Whatever the page shows, and runs, comes from its own server.
_OWN_ONLY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"
}
_HEADER = "x-kermes"  # that only the page itself can send: no other page may without being allowed


class View:
    """What the page shows: a result, its pictures and, where it may be edited, the edits so far.

    Parameters
    ----------
    result : Result
        Without its coadd, only the models can be seen.
    name : str, optional
        Title of the page.
    edits : path, optional
        File in which edits are kept. Those that are in it already are applied. None: the result cannot be edited.
    extras : mapping of str to bytes, optional
        Further files, by name, that go into a result that is written.

    Raises
    ------
    FileError, InputError
        If the file is damaged or was made on another result, or edits are wanted and the result has no coadd.
    """

    def __init__(
        self,
        result: Result,
        name: str = "kermes",
        *,
        edits: str | PathLike[str] | None = None,
        extras: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name = name
        self._extras = extras
        self._pages = None
        if result.coadd is not None:
            self._pages = Pages(result.coadd)
            if self._pages.coadd is not result.coadd:
                result = replace(result, coadd=self._pages.coadd)
        original = result
        self.edits_file = None if edits is None else Path(edits)
        self.edits: list[Edit] = []
        if self.edits_file is not None:
            result.need_coadd("editing")
            if self.edits_file.exists():
                self.edits = read_edits(self.edits_file, result)
                result = apply_edits(result, self.edits)
        self._original = original
        self.pictures = Pictures(result, self._release)
        self.outlines = Outlines(result)
        self.version = 0
        """Counts refits."""
        self.run = secrets.token_hex(4)
        """Differs each time, so that a browser does not show tiles of another result."""
        self._colourings: dict[str, Colouring] = {}
        self.stop = threading.Event()
        """Set when the models need not be drawn further."""
        return_memory()

    def _release(self) -> None:
        if self._pages is not None:
            self._pages.release()

    def draw_missing(self) -> None:
        """Draw all models that are not drawn yet, unless it is stopped."""
        self.pictures.draw_missing(self.stop)
        return_memory()

    @property
    def result(self) -> Result:
        """The result with all edits."""
        return self.pictures.result

    def colouring(self, column: str) -> Colouring:
        """Colours by a column; they are kept."""
        known = self._colourings.get(column)
        if known is None:
            known = self._colourings[column] = colouring(self.result, column)
        return known

    def picture(self, object_id: int) -> bytes:
        """Draw an object, as PNG."""
        with self.pictures.lock:
            figure = plots.show_object(self.result[object_id], scale=self.pictures.scale)
            self.result.forget()  # who looks at many objects does not need the images of all models
            self._release()
        return plots.png_bytes(figure, _DPI)

    def apply(self, edit: Edit) -> dict[str, Any]:
        """Refit a blend, and keep that; gives pictures and chi2 of before and after."""
        with self.pictures.lock:
            before = self.result
            after = edit.apply(before)
            self._take(after, [*self.edits, edit], self._changed(before, after, edit.blend_id))
            new = sorted(set(after.objects["object_id"].tolist()) - set(before.objects["object_id"].tolist()))
            box = self._members_box(before, edit.blend_id) | self._members_box(after, edit.blend_id)
            sides = {"before": before, "after": after}
            return {
                "new": new,
                **{side: _side(each, edit.blend_id, box) for side, each in sides.items()},
                **self.state(),
            }

    def undo(self) -> dict[str, Any]:
        """Take back the last refit."""
        with self.pictures.lock:
            if not self.edits:
                raise InputError("there is no edit to take back")
            edits = self.edits[:-1]
            before, after = self.result, apply_edits(self._original, edits)
            self._take(after, edits, self._changed(before, after, self.edits[-1].blend_id))
            return self.state()

    def write(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the result with all edits."""
        with self.pictures.lock:
            write_result(self.result, path, overwrite=overwrite, extras=self._extras)
            self._release()
            return_memory()

    def state(self) -> dict[str, Any]:
        """What changes while the page is open."""
        return {
            "version": self.version,
            "drawn": self.pictures.drawn,
            "n_objects": len(self.result),
            "edits": [edit.as_json() for edit in self.edits],
        }

    def _take(self, result: Result, edits: list[Edit], changed: Box) -> None:
        assert self.edits_file is not None
        write_edits(self.edits_file, edits, self._original)
        self.edits = edits
        self.pictures.change(result, changed)
        self.outlines = Outlines(result)
        self._colourings = {}
        self.version += 1
        result.forget()
        self._release()
        return_memory()

    @staticmethod
    def _changed(before: Result, after: Result, blend_id: int) -> Box:
        """Pixels, as array index, that the models of a blend reach before or after; it may have been divided."""
        known = set(before.blends["blend_id"].tolist())
        box = Box(0, 0, 0, 0)
        for result, other in ((before, set(after.blends["blend_id"].tolist())), (after, known)):
            for number in {blend_id} | (set(result.blends["blend_id"].tolist()) - other):
                box = box | result.outer_box_of_blend(int(number))
        return box

    @staticmethod
    def _members_box(result: Result, blend_id: int) -> Box:
        members = np.asarray(result.objects["object_id"])[np.asarray(result.objects["blend_id"]) == blend_id]
        return report.area_of(result, members.tolist())


def _side(result: Result, blend_id: int, box: Box) -> dict[str, Any]:
    """Picture and numbers of a blend before or after a refit."""
    picture = plots.png_bytes(plots.show_region(result, box), 80)
    blends = result.blends
    rows = np.flatnonzero(np.asarray(result.objects["blend_id"]) == blend_id)
    chi2 = float(blends["chi2"][np.asarray(blends["blend_id"]) == blend_id][0])
    columns = ["object_id", "y", "x", "model", "outcome", *(f"{band}_flux" for band in result.bands)]
    return {
        "picture": "data:image/png;base64," + base64.b64encode(picture).decode(),
        "chi2": chi2 if np.isfinite(chi2) else None,
        "rows": as_json(result.objects, rows, columns),
    }


# ---------------------------------------------------------------- answers


def _kind(values: Any) -> str:
    return {"b": "flag", "i": "whole", "u": "whole", "f": "number"}.get(np.asarray(values).dtype.kind, "word")


def _description(view: View) -> dict[str, Any]:
    result = view.result
    objects = result.objects
    height, width = result.shape
    return {
        "name": view.name,
        "run": view.run,
        "width": width,
        "height": height,
        "origin": list(result.origin),
        "bands": list(result.bands),
        "layers": list(view.pictures.layers),
        "tile": TILE,
        "finest": FINEST,
        "has_sky": result.wcs is not None,
        "can_edit": view.edits_file is not None,
        "edits_file": "" if view.edits_file is None else view.edits_file.name,
        "columns": [
            {
                "name": name,
                "kind": _kind(objects[name]),
                "unit": str(objects[name].unit or ""),
                "description": objects[name].description or "",
            }
            for name in objects.colnames
        ],
        **view.state(),
    }


def _positions(view: View) -> bytes:
    """Numbers (float64) and places x, y (float32) of all objects, in pixels of the picture from its upper left corner.

    Numbers of the pipelines have 45 bits, which a browser has no other type for.
    """
    result = view.result
    ids = np.asarray(result.objects["object_id"])
    y = np.asarray(result.objects["y"], dtype=np.float64) - result.origin[0]
    x = np.asarray(result.objects["x"], dtype=np.float64) - result.origin[1]
    # The middle of the first pixel is half a pixel from the corner.
    places = np.concatenate([x + 0.5, result.shape[0] - (y + 0.5)]).astype("<f4")
    return ids.astype("<f8").tobytes() + places.tobytes()


def _marks(view: View, column: str, conditions: Mapping[str, str]) -> bytes:
    """Red, green, blue, and 255 for what is listed or 0, of all objects."""
    shown = matching(view.result.objects, conditions)
    colours = view.colouring(column).objects
    return np.concatenate([colours, 255 * shown[:, None].astype(np.uint8)], axis=1).tobytes()


def _rows(view: View, query: Mapping[str, str]) -> dict[str, Any]:
    objects = view.result.objects
    mask = matching(objects, _conditions(query))
    rows = ordered(objects, np.flatnonzero(mask), query.get("sort") or None, query.get("descending") == "true")
    first, n = _integer(query, "first", 0), min(_integer(query, "n", 100), _MOST_ROWS)
    columns = [name for name in query.get("columns", "object_id").split(",") if name]
    return {"total": len(rows), "rows": as_json(objects, rows[max(first, 0) : max(first, 0) + max(n, 0)], columns)}


def _object(view: View, object_id: int) -> dict[str, Any]:
    with view.pictures.lock:
        handle = view.result[object_id]
        objects, row = view.result.objects, handle.row
        picture = f"api/objects/{object_id}/picture?v={view.run}-{view.version}"
        html = report.object_section(handle, picture)
    blend_id = int(row["blend_id"])
    members = np.asarray(objects["object_id"])[np.asarray(objects["blend_id"]) == blend_id]
    return {
        "object_id": object_id,
        "blend_id": blend_id,
        "members": members.tolist(),
        "y": float(row["y"]),
        "x": float(row["x"]),
        "html": html,
    }


def _place(view: View, y: float, x: float) -> dict[str, Any]:
    """What is known of a position in the coadd's coordinates."""
    result = view.result
    row, column = y - result.origin[0], x - result.origin[1]
    place: dict[str, Any] = {"y": y, "x": x}
    if result.wcs is not None:
        sky = result.wcs.celestial.pixel_to_world(column, row).icrs
        if np.isfinite(sky.ra.deg + sky.dec.deg):  # far outside there may be no sky
            place |= {"ra": float(sky.ra.deg), "dec": float(sky.dec.deg)}
    pixel = round(row), round(column)
    if result.coadd is not None and pixel in Box.of_shape(result.shape):
        values = result.coadd.images[(slice(None), *pixel)]
        place["values"] = {
            band: float(f"{value:.4g}") if good else None
            for band, value, good in zip(
                result.bands, values.tolist(), result.coadd.valid[(slice(None), *pixel)].tolist(), strict=True
            )
        }
    return place


def _find(view: View, text: str) -> dict[str, Any]:
    """Find what somebody typed: the number of an object, or a position on the sky or, with "y" or "x", in pixels."""
    result = view.result
    words = text.replace(",", " ").split()
    in_pixels = [word[2:] for word in words if word.lower()[:2] in ("y=", "x=")]
    if len(words) == 1 and words[0].isdecimal():
        with view.pictures.lock:
            row = result[int(words[0])].row
        return {"object_id": int(row["object_id"]), "y": float(row["y"]), "x": float(row["x"])}
    try:
        if len(words) == 2 and len(in_pixels) == 2:
            places = {word[0].lower(): float(word[2:]) for word in words}
            return {"y": places["y"], "x": places["x"]}
        if len(words) in (2, 6) and not in_pixels and result.wcs is not None:
            unit = ("hourangle", "deg") if len(words) == 6 or ":" in text else ("deg", "deg")
            half = len(words) // 2
            sky = SkyCoord(" ".join(words[:half]), " ".join(words[half:]), unit=unit)
            x, y = result.wcs.celestial.world_to_pixel(sky)
            if np.isfinite(x + y):
                return {"y": float(y) + result.origin[0], "x": float(x) + result.origin[1]}
    except (ValueError, KeyError, NoConvergence):
        pass
    sky_form = "" if result.wcs is None else ", ra and dec"
    raise InputError(f"a place must be the number of an object{sky_form}, or like y=120 x=340; got {text!r}")


def _conditions(query: Mapping[str, str]) -> dict[str, str]:
    text = query.get("filter") or "{}"
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise InputError(f"filter must be an object of conditions by column, as JSON, got {text!r}")
    return content


def _integer(query: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(query.get(name, default))
    except ValueError:
        raise InputError(f"{name} must be a whole number, got {query[name]!r}") from None


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(query.get(name, default))
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{name} must be a number, got {query.get(name)!r}")
    return value


# ---------------------------------------------------------------- routes


def _answer(respond: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """Make an endpoint: JSON of what is returned, unless it is a response; wrong questions are answered with why."""

    def endpoint(request: Request) -> Response:
        try:
            content = respond(request)
        except KermesError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=_NOT_CACHED)
        return content if isinstance(content, Response) else JSONResponse(content, headers=_NOT_CACHED)

    return endpoint


def _picture_tile(view: View, request: Request) -> Response:
    place, query = request.path_params, request.query_params
    try:
        layer = Layer(place["layer"])
    except ValueError:
        raise InputError(f"layer must be one of {', '.join(Layer)}, got {place['layer']!r}") from None
    tile = (layer, place["level"], place["column"], place["row"])
    is_final = view.pictures.is_final(*tile)
    brightness = float(np.clip(_number(query, "brightness", 0.0), -20, 20))
    content = view.pictures.tile(*tile, Look(band=query.get("band") or None, brightness=brightness))
    return Response(content, media_type="image/bmp", headers=_CACHED if is_final else _NOT_CACHED)


def _outline_tile(view: View, request: Request) -> Response:
    place = request.path_params
    colours = view.colouring(request.query_params.get("color", "outcome")).footprints
    content = view.outlines.tile(place["level"], place["column"], place["row"], colours)
    return Response(content, media_type="image/png", headers=_CACHED)


def _binary(content: bytes) -> Response:
    return Response(content, media_type="application/octet-stream", headers=_NOT_CACHED)


def _edit(view: View, respond: Callable[[Any], Any]) -> Callable[[Request], Any]:
    """Make an endpoint that changes something: of the page itself only, and only if the view may be edited."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get(_HEADER) != view.run:
            return JSONResponse({"error": "edits are taken from the page itself only"}, status_code=403)
        if view.edits_file is None:
            return JSONResponse({"error": "this view is read-only: start it with --edit"}, status_code=403)
        try:
            content = await request.json()
        except ValueError:
            return JSONResponse({"error": "the request must be JSON"}, status_code=400)
        try:
            return JSONResponse(await run_in_threadpool(respond, content), headers=_NOT_CACHED)
        except KermesError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=_NOT_CACHED)

    return endpoint


def _write(view: View) -> dict[str, Any]:
    assert view.edits_file is not None
    stem = view.edits_file.stem.removesuffix("_edits")
    path = view.edits_file.with_name(f"{stem}_edited.kermes")
    view.write(path, overwrite=True)
    return {"path": str(path)}


def make_app(view: View, hosts: list[str] | None = None) -> Starlette:
    """Make the application.

    Parameters
    ----------
    view : View
    hosts : list of str, optional
        Names under which it may be asked for; None: those of this machine for itself. Requests under other names are
        refused, because a page of somebody else might send them.
    """
    at_tile = "{level:int}/{column:int}_{row:int}"
    get: dict[str, Callable[[Request], Any]] = {
        "/api/result": lambda request: _description(view),
        "/api/state": lambda request: view.state(),
        "/api/positions": lambda request: _binary(_positions(view)),
        "/api/marks": lambda request: _binary(
            _marks(view, request.query_params.get("color", "outcome"), _conditions(request.query_params))
        ),
        "/api/legend": lambda request: view.colouring(request.query_params.get("color", "outcome")).legend,
        "/api/rows": lambda request: _rows(view, request.query_params),
        "/api/objects/{object_id:int}": lambda request: _object(view, request.path_params["object_id"]),
        "/api/objects/{object_id:int}/picture": lambda request: Response(
            view.picture(request.path_params["object_id"]), media_type="image/png", headers=_CACHED
        ),
        "/api/place": lambda request: _place(
            view, _number(request.query_params, "y", np.nan), _number(request.query_params, "x", np.nan)
        ),
        "/api/find": lambda request: _find(view, request.query_params.get("text", "")),
        "/tiles/footprints/" + at_tile: lambda request: _outline_tile(view, request),
        "/tiles/{layer}/" + at_tile: lambda request: _picture_tile(view, request),
    }
    post: dict[str, Callable[[Any], Any]] = {
        "/api/refit": lambda content: view.apply(Edit.of_json(content)),
        "/api/undo": lambda content: view.undo(),
        "/api/write": lambda content: _write(view),
    }
    static = resources.files("kermes.viewer") / "static"
    page = (static / "index.html").read_bytes()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # More would wait for each other, and take memory.
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        thread = threading.Thread(target=view.draw_missing, daemon=True)
        thread.start()
        yield
        view.stop.set()
        await run_in_threadpool(thread.join)

    return Starlette(
        lifespan=lifespan,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["localhost", "127.0.0.1", "::1"])],
        routes=[
            Route("/", lambda request: Response(page, media_type="text/html", headers={**_NOT_CACHED, **_OWN_ONLY})),
            *(Route(path, _answer(respond)) for path, respond in get.items()),
            *(Route(path, _edit(view, respond), methods=["POST"]) for path, respond in post.items()),
            Mount("/static", StaticFiles(directory=str(static))),
        ],
    )


def _free_socket(host: str, port: int | None) -> socket.socket:
    """Open a port: the one asked for, or the first that is free from `PORT` on."""
    tried = range(PORT, PORT + _PORTS_TRIED) if port is None else [port]
    for number in tried:
        opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, number))
        except OSError as error:
            opened.close()
            reason = error.strerror or str(error)
        else:
            return opened
    raise FileError(f"port must be free on {host}, got {port if port is not None else tried}: {reason}")


def serve(
    view: View,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until Ctrl-C.

    Parameters
    ----------
    view : View
    host : str, optional
        Address to listen on; the default is reached from this machine only.
    port : int, optional
        None: `PORT`, or the next that is free. 0: any.
    browser : bool, optional
        Open the page in a browser.
    ready : callable, optional
        Is given the address of the page when it can be opened.

    Raises
    ------
    FileError
        If the port is taken.
    """
    opened = _free_socket(host, port)
    number = opened.getsockname()[1]
    local = host in ("127.0.0.1", "localhost", "::1")
    address = f"http://{'localhost' if local else host}:{number}/"
    app = make_app(view, None if local else ["*"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    def tell() -> None:
        while not server.started and not server.should_exit:
            view.stop.wait(0.02)
        if server.started:
            ready(address)
            if browser:
                webbrowser.open(address)

    threading.Thread(target=tell, daemon=True).start()
    try:
        server.run(sockets=[opened])
    finally:
        view.stop.set()
        opened.close()
