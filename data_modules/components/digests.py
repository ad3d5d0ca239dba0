"""Digests that name corpora and plans by everything they are a function of."""

import hashlib


def digest(*parts: bytes) -> str:
    """Return sixteen hexadecimal digits that change with any part."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()[:16]
