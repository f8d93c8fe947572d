"""ImageNet-C's 15 common corruptions at five severities, from the library `imagecorruptions`.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv 1903.12261. Deviation: images keep their sizes, whereas the paper crops them to 224 x 224 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_hf.data.prepared import require
from symphony_hf.errors import ConfigError, nearest

from .edits import seed_of
from .text import check_severity

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 224
"""Side in pixels for which the severities are defined, such as the radius of a blur."""

_FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
"""Corruptions without randomness."""

_OWN_SEED = ("impulse_noise", "glass_blur")
"""Corruptions that take a seed; the others draw from numpy's global generator."""


@dataclass(frozen=True)
class ImageAttack:
    """One corruption of images, by its name in the library, and its kind: noise, blur, weather or digital."""

    name: str
    kind: str

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return self.name not in _FIXED

    def __call__(self, image: "Image", severity: int, *, seed: int = 0, name: str = "") -> "Image":
        """Corrupt an RGB image, scaled by `enlarged`. The result has the same size.

        The image's name also seeds the randomness, so that the result is independent of other images and their order.

        Raises:
            ConfigError: If the severity is out of range, or a side has fewer than 32 pixels.
            DataError: If the library is not installed.
        """
        import PIL.Image

        check_severity(severity)
        if min(image.size) < 32:
            raise ConfigError(
                f"attack {self.name}: an image has {image.width} x {image.height} pixels, and each side needs 32: "
                "enlarge it first"
            )
        corrupt = _library().corrupt
        number = seed_of(self.name, seed, name) % 2**32
        options = {"seed": number} if self.name in _OWN_SEED else {}
        with _numpy_seeded(number):
            pixels = corrupt(np.asarray(image), severity=severity, corruption_name=self.name, **options)
        return PIL.Image.fromarray(pixels)


_BY_KIND = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}

IMAGE_ATTACKS = {name: ImageAttack(name, kind) for kind, names in _BY_KIND.items() for name in names}
"""Corruptions by name."""


def find_image_attack(name: str) -> ImageAttack:
    """Return the corruption with a name, or raise ConfigError with the nearest name."""
    if name not in IMAGE_ATTACKS:
        raise ConfigError(f"attack: no attack on images is named {name!r}; {nearest(name, IMAGE_ATTACKS)}")
    return IMAGE_ATTACKS[name]


def enlarged(image: "Image") -> "Image":
    """Enlarge an image so that its shorter side has at least 224 pixels, for which the severities are defined.

    The clean form is enlarged too, so that the corruption is the only difference.
    """
    import PIL.Image

    factor = _SIDE / min(image.size)
    if factor <= 1:
        return image
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def library_version() -> str:
    """Return the version of the corruptions, on which results depend. Raises DataError without the library."""
    from importlib.metadata import version

    _library()
    return version("imagecorruptions-imaug")


def _library() -> Any:
    require("imagecorruptions", "corrupted images", extra="images")
    import imagecorruptions

    return imagecorruptions


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator for the library, which takes none of its own, and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
