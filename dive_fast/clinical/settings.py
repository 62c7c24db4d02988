"""Options that arrive as a mapping, from a YAML file, the command line or a call, as the dataclass that takes them."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TypeVar

from dive_fast.errors import InputError

Settings = TypeVar("Settings")


def read(cls: type[Settings], options: Mapping | Settings | None, argument: str) -> Settings:
    """`options` as a checked `cls`; None gives its defaults.

    Raises:
        InputError: not a mapping, an unknown key (with the nearest), a value that `cls` refuses; headed by `argument`.
    """
    if isinstance(options, cls):
        return options
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"{argument}: expected a mapping of options, got {type(options).__name__} {options!r}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in options or {}:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{argument}: there is no option {key!r}{hint} Known: {', '.join(known)}")
    try:
        return cls(**(options or {}))
    except InputError as error:
        raise InputError(f"{argument}.{error}") from error


def check_common(weights, device, batch_size) -> None:
    """The three options that every model of this room has."""
    if not isinstance(weights, str) or not weights:
        raise InputError(f"weights: expected a hub id or a local path, got {weights!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    if device is not None and not isinstance(device, str):
        raise InputError(f"device: expected a name such as 'cpu' or 'cuda:0', got {device!r}")
