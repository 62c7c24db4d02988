"""What a folder's files were made with: noted beside them, and compared before more are added.

One run never goes on with another's work; a refusal says what differs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dive_fast.errors import InputError

SHOWN = 4
"""Differences that a refusal names; the rest are counted."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_settings(file: Path, argument: str, way_out: str) -> dict:
    """The settings noted in `file`.

    Raises:
        InputError: it cannot be read, or holds something else; begins with `argument` and ends with `way_out`.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__} in place of an object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{argument}: {file} does not say what its folder was made with ({error}); {way_out}"
        ) from error
    return settings


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`key: theirs there, ours now; ...` for the values of two nested mappings that are not the same; "" for none.

    Values are compared as JSON has them, so that a tuple is a list; one that is missing is null. Hashes are cut short.
    """
    found = list(_differences(*(json.loads(json.dumps(settings)) for settings in (before, now)), ""))
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)


def _differences(before, now, name: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            inner = f"{name}.{key}" if name else key
            if key not in before and isinstance(now[key], dict):
                yield f"{inner}: not noted there"  # by an older version
            else:
                yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: {_shown(before)} there, {_shown(now)} now"


def _shown(setting) -> str:
    if isinstance(setting, str) and _SHA256.fullmatch(setting):
        return setting[:8]
    return json.dumps(setting, ensure_ascii=False)
