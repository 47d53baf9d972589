"""The errors this project raises on purpose. Everything else that escapes is a bug.

A message says what was wrong, the value that was found, what is allowed, and what to do next.
"""


class MatGPTQError(Exception):
    """Base of all errors raised on purpose."""


class InputError(MatGPTQError, ValueError):
    """The caller asked for something that cannot be had; other input would work."""


class FormatError(MatGPTQError, ValueError):
    """A file is not what its name or its index promises; the file has to be replaced."""


class UnsupportedError(MatGPTQError, RuntimeError):
    """This model, machine or library version cannot do it, whatever the input."""
