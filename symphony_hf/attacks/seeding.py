"""Random numbers that depend on what is attacked alone: not on other documents, their order, or the machine."""

import hashlib


def seed_of(attack: str, seed: int, name: str) -> int:
    """A seed of 256 bits.

    Args:
        attack: Its name, so that two attacks do not hit the same places.
        seed: The user's.
        name: Of the document or image. The severity is left out: what a lower one changes, a higher one changes too;
            but for aaa, which draws the places of a line together.
    """
    # surrogatepass: a name may be that of a file, which need not be valid text.
    digest = hashlib.sha256(f"{attack} {seed} {name}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest, "big")
