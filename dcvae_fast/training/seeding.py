"""Seeds from names and numbers, so that randomness needs no state of its own."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from such parts as (seed, rank, images seen), of which torch's CPU generator uses 32 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
