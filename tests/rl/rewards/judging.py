"""A generative judge, and answers for it to compare."""

import asyncio
from typing import Any

from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.rl.rewards.grm.judge import GenerativeJudge
from moonlit.rl.rewards.grm.retries import Retries
from tests.rl.rewards.judge_server import Server

QUALITY = {"good": 9, "fair": 5, "poor": 1}


def by_quality(first: str, second: str) -> int:
    """A sound judge: it knows three answers, and takes all else for worthless."""
    gap = QUALITY.get(first, 0) - QUALITY.get(second, 0)
    return max(0, min(10, 5 + gap // 2))


def task(**changes: Any) -> Task:
    prompt = [Message(role="user", content="How are you?")]
    return Task(
        **{"prompt": prompt, "domain": "chat", "environment": "talk", "answer": "good"} | changes
    )


def rollout(text: str, reward: float = 0.0, stop_reason: str = "answer") -> Trajectory:
    return Trajectory(
        segments=[], messages=[], spans=[], stop_reason=stop_reason, text=text, reward=reward
    )


def make(model: Any, **changes: Any) -> GenerativeJudge:
    settings = {
        "model": model, "rubrics": {"default": ["Be good."]}, "weight": 0.2, "num_rubrics": 1,
        "rounds": 1, "max_answer_chars": 200, "canary_every": 0, "max_canary_score": None,
        "max_cached": 100, "retries": Retries(max_attempts=3, backoff_s=0.01, max_backoff_s=0.05),
    }  # fmt: skip
    return GenerativeJudge(**settings | changes)


def judged(
    server: Server, *rollouts: Trajectory, endpoint: dict[str, Any] | None = None, **changes: Any
) -> GenerativeJudge:
    """Judge one group by a server."""

    async def run() -> GenerativeJudge:
        async with server.running(**endpoint or {}) as model:
            judge = make(model, **changes)
            await judge.judge_group(task(), rollouts, step=0, seed=7)
            return judge

    return asyncio.run(run())
