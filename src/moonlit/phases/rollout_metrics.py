"""What an RL iteration is judged by: rewards and lengths of its answers, ratios of its tokens."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moonlit.batch import Group, Task
from moonlit.chat.messages import Image, VideoChunk
from moonlit.losses.policy_gradient import ratio_bounds

SHARE = "rl/share_"
"""Of the judged answers, by domain and modality."""
QUANTILES = {"05": 0.05, "50": 0.5, "95": 0.95}
Notes = dict[str, list[float]]
"""Name of a metric -> a value for each answer, or group, that has one."""


def notes_of(groups: Sequence[Group], *, version: int) -> Notes:
    """Note of every answer: reward, by environment, domain and modality, length, staleness, error.

    And of every group whether its rewards differ: only such a one teaches.

    Args:
        groups: of one rank.
        version: of the weights that were trained on them.
    """
    notes: Notes = defaultdict(list)

    def note(name: str, value: int | float) -> None:
        notes[name].append(value)

    for group in groups:
        kind = "picture" if shows_media(group.task) else "text"
        note("rl/teaching_groups", float(group.teaches))
        for one in group.trajectories:
            note("rl/error_fraction", float(one.error is not None))
            if one.error is not None:
                continue
            for key in ("mean", group.task.environment, group.task.domain, kind):
                note(f"rl/reward_{key}", one.reward)
            for key in (group.task.domain, kind):
                note(f"{SHARE}{key}", 1.0)
            note("rl/tokens_per_answer", one.num_tokens)
            note("rl/finished_fraction", float(one.stop_reason == "answer"))
            note("rl/staleness", version - oldest_version(one.segments, version))
            for name, value in one.metrics.items():
                note(f"rl/{name}", value)
    return dict(notes)


def group_metrics(notes_of_ranks: Iterable[Notes]) -> dict[str, float]:
    """Return the mean of every metric over the answers of all ranks; of shares, their sum."""
    together: Notes = defaultdict(list)
    for notes in notes_of_ranks:
        for name, values in notes.items():
            together[name] += values
    num_judged = len(together.get("rl/reward_mean", ()))
    return {
        name: sum(values) / (num_judged if name.startswith(SHARE) else len(values))
        for name, values in together.items()
    }


def token_metrics(sampled: Mapping[str, Sequence[Tensor]], objective: Any) -> dict[str, Tensor]:
    """Return how far policy and sampler are apart on one rank's tokens.

    Args:
        sampled: ``log_ratio`` and ``entropy`` of sampled tokens, ``ptx`` of kept rows: each
            one's summed loss and its trained tokens.
        objective: whose bounds say which tokens were masked, if it has any.
    """
    metrics: dict[str, Tensor] = {}
    if kept := sampled.get("ptx"):
        nll_sum, num_tokens = torch.stack(list(kept)).sum(dim=0)
        metrics["rl/ptx_nll_per_token"] = nll_sum / num_tokens.clamp(min=1)
    log_ratio = torch.cat(list(sampled["log_ratio"]))
    if not len(log_ratio):
        return metrics
    metrics |= {
        "rl/entropy": torch.cat(list(sampled["entropy"])).mean(),
        "rl/log_ratio_abs_mean": log_ratio.abs().mean(),  # engine and trainer, and staleness
        "rl/kl_behavior": (log_ratio.exp() - 1 - log_ratio).mean(),
        **{f"rl/ratio_p{name}": log_ratio.quantile(q).exp() for name, q in QUANTILES.items()},
    }
    bounds = getattr(objective, "keywords", {})
    if "low" in bounds:
        low, high = ratio_bounds(bounds["low"], bounds["high"], bounds.get("bounds_on", "ratio"))
        ratio = log_ratio.exp()
        masked = (ratio < low) | (ratio > high)
        metrics["rl/masked_fraction"] = masked.float().mean()
    return metrics


def shows_media(task: Task) -> bool:
    """Whether a task's prompt has a picture or a clip."""
    return any(
        isinstance(part, Image | VideoChunk) for message in task.prompt for part in message.parts
    )


def oldest_version(segments: Sequence[Any], version: int) -> int:
    """Return the oldest version that sampled a token."""
    versions = [v for segment in segments for v in segment.policy_versions if v >= 0]
    return min(versions, default=version)
