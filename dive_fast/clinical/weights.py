"""Where published weights lie: on this machine, or on the hub."""

import hashlib
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dive_fast.errors import InputError

RRG_SCORERS = "StanfordAIMI/RRG_scorers"
"""The hub repository that holds `radgraph.tar.gz`, `radgraph-xl.tar.gz` and `chexbert.pth`."""

# A hub id is owner/name; anything longer, or with a leading dot or tilde, can only be meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
# What a repository holds, and is never called.
_FILES = (".pth", ".pt", ".th", ".gz", ".safetensors")


def is_hub_id(weights: str) -> bool:
    """Whether `weights` names a hub repository; what exists on this machine does not, nor does a file of weights."""
    return bool(_HUB_ID.fullmatch(weights)) and not weights.endswith(_FILES) and not Path(weights).exists()


def download(repository: str, filename: str) -> Path:
    """`filename` of a hub repository in the hub's own cache.

    Raises:
        InputError: it cannot be downloaded, with what the hub's client says.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=repository, filename=filename))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        raise InputError(
            f"weights: {filename} of {repository!r} cannot be downloaded ({_one_line(error)}); download it on a "
            "machine with a connection and name the local path"
        ) from error


def unpacked(archive: Path, name: str) -> Path:
    """The folder `name` with the content of a downloaded .tar.gz, unpacked once below ~/.cache/dive_fast.

    Raises:
        InputError: a damaged archive, or a cache that cannot be written.
    """
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path.home() / ".cache" / "dive_fast" / f"weights-{digest}" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(work, filter="data")
            work.chmod(0o755)
            # Another process may have been first; its folder holds the same.
            if not folder.is_dir():
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"weights: {archive} cannot be unpacked into {folder} ({_one_line(error)}); download it again, or free "
            "disk space"
        ) from error
    return folder


def fingerprint(files: Iterable[Path]) -> str:
    """sha256 over names and contents of files, whatever folder they lie in."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
