"""Seeds derived from names and numbers, so that checkpoints need no generator states."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for parts such as (seed, images shown). torch's CPU generator uses 32 bits of it."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
