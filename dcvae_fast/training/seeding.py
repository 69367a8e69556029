"""Seeds from names and numbers, so that randomness needs no state of its own."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed; different parts, such as (seed, rank, images seen), give unrelated streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
