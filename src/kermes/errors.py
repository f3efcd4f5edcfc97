"""What kermes raises on purpose, and how it warns.

A class exists where somebody will catch it. Every message names the argument, what it must be and what it is.
"""


class KermesError(Exception):
    """Base of everything that kermes raises on purpose."""


class InputError(KermesError, ValueError):
    """An argument or the content of a file cannot be used."""


class ShapeError(InputError):
    """An array has the wrong shape, or two arrays do not fit together."""


class ConfigError(InputError):
    """A setting is unknown, has the wrong type or lies outside its range."""


class FileError(KermesError, OSError):
    """A file is missing, unreadable, damaged or cannot be written."""


class BlendError(KermesError, ArithmeticError):
    """One blend cannot be modelled as asked; the tile steps down the ladder and goes on."""


class DataWarning(UserWarning):
    """Input that can be used but looks wrong."""
