"""One error that names every tensor of a checkpoint that does not fit a model."""

from collections.abc import Mapping, Sequence

NAMED_PER_KIND = 8
VOCABULARY_TENSORS = ("embed_tokens.weight", "lm_head.weight")


def require_fit(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, source: str
) -> None:
    """Compare a checkpoint's tensor names and shapes with those the model has.

    Args:
        found: shape by name, as stored.
        expected: shape by name, as the model wants it.
        source: the file or folder to name in the error.

    Raises:
        ValueError: if a tensor is missing, unexpected or misshapen; lists them all, up to
            ``NAMED_PER_KIND`` of each kind.
    """
    misshapen = [name for name in expected if differs(name, found, expected)]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": sorted(name for name in found if name not in expected),
        "misshapen": [
            f"{name} is {list(found[name])}, the model has {list(expected[name])}"
            for name in misshapen
        ],
    }
    problems = [listing(kind, names) for kind, names in kinds.items() if names]
    if not problems:
        return
    vocabulary = [
        name
        for name in misshapen
        if name.endswith(VOCABULARY_TENSORS) and found[name][0] != expected[name][0]
    ]
    if vocabulary:
        problems.append(
            f"vocabulary: the checkpoint has {found[vocabulary[0]][0]} tokens, the model "
            f"{expected[vocabulary[0]][0]}: they belong to different tokenizers"
        )
    raise ValueError("\n  ".join([f"{source} does not fit the model:", *problems]))


def differs(
    name: str, found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> bool:
    """Tell whether a tensor that both sides have is shaped differently."""
    return name in found and list(found[name]) != list(expected[name])


def listing(kind: str, names: Sequence[str]) -> str:
    """Return one line: the kind, how many, and the first names."""
    more = f" and {len(names) - NAMED_PER_KIND} more" if len(names) > NAMED_PER_KIND else ""
    return f"{kind} ({len(names)}): {', '.join(names[:NAMED_PER_KIND])}{more}"
