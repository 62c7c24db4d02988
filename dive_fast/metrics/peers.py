"""The two things some metrics need that may be missing: pycocoevalcap and Java."""

import importlib
import shutil
from types import ModuleType

from dive_fast.errors import InputError


def pycocoevalcap(module: str) -> ModuleType:
    """`pycocoevalcap.<module>`.

    Raises:
        InputError: pycocoevalcap is not installed.
    """
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise InputError(
            "metrics: bleu, rouge_l, cider, meteor and the protocol 'ptb' are computed by pycocoevalcap, which cannot "
            f"be imported ({error}); install it with `pip install pycocoevalcap`"
        ) from error


def java(wanted_by: str) -> str:
    """Path of the `java` command.

    Raises:
        InputError: there is none on PATH.
    """
    path = shutil.which("java")
    if path is None:
        raise InputError(
            f"{wanted_by} runs a Java program, but no `java` command is on PATH; install a Java runtime 8 or later "
            "(`apt install default-jre-headless`, `conda install openjdk`, `brew install openjdk`), or leave it out: "
            "bleu, rouge_l and cider with the protocols raw, lower, r2gen and r2gen_mimic need no Java"
        )
    return path
