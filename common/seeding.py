"""Seeds as arithmetic: every random choice follows from (seed, purpose, position), so resuming needs no stored random state."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, position: int = 0) -> int:
    """A 63-bit seed that depends on all three arguments; neighbouring positions give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
