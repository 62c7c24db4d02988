"""Checkpoints that are whole or not there.

A checkpoint counts once its manifest, written last, lists every file with size and hash. One that was cut short by a
crash or a full disk has no manifest, or one that does not match, and is passed over.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "dive_manifest.json"
PREFIX = "checkpoint-"


def write_manifest(folder: Path) -> None:
    """Declare `folder` complete: flush its files to disk, then write their sizes and hashes."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        entries[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    temporary = folder / f".{MANIFEST}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there, byte for byte."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in entries.items():
            path = folder / name
            if path.stat().st_size != size:
                return False
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError, AttributeError):
        return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, oldest step first, complete or not."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def newest_complete(output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or None."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if is_complete(folder)), None)


def rotate(output_dir: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (None: keep all) and the best one."""
    folders = checkpoints(output_dir)
    if not keep or len(folders) <= keep:
        return
    for folder in folders[:-keep]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)


def write_json(path: Path, content) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_adapter(model, folder: Path) -> None:
    """The active adapter of a PEFT model, whatever its name, file by file in place of older ones, never leaving half a
    file. A model card that is there already stays: PEFT's is a form to fill in."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        [name] = model.active_adapters
        model.save_pretrained(staging, selected_adapters=[name])
        # PEFT puts every adapter that is not called "default" into a folder of its name.
        for path in (staging if name == "default" else staging / name).iterdir():
            if path.name != "README.md" or not (folder / path.name).exists():
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
