"""ImageNet-C's corruptions: all there, stronger with severity, and the same for the same image and seed."""

import numpy as np
import pytest
from PIL import Image

from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.image import IMAGE_ATTACKS, enlarged, find_image_attack
from symphony_hf.evaluation.attacks.text import SEVERITIES


@pytest.fixture(scope="module")
def image():
    """A landscape of colours with edges, as photographs have them."""
    across, down = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 48))
    disk = ((across - 0.5) ** 2 + (down - 0.4) ** 2 < 0.05) * 0.4
    pixels = np.stack([across * 0.6 + disk, down * 0.7, (across * down + disk) / 2], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8))


def distance(image, other):
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_the_names_are_those_of_the_benchmark():
    from imagecorruptions import get_corruption_names

    assert list(IMAGE_ATTACKS) == get_corruption_names("common")
    for kind in ("noise", "blur", "weather", "digital"):
        assert [name for name, attack in IMAGE_ATTACKS.items() if attack.kind == kind] == get_corruption_names(kind)


@pytest.mark.thorough
@pytest.mark.parametrize("name", IMAGE_ATTACKS)
def test_a_corruption_keeps_the_size_and_grows_with_severity(name, image):
    corrupted = [IMAGE_ATTACKS[name](image, severity) for severity in (1, 5)]
    assert {(other.size, other.mode) for other in corrupted} == {(image.size, "RGB")}
    mild, strong = (distance(image, other) for other in corrupted)
    assert mild > 0
    if name != "elastic_transform":  # the benchmark's own turns from wide bends to narrow ones
        assert strong > mild


@pytest.mark.thorough
@pytest.mark.parametrize("name", IMAGE_ATTACKS)
def test_seed_and_name_decide_alone(name, image):
    attack = IMAGE_ATTACKS[name]
    np.random.seed(3)
    once = attack(image, 3, seed=1, name="a")
    after = np.random.rand()
    np.random.seed(4)
    assert distance(once, attack(image, 3, seed=1, name="a")) == 0
    np.random.seed(3)
    assert np.random.rand() == after  # numpy's own numbers go on as if nothing had been
    random = {"noise", "weather"} | {"glass_blur", "motion_blur", "elastic_transform"}
    if name in random or (attack.kind in random and name != "brightness"):
        assert distance(once, attack(image, 3, seed=2, name="a")) > 0
        assert distance(once, attack(image, 3, seed=1, name="b")) > 0


def test_small_images_are_enlarged_to_what_the_severities_are_made_for(image):
    assert enlarged(image).size == (299, 224)
    assert enlarged(Image.new("RGB", (8, 8))).size == (224, 224)
    large = Image.new("RGB", (500, 224))
    assert enlarged(large) is large


def test_what_cannot_be_corrupted_is_refused(image, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean `gaussian_noise`"):
        find_image_attack("gausian_noise")
    with pytest.raises(ConfigError, match="an image has 31 x 40 pixels, and each side needs 32: enlarge it"):
        IMAGE_ATTACKS["fog"](image.resize((31, 40)), 1)
    with pytest.raises(ConfigError, match="severity must be"):
        IMAGE_ATTACKS["fog"](image, len(SEVERITIES) + 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"need imagecorruptions-imaug, .* pip install 'symphony-hf\[images\]'"):
        IMAGE_ATTACKS["fog"](image, 1)
