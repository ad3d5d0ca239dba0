"""What is learnt from the segments of a group: each sampled token and its advantage."""

from collections.abc import Sequence
from dataclasses import dataclass

from moonlit.batch import Group, Segment
from moonlit.losses.policy_gradient import group_advantages


@dataclass(frozen=True, slots=True)
class TrainedSegment:
    """A segment and what its sampled tokens are worth."""

    segment: Segment
    advantage: float
    is_trained: list[bool]
    """True at sampled tokens that are learnt from."""


def trained_segments(
    groups: Sequence[Group], *, version: int, max_token_staleness: int | None, normalise: bool
) -> list[TrainedSegment]:
    """Give every sampled token of a group the advantage of its rollout.

    Rollouts that their environment lost are no part of the baseline: they say nothing of a policy.

    Args:
        groups: with final rewards.
        version: of the weights that are about to be trained.
        max_token_staleness: tokens sampled more versions ago are context only (k1.5 leaves older
            segments out of the loss); None: all are trained.
        normalise: divide advantages by the group's deviation, as GRPO does and K2.5 does not.
    """
    trained = []
    for group in groups:
        sound = [one for one in group.trajectories if one.error is None]
        advantages = group_advantages([one.reward for one in sound], normalise=normalise)
        for trajectory, advantage in zip(sound, advantages, strict=True):
            for segment in trajectory.segments:
                is_trained = [
                    sampled
                    and (max_token_staleness is None or version - born <= max_token_staleness)
                    for sampled, born in zip(
                        segment.is_sampled, segment.policy_versions, strict=True
                    )
                ]
                trained.append(TrainedSegment(segment, advantage, is_trained))
    return trained
