"""OCR: a text against the true one."""

from rapidfuzz.distance import Levenshtein

MAX_CHARS = 100_000


def ocr(answer: str, truth: str) -> float:
    """One minus the edit distance over the longer length; white space counts as one blank.

    Source: arXiv:2602.02276, Sec. 4.4.2 (normalised edit distance); dividing by the longer of the
    two is ours. A longer answer than needed costs what it adds.
    """
    said, wanted = " ".join(answer[:MAX_CHARS].split()), " ".join(truth.split())
    return Levenshtein.normalized_similarity(said, wanted)
