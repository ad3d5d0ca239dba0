"""Rewards of ``verifiers`` environments: their own scoring functions over our rollouts.

Written against version 1 of the interface (package 0.4.0), where an environment is a taskset whose
tasks score a trace. The package is no dependency, see ``data_modules.tasks.verifiers``.
"""

from functools import lru_cache
from typing import Any

from moonlit.agents.environment import VerifierError
from moonlit.batch import Task, Trajectory

ENVIRONMENT = "verifiers"
"""Environment of their tasks."""


class VerifiersJudge:
    """Scores an answer as its environment does; each weighted reward is one of ours by its name.

    Without an answer every reward is 0: an environment is only asked about answers.
    """

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the rewards.

        Raises:
            VerifierError: if the task is none of theirs, or its scorer fails.
        """
        if task.environment != ENVIRONMENT:
            raise VerifierError(f"environment {task.environment!r}: want {ENVIRONMENT!r}")
        if trajectory.stop_reason != "answer":
            return {ENVIRONMENT: 0.0}
        theirs = task_of(task.answer)
        trace = trace_of(theirs, task, trajectory)
        try:
            await theirs.score(trace)
        except Exception as error:
            raise VerifierError(
                f"{task.answer['name']}: {type(error).__name__}: {error}"
            ) from error
        trajectory.metrics |= {k: float(v) for k, v in trace.metrics.items() if v is not None}
        return {name: reward.value for name, reward in trace.rewards.items()}


def loaded_environment(name: str, config: dict[str, Any]) -> Any:
    """Load an environment.

    Raises:
        ModuleNotFoundError: if the package is missing, saying how to get it.
    """
    return cached_environment(name, tuple(sorted(config.items())))


@lru_cache(maxsize=8)
def cached_environment(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    """Load an environment once."""
    try:
        import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
        from verifiers.v1.envs.single_agent import (  # pyright: ignore[reportMissingImports]
            SingleAgentEnvConfig,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: environments of verifiers want its package: uv pip install verifiers==0.4.0"
        ) from error
    return vf.load_environment(SingleAgentEnvConfig(taskset={"id": name, **dict(config)}))


def task_of(truth: dict[str, Any]) -> Any:
    """Return the environment's task that a truth describes."""
    taskset = loaded_environment(truth["name"], truth["config"]).taskset
    kind = type(taskset).task_type()
    return kind(kind.data_type().model_validate(truth["data"]), taskset.config.task)


def trace_of(theirs: Any, task: Task, trajectory: Trajectory) -> Any:
    """Return a rollout in the form that scorers read: the prompt and the answer."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
    from verifiers.v1.configs.agent import AgentConfig  # pyright: ignore[reportMissingImports]
    from verifiers.v1.graph import MessageNode  # pyright: ignore[reportMissingImports]
    from verifiers.v1.trace import AgentInfo, TraceTask  # pyright: ignore[reportMissingImports]

    said = [{"role": one.role, "content": one.words} for one in task.prompt]
    said.append({"role": "assistant", "content": trajectory.text})
    trace = vf.Trace(
        task=TraceTask(type=type(theirs).__name__, data=theirs.data),
        agent=AgentInfo(config=AgentConfig()),
    )
    for place, message in enumerate(said):
        parent = place - 1 if place else None
        is_answer = place == len(said) - 1
        trace.nodes.append(MessageNode(parent=parent, message=message, sampled=is_answer))
    return trace


def require_scorable(theirs: Any) -> None:
    """Refuse a task that a dialogue without tools cannot work on.

    Raises:
        ValueError: naming what it wants.
    """
    import inspect

    kind = type(theirs)
    wants = [
        *(["a container"] if kind.NEEDS_CONTAINER else []),
        *(["tools"] if kind.toolsets(theirs.config) else []),
        *(["a prompt (its user speaks first)"] if theirs.data.prompt is None else []),
    ]
    for hook in (*theirs.hooks("reward"), *theirs.hooks("metric")):
        parameter = inspect.signature(hook).parameters.get("runtime")
        if parameter is not None and parameter.default is inspect.Parameter.empty:
            wants.append(f"a runtime for {hook.__name__}")
    if wants:
        raise ValueError(f"task {theirs.data.idx} of {kind.__name__} wants {', '.join(wants)}")
