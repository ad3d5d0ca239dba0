"""What is refused before a run begins, with the numbers; and what a plan is a function of."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from data_modules.components.mixture import Geometry, Mixture, Stage, sources_of

Index = Mapping[str, np.ndarray]
"""For each source one ``INDEX_DTYPE`` row a document."""
MAX_STEP_ERROR, MAX_RUN_ERROR, SETTLED_STEPS = 0.01, 0.0005, 100
"""The contract: a step's share, and the run's after so many steps, to within these."""


def check_feasible(index: Index, stages: Sequence[Stage]) -> None:
    """Refuse a mixture that cannot hold its share, with the numbers."""
    for name in sources_of(stages):
        if name not in index:
            raise ValueError(f"the mixture names source {name!r}; the corpus has {sorted(index)}")
    for stage in stages:
        for name in stage.text:
            if index[name]["num_vision_tokens"].all():
                raise ValueError(f"text_mixture names {name!r}, whose documents all have media")
        for name in stage.vision:
            if not index[name]["num_vision_tokens"].any():
                raise ValueError(f"vision_mixture names {name!r}, whose documents have no media")
        if stage.vision_share:
            check_sizes(index, stage)
            check_share(index, stage)


def check_share(index: Index, stage: Stage) -> None:
    """Refuse a share above that of the documents with media themselves."""
    tokens_per_vision_token = [1 / vision_density(index[name]) for name in stage.vision]
    most = 1 / np.average(tokens_per_vision_token, weights=list(stage.vision.values()))
    if stage.vision_share > most:
        raise ValueError(
            f"the mixture asks for {stage.vision_share:.1%} vision tokens in each step from step "
            f"{stage.first_step} on, but of the tokens of documents with media only {most:.1%} "
            "are vision tokens: the rest is their text"
        )


def vision_density(rows: np.ndarray) -> float:
    """Vision tokens over all tokens of the documents with media."""
    with_media = rows["num_vision_tokens"] > 0
    num_tokens = rows["num_tokens"].sum(where=with_media, dtype=np.int64)
    return float(rows["num_vision_tokens"].sum(dtype=np.int64) / num_tokens)


def check_sizes(index: Index, stage: Stage) -> None:
    """Refuse a document too long for a row, or with more vision tokens than a step may hold."""
    geometry, share = stage.geometry, stage.vision_share
    for name in stage.vision:
        sizes = index[name]["num_vision_tokens"]
        lengths = np.where(sizes > 0, index[name]["num_tokens"], 0)
        if lengths.max() > geometry.row_tokens:
            raise ValueError(
                f"row_tokens={geometry.row_tokens} is less than the {lengths.max()} tokens of "
                f"document {name}/{lengths.argmax()}, which has media and is never cut"
            )
        if sizes.max() > share * geometry.step_tokens:
            raise ValueError(
                f"a step of {geometry.step_tokens} tokens may hold "
                f"{share * geometry.step_tokens:.0f} vision tokens, but document "
                f"{name}/{sizes.argmax()} alone has {sizes.max()}: raise rows_per_step"
            )


def epochs_needed(
    index: Index, stages: Sequence[Stage], num_steps: int
) -> dict[str, dict[str, float]]:
    """Return how often a run reads each source, by ``text`` and ``vision``, to within a document.

    Args:
        index: of every source.
        stages: of the run.
        num_steps: its length.
    """
    firsts = [min(stage.first_step, num_steps) for stage in stages]
    needed: dict[str, dict[str, float]] = {"text": {}, "vision": {}}
    for stage, (first, last) in zip(stages, pairwise([*firsts, num_steps]), strict=True):
        vision = (last - first) * stage.geometry.step_tokens * stage.vision_share
        total = sum(stage.vision.values())
        beside = 0.0
        for name, share in stage.vision.items():
            mine = vision * share / total
            beside += mine / vision_density(index[name]) if mine else 0.0
            there = index[name]["num_vision_tokens"].sum(dtype=np.int64)
            needed["vision"][name] = needed["vision"].get(name, 0.0) + mine / float(there)
        text = (last - first) * stage.geometry.step_tokens - beside
        total = sum(stage.text.values())
        for name, share in stage.text.items():
            without_media = index[name]["num_vision_tokens"] == 0
            there = index[name]["num_tokens"].sum(where=without_media, dtype=np.int64)
            mine = text * share / total / float(there)
            needed["text"][name] = needed["text"].get(name, 0.0) + mine
    return needed


def check_epochs(
    index: Index, stages: Sequence[Stage], max_epochs: Mapping[str, float], num_steps: int
) -> None:
    """Refuse a run that reads a source more often than it may.

    Raises:
        ValueError: naming the source, with how often it would be read.
    """
    for name, most in max_epochs.items():
        if most <= 0:
            raise ValueError(f"max_epochs.{name}={most}: want more than 0")
        if name not in sources_of(stages):
            raise ValueError(f"max_epochs names {name!r}: the mixture has {sources_of(stages)}")
    for kind, needed in epochs_needed(index, stages, num_steps).items():
        for name, epochs in needed.items():
            most = max_epochs.get(name, float("inf"))
            if epochs > most:
                raise ValueError(
                    f"{num_steps} steps would read the {kind} of source {name!r} {epochs:.2f} "
                    f"times, max_epochs.{name}={most:g}: lower its share to {most / epochs:.1%} of "
                    f"what it is, or make the run shorter"
                )


def check_contract(
    vision_of_step: np.ndarray, tokens_of_step: np.ndarray, target: np.ndarray
) -> None:
    """Refuse a plan whose steps miss their share of vision tokens.

    Args:
        vision_of_step: vision tokens of each step.
        tokens_of_step: tokens of each step.
        target: share of each step.

    Raises:
        ValueError: with the step that is furthest away, or with the run's share.
    """
    error = np.abs(vision_of_step / tokens_of_step - target)
    worst = int(error.argmax())
    if error[worst] > MAX_STEP_ERROR:
        raise ValueError(
            f"step {worst} would hold {vision_of_step[worst] / tokens_of_step[worst]:.2%} vision "
            f"tokens, vision_share is {target[worst]:.2%}: a document has too many of them for a "
            f"step of {tokens_of_step[worst]:,} tokens; raise rows_per_step"
        )
    wanted = np.cumsum(target * tokens_of_step)
    missed = np.abs(np.cumsum(vision_of_step) - wanted) / np.cumsum(tokens_of_step)
    if len(missed) > SETTLED_STEPS and missed[SETTLED_STEPS:].max() > MAX_RUN_ERROR:
        worst = SETTLED_STEPS + int(missed[SETTLED_STEPS:].argmax())
        raise ValueError(
            f"after {worst + 1} steps the vision tokens would be {missed[worst]:.3%} of all "
            f"tokens away from vision_share; raise rows_per_step"
        )


def corpus_digest(index: Index, sources: Sequence[str]) -> str:
    """Digest of the documents that a plan draws from."""
    digest = hashlib.sha256()
    for name in sources:
        digest.update(np.ascontiguousarray(index[name]).data.cast("B"))
    return digest.hexdigest()[:16]


def stages_fingerprint(
    index: Index, stages: Sequence[Stage], max_epochs: Mapping[str, float], *, seed: int
) -> dict[str, str]:
    """Say by name what a plan of stages is a function of; it is not one of the run's length."""
    told = {f"corpus.{name}": corpus_digest(index, [name]) for name in sources_of(stages)}
    told |= {"seed": str(seed), "max_epochs": json.dumps(dict(max_epochs))}
    for stage in stages:
        at = f" from step {stage.first_step}" if len(stages) > 1 else ""
        told[f"text_mixture{at}"] = json.dumps(dict(stage.text))
        told[f"vision_mixture{at}"] = json.dumps(dict(stage.vision))
        told[f"vision_share{at}"] = repr(stage.vision_share)
        told[f"row_tokens{at}"] = str(stage.geometry.row_tokens)
        told[f"rows_per_step{at}"] = str(stage.geometry.rows_per_step)
    return told


def fingerprint(
    index: Index, mixture: Mixture, geometry: Geometry, *, seed: int, num_steps: int
) -> dict[str, str]:
    """Say by name what a plan is a function of; equal fingerprints give equal plans.

    The number of steps counts only where it places the injection: a longer run of the same plan
    begins with the same steps.
    """
    return {
        "corpus": corpus_digest(index, mixture.sources),
        "seed": str(seed),
        "text_mixture": json.dumps(dict(mixture.text)),
        "vision_mixture": json.dumps(dict(mixture.vision)),
        "vision_share": repr(mixture.share_after_injection(num_steps)),
        "first_vision_step": str(mixture.first_vision_step(num_steps)),
        "row_tokens": str(geometry.row_tokens),
        "rows_per_step": str(geometry.rows_per_step),
    }
