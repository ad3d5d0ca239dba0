"""Near-duplicates: dialogues of one family and program that share nearly all of their words.

Two dialogues are near-duplicates when the Jaccard similarity of their three-word shingles, code
left out, is at least ``THRESHOLD`` (our default). Only dialogues of one bucket are compared, and
only those whose sizes allow the similarity.
"""

from collections import defaultdict
from typing import Any

from data_modules.zero_vision.lines import what_varies

SHINGLE_WORDS = 3
THRESHOLD = 0.9


class Seen:
    """Dialogues so far, by bucket."""

    def __init__(self) -> None:
        self.buckets: dict[tuple[str, str], list[frozenset[int]]] = defaultdict(list)

    def is_new(self, line: dict[str, Any]) -> bool:
        """Remember a dialogue; False if one like it was seen before."""
        provenance = line["provenance"]
        bucket = self.buckets[provenance["family"], provenance["program"]]
        own = shingles(what_varies(line))
        if any(alike(own, other) for other in bucket):
            return False
        bucket.append(own)
        return True


def shingles(text: str) -> frozenset[int]:
    """Return the hashes of a text's runs of three words."""
    words = text.split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(hash(tuple(words[n : n + SHINGLE_WORDS])) for n in range(last))


def alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Whether two sets are near-duplicates."""
    small, large = sorted((len(one), len(other)))
    if small < THRESHOLD * large:
        return False
    shared = len(one & other)
    return shared >= THRESHOLD * (len(one) + len(other) - shared)
