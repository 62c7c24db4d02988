"""Where images are opened and decoded: one place, one kind of error."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

from dive_fast.errors import InputError

_PATH_END = 3
"""Parts of a path that name a film: under patient and study in MIMIC-CXR, by one name in all of CheXpert's studies."""


class StoredImage:
    """An image that lies in a file of many, such as a `datasets.Dataset`; read anew whenever it is used.

    Args:
        read: () -> its encoded bytes, or the path of its file.
        key: names its content, for caches.
    """

    def __init__(self, read: Callable[[], bytes | str], key: str):
        self.read, self.key = read, key

    def __repr__(self):
        return f"StoredImage({self.key!r})"


def image_key(image, *, pixels: bool = False) -> list:
    """What tells an image of a record from another, wherever the data lie, for fingerprints: JSON values.

    A file counts by the end of its path and by its size, so that data may be moved as a whole; encoded bytes count by
    their content, and an image in memory by its size, since its pixels may not be decoded yet.

    Args:
        pixels: read those of an image in memory as well, which decodes it.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            size = path.stat().st_size
        except OSError:
            size = None
        return ["/".join(path.parts[-_PATH_END:]), size]
    if isinstance(image, StoredImage):
        return [image.key]
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    shape = list(getattr(image, "size", ())) if isinstance(getattr(image, "size", None), tuple) else []
    if pixels and shape:
        return [image.mode, *shape, hashlib.sha256(image.tobytes()).hexdigest()]
    return [type(image).__name__, *shape]


def load_image(image, *, record_id: str):
    """`image` (a path, a PIL image or a `StoredImage`) as a decoded RGB `PIL.Image.Image`.

    16-bit gray is scaled to 8 bits, not clipped.

    Raises:
        InputError: names the record and the file when it is missing, not an image, or cut short.
    """
    pil = pillow()
    if isinstance(image, StoredImage):
        image = image.read()
    if isinstance(image, bytes):
        image = open_bytes(image, record_id=f"record {record_id!r}")
    where = f"record {record_id!r}: image {image if isinstance(image, (str, Path)) else 'in memory'}"
    if not isinstance(image, (str, Path, pil.Image.Image)):
        raise InputError(f"record {record_id!r}: expected a path or a PIL image, got {type(image).__name__}")
    try:
        opened = image if isinstance(image, pil.Image.Image) else pil.Image.open(image)
        opened.load()
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file; mend the path in the data set") from error
    except pil.UnidentifiedImageError as error:
        raise InputError(f"{where}: not an image PIL can read; convert it to PNG or leave the record out") from error
    # PIL reports damaged files as OSError (cut short), SyntaxError (broken PNG chunks) or ValueError.
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise InputError(f"{where}: does not decode ({error}); copy the file again or leave the record out") from error
    if opened.mode.startswith("I"):
        opened = opened.convert("I").point(lambda value: value / 256).convert("L")
    return opened.convert("RGB")


def open_bytes(data: bytes, *, record_id: str):
    """A PIL image over encoded bytes; its pixels are decoded at first use."""
    pil = pillow()
    try:
        return pil.Image.open(io.BytesIO(data))
    except pil.UnidentifiedImageError as error:
        raise InputError(f"{record_id}: the image's bytes are not an image PIL can read") from error


def pillow():
    """PIL, imported when the first image is met; InputError where it is not installed."""
    try:
        import PIL
        from PIL import Image, ImageDraw  # noqa: F401 - loads the submodules used as attributes
    except ModuleNotFoundError as error:
        raise InputError("images need the package pillow, which is not installed. Run `pip install pillow`") from error
    return PIL
