"""Encoded images, in files or in memory, and their decoding."""

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_hf.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

EncodedImage = dict[str, Any]
"""Image as `datasets` stores it: `path` of a file, or its `bytes`."""

_SMALL = (64, 64)
"""Width and height, in pixels, to check JPEG files at: the whole file is read, in a fraction of the time."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error)
"""Exceptions that Pillow raises for a file that is not an image, or is truncated."""


IMAGE_PROBLEMS = ("a missing image", "an image that does not decode")
"""Beginnings of the problems of images."""


def image_problem(path: Path) -> str:
    """Read a whole image file and return its problem: empty, or `<what>: <which>`."""
    import PIL.Image

    if not path.is_file():
        return f"{IMAGE_PROBLEMS[0]}: {path}"
    try:
        with PIL.Image.open(path) as image:
            image.draft(None, _SMALL)
            image.load()
    except (*_BROKEN, PIL.Image.DecompressionBombError) as error:
        return f"{IMAGE_PROBLEMS[1]}: {path} ({error})"
    return ""


def encoded_problem(image: Mapping[str, Any]) -> str:
    """Return the problem of an image in a file; one in memory was encoded by this module."""
    return image_problem(Path(image["path"])) if image["bytes"] is None else ""


def decode(image: EncodedImage) -> "Image":
    """Decode one image as RGB. Raises DataError if it does not decode any more."""
    import datasets

    try:
        return _as_rgb(datasets.Image().decode_example(image))
    except _BROKEN as error:
        raise DataError(
            f"{image['path'] or 'an image'} does not decode any more ({error}): it was changed after it was checked"
        ) from error


def _as_rgb(image: "Image") -> "Image":
    """Convert to RGB. Gray values of 16 bits, as of X-rays and depth, are scaled, where Pillow would clip them."""
    if image.mode.startswith("I"):
        import numpy as np
        import PIL.Image

        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            image = PIL.Image.fromarray((pixels.clip(0, 65535) / 257).round().astype("uint8"))
    return image.convert("RGB")


def handwritten_digits() -> tuple[list[EncodedImage], list[int]]:
    """Load scikit-learn's handwritten digits: PNG files of 8 x 8 pixels in memory, and the digits that they show."""
    import PIL.Image
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = [
        _as_png(PIL.Image.fromarray((square * (255 / 16)).astype("uint8"))) for square in pixels.reshape(-1, 8, 8)
    ]
    return images, [int(digit) for digit in digits]


def blank_image(size: tuple[int, int]) -> "Image":
    """Return a gray image to try a processor with. Size: width and height, in pixels."""
    import PIL.Image

    return PIL.Image.new("RGB", size, (127, 127, 127))


def _as_png(image: "Image") -> EncodedImage:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"path": None, "bytes": file.getvalue()}
