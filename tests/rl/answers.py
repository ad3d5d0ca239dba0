"""Groups of answers of which only reward and length matter."""

from moonlit.batch import Group, Segment, Task, Trajectory


def group(
    *answers: tuple[float, int], kind: str = "counting", domain: str = "d", lost: int = 0
) -> Group:
    """A group from the rewards and lengths of its answers; ``lost`` more were lost to a fault."""
    some = [
        Trajectory(
            segments=[Segment(input_ids=[1] * n, is_sampled=[True] * n,
                              behavior_logprobs=[0.0] * n, policy_versions=[0] * n)],
            messages=[], spans=[], stop_reason="answer", reward=reward,
        )
        for reward, n in answers
    ]  # fmt: skip
    some += [
        Trajectory(segments=[], messages=[], spans=[], stop_reason="error", error="lost")
        for _ in range(lost)
    ]
    task = Task(prompt=[], domain=domain, environment=kind, answer=1)
    return Group(task=task, trajectories=some)
