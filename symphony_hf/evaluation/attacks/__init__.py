"""Attacks on a model's inputs: changed letters and words in text, and ImageNet-C's corruptions of images."""

from .files import AttackedFile, attack_file
from .image import IMAGE_ATTACKS, ImageAttack, enlarged, find_image_attack, library_version
from .text import SEVERITIES, TEXT_ATTACKS, TextAttack, attack_documents, check_severity, find_text_attack

__all__ = [
    "IMAGE_ATTACKS",
    "SEVERITIES",
    "TEXT_ATTACKS",
    "AttackedFile",
    "ImageAttack",
    "TextAttack",
    "attack_documents",
    "attack_file",
    "check_severity",
    "enlarged",
    "find_image_attack",
    "find_text_attack",
    "library_version",
]
