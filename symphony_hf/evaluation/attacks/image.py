"""ImageNet-C's 15 common corruptions at five severities, by the library `imagecorruptions`.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv 1903.12261. Deviation: an image keeps its own size, where the paper crops all to 224 x 224 pixels.
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
"""Pixels. What the severities are made for: the reach of a blur, the size of a snowflake."""

_FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
"""Leave nothing to chance."""

_OWN_SEED = ("impulse_noise", "glass_blur")
"""Take a seed; the others draw from numpy's global generator."""


@dataclass(frozen=True)
class ImageAttack:
    """One corruption.

    Attributes:
        name: As commands and the library take it.
        kind: noise, blur, weather or digital.
    """

    name: str
    kind: str

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another image."""
        return self.name not in _FIXED

    def __call__(self, image: "Image", severity: int, *, seed: int = 0, name: str = "") -> "Image":
        """Corrupt one image.

        Args:
            image: In three colours. Best scaled by `enlarged` before.
            severity: From 1 to 5.
            seed: Seed of noise, snow, and the places where glass breaks.
            name: Name of the image, also a seed, so that the result does not depend on other images or their order.

        Returns:
            An image of the same size.

        Raises:
            ConfigError: If there is no such severity, or a side has fewer than 32 pixels.
            DataError: If the library is not installed.
        """
        import PIL.Image

        check_severity(severity)
        if min(image.size) < 32:
            raise ConfigError(
                f"attack {self.name}: an image of {image.width} x {image.height} pixels, where each side must have 32: "
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
"""By name."""


def find_image_attack(name: str) -> ImageAttack:
    """The attack of a name.

    Raises:
        ConfigError: If there is none, with the nearest name.
    """
    if name not in IMAGE_ATTACKS:
        raise ConfigError(f"attack: no attack on images is named {name!r}; {nearest(name, IMAGE_ATTACKS)}")
    return IMAGE_ATTACKS[name]


def enlarged(image: "Image") -> "Image":
    """An image whose shorter side has 224 pixels at least, which the severities are made for; a larger one as it is.

    The clean form is enlarged likewise, so that it differs from the corrupted one in nothing else.
    """
    import PIL.Image

    factor = _SIDE / min(image.size)
    if factor <= 1:
        return image
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def library_version() -> str:
    """Of the corruptions, which results depend on.

    Raises:
        DataError: If the library is not installed.
    """
    from importlib.metadata import version

    _library()
    return version("imagecorruptions-imaug")


def _library() -> Any:
    require("imagecorruptions", "corrupted images", extra="images")
    import imagecorruptions

    return imagecorruptions


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """The library takes no generator, so numpy's global one is set, and put back as it was."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
