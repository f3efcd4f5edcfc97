"""Settings of kermes as settings of a pipeline task."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from lsst.pex import config as pex_config

from kermes.config import Config, config_from_dict, field_docstrings


def _field(kind: Any, default: Any, doc: str) -> pex_config.Field:
    if typing.get_origin(kind) is Literal:
        allowed = {choice: choice for choice in typing.get_args(kind)}
        return pex_config.ChoiceField(dtype=str, default=default, allowed=allowed, doc=doc)
    return pex_config.Field(dtype=kind, default=default, doc=doc)


def _config_class(settings: Any, meanings: Mapping[str, str], prefix: str = "") -> type[pex_config.Config]:
    """Make a class with a field for each field of a dataclass, of the same name, default and meaning."""
    kinds = typing.get_type_hints(type(settings))
    members: dict[str, Any] = {"__doc__": type(settings).__doc__, "__module__": __name__}
    for item in dataclasses.fields(settings):
        default, name = getattr(settings, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(default):
            own = _config_class(default, meanings, f"{name}.")
            globals()[own.__name__] = own  # a class must be found by its name, for pickle
            members[item.name] = pex_config.ConfigField(dtype=own, doc=meanings[name])
        else:
            members[item.name] = _field(kinds[item.name], default, meanings[name])
    name = f"{type(settings).__name__}Fields"
    return types.new_class(name, (pex_config.Config,), exec_body=lambda body: body.update(members))


ConfigFields = _config_class(Config(), field_docstrings(Config()))
"""All settings of `kermes.config.Config`, under the same names."""


def config_of_fields(fields: Any) -> Config:
    """Make the settings of what a task was configured with.

    Raises
    ------
    ConfigError
        Naming every value that lies outside its range.
    """
    return config_from_dict(fields.toDict(), origin="the configuration of the task")
