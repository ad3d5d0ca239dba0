"""How much of what: mixtures, nested ones too, and the stages of a run.

A mixture names shares of sources. It may be nested, to any depth::

    {"web": {"share": 0.7, "of": {"english": 0.6, "chinese": 0.4}}, "code": 0.3}

Only ratios among neighbours count; 0 leaves one out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shape of an optimizer step."""

    row_tokens: int
    rows_per_step: int
    """Over all ranks."""

    def __post_init__(self) -> None:
        for key in ("row_tokens", "rows_per_step"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: want 1 or more")

    @property
    def step_tokens(self) -> int:
        """Tokens of a whole step."""
        return self.row_tokens * self.rows_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How much of what."""

    text: Mapping[str, float]
    """Shares of the text documents' tokens, by source; only their ratios count."""
    vision: Mapping[str, float]
    """Shares of the vision tokens, by source; only their ratios count."""
    vision_share: float
    """Vision tokens over all tokens of the run."""
    injection_point: float
    """The fraction of the steps that is text only; the rest holds the more vision for it."""

    def __post_init__(self) -> None:
        for name, weights in (("text", self.text), ("vision", self.vision)):
            if not weights or min(weights.values()) <= 0:
                raise ValueError(f"{name}_mixture={dict(weights)}: want weights above 0")
        if not 0 <= self.injection_point < 1:
            raise ValueError(f"injection_point={self.injection_point}: want it in [0, 1)")
        if not 0 <= self.vision_share <= 1 - self.injection_point:
            raise ValueError(
                f"vision_share={self.vision_share} with injection_point={self.injection_point}: "
                f"want it in [0, {1 - self.injection_point:g}], or the steps after the injection "
                "would hold more vision tokens than tokens"
            )

    @property
    def sources(self) -> list[str]:
        """Text sources, then vision sources: the numbers in ``PIECE_DTYPE``."""
        return [*self.text, *self.vision]

    def first_vision_step(self, num_steps: int) -> int:
        """Steps before this one are text only."""
        return round(self.injection_point * num_steps)

    def share_after_injection(self, num_steps: int) -> float:
        """Vision share of the steps that hold any: the run's vision tokens in fewer steps.

        About ``vision_share / (1 - injection_point)``: 10, 20 and 50 % in the report's early, mid
        and late arms (Table 1).
        """
        num_vision_steps = num_steps - self.first_vision_step(num_steps)
        return self.vision_share * (num_steps / num_vision_steps)  # exact where there is no delay

    def stages(self, geometry: Geometry, num_steps: int) -> list["Stage"]:
        """Return the run: text only, if the vision comes later, and then the mixture."""
        first = self.first_vision_step(num_steps)
        share = self.share_after_injection(num_steps)
        steps = [(0, 0.0), (first, share)] if first else [(0, share)]
        return [
            Stage(
                first_step=step,
                text=self.text,
                vision=self.vision,
                vision_share=share,
                geometry=geometry,
            )
            for step, share in steps
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What holds from one step of the run on.

    Raises:
        ValueError: if a number makes no sense.
    """

    first_step: int
    text: Mapping[str, float]
    """Shares of the text documents' tokens, by source: the documents of it without media."""
    vision: Mapping[str, float]
    """Shares of the vision tokens, by source: the documents of it with media."""
    vision_share: float
    """Vision tokens over all tokens of each step."""
    geometry: Geometry

    def __post_init__(self) -> None:
        if not 0 <= self.vision_share <= 1:
            raise ValueError(f"vision_share={self.vision_share}: want it in [0, 1]")
        if not self.text:
            raise ValueError("text_mixture is empty: something has to fill the rows")
        if self.vision_share and not self.vision:
            raise ValueError(f"vision_share={self.vision_share} with an empty vision_mixture")


def sources_of(stages: Sequence[Stage]) -> list[str]:
    """Sources of all stages, text first: the numbers in ``PIECE_DTYPE``."""
    names = [name for stage in stages for name in stage.text]
    names += [name for stage in stages for name in stage.vision]
    return list(dict.fromkeys(names))


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse stages that do not follow one another from step 0 on."""
    firsts = [stage.first_step for stage in stages]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"stages begin at the steps {firsts}: want 0 first, and each one later")


def flat(mixture: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the share of each source of a nested mixture, in order; together 1.

    Args:
        mixture: shares, or ``{"share", "of"}`` for a mixture inside.
        key: what to call it in an error.

    Raises:
        ValueError: if a share is negative, nothing has one, or a source stands in two places.
    """
    shares = {name: share_of(value, f"{key}.{name}") for name, value in mixture.items()}
    total = sum(shares.values())
    if mixture and total <= 0:
        raise ValueError(f"{key}={dict(mixture)}: want a share above 0")
    leaves: dict[str, float] = {}
    for name, value in mixture.items():
        inner = {name: 1.0}
        if isinstance(value, Mapping):
            inner = flat(value["of"], f"{key}.{name}.of")
        for source, share in inner.items():
            if source in leaves:
                raise ValueError(f"{key} names the source {source!r} twice")
            leaves[source] = share * shares[name] / total
    return {name: share for name, share in leaves.items() if share}


def share_of(value: Any, key: str) -> float:
    """Return the share of one entry.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, Mapping):
        if set(value) != {"share", "of"} or not isinstance(value["of"], Mapping):
            raise ValueError(f"{key}={dict(value)}: want a share, or share and of")
        value = value["share"]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key}={value!r}: want a share of 0 or more")
    return float(value)
