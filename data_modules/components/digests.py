"""Digests that name corpora and plans by everything they are a function of."""

import hashlib

from moonlit.chat.tokenizer import Tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of a tokenizer's ranks."""
    return digest(*(b"%d" % rank + token for token, rank in tokenizer.ranks.items()))


def digest(*parts: bytes) -> str:
    """Return sixteen hexadecimal digits that change with any part."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()[:16]
