"""A page of a whole result in the browser: its picture to pan and zoom, its table, and each object in detail."""

from __future__ import annotations

import importlib
from typing import Any

from kermes.errors import InputError

__all__ = ["View", "serve"]

_NEEDED = ("starlette", "uvicorn", "PIL")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, and say what it needs."""
    if name not in __all__:
        raise AttributeError(f"module 'kermes.viewer' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module("kermes.viewer.server"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        raise InputError(f"the viewer needs {error.name}, which is not installed: pip install 'kermes[view]'") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
