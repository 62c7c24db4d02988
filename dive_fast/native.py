"""The one place that imports the compiled extension."""

import importlib
from types import ModuleType

from dive_fast.errors import InputError


def load() -> ModuleType:
    """The extension module `dive_fast._native`.

    Importing `dive_fast` never needs it; whatever does calls this at the moment of use.

    Raises:
        InputError: it was not built, or was built for another Python or C++ runtime; says how to build it.
    """
    try:
        return importlib.import_module("dive_fast._native")
    except ImportError as error:
        raise InputError(
            f"the compiled extension dive_fast._native cannot be imported ({error}). Build it from a source checkout "
            "with `pip install .` (or `pip install -e .` to work on it): that needs a C++20 compiler, fetches CMake "
            "where there is none, and adds the CUDA part where nvcc is on PATH. `dive-fast doctor` shows the result."
        ) from error
