"""Rollouts to rewards with everything real but the policy: processes, sandbox and HTTP judge.

They run in the rollouts' own thread, where signals and child processes are not at home.
"""

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from data_modules.tasks.equations import Equations
from data_modules.tasks.programs import Programs
from data_modules.tasks.source import TRAIN
from moonlit.batch import Task
from moonlit.chat.messages import Message
from moonlit.rl.dialogue_environment import DialogueEnvironment
from moonlit.rl.loop_thread import LoopThread
from moonlit.rl.rewards.code import CodeTests
from moonlit.rl.rewards.grm.endpoint import Endpoint
from moonlit.rl.rewards.grm.judge import GenerativeJudge
from moonlit.rl.rewards.grm.retries import Retries
from moonlit.rl.rewards.mathematics import Mathematics
from moonlit.rl.rewards.rules import RuleJudge
from moonlit.rl.rollout_manager import RolloutManager
from tests.rl.rewards.judge_server import Server
from tests.rl.scripted import Scripted, conversation, says


@contextmanager
def serving(server: Server) -> Iterator[Endpoint]:
    """Serve from a thread of its own."""
    thread, stack = LoopThread("server"), AsyncExitStack()
    url = thread.run(stack.enter_async_context(server.running())).url
    yield endpoint(url.removesuffix("/chat/completions"))
    thread.run(stack.aclose())
    thread.close()


def endpoint(base_url: str) -> Endpoint:
    return Endpoint(
        base_url=base_url, model="referee", api_key_env=None, timeout_s=20.0, max_concurrent=4,
        requests_per_s=None, max_tokens=64, temperature=0.0, body={},
    )  # fmt: skip


def collected(tasks: list[Task], answers: list[str], judge: GenerativeJudge) -> list[list[float]]:
    """The verified rewards and the scores of two answers to each task, one after the other."""
    rules = {"mathematics": Mathematics(timeout_s=60.0, memory_bytes=2 << 30),
             "code": CodeTests(timeout_s=20.0)}  # fmt: skip
    manager = RolloutManager(
        task_of=lambda number: tasks[number % len(tasks)],
        environment=DialogueEnvironment(judge=RuleJudge(rules=rules)),
        group_judge=judge,
        policy=conversation(Scripted(*map(says, answers))),
        group_size=2,
    )
    found = []
    for _ in tasks:
        (group,) = manager.collect(1)
        assert [one.error for one in group.trajectories] == [None, None]
        found.append([one.verified_reward for one in group.trajectories])
        found.append([one.metrics["grm"] for one in group.trajectories])
    manager.close()
    assert rules["mathematics"].process is None
    assert not rules["code"].is_open
    return found


def test_equations_programs_and_talk_are_judged_in_the_rollouts_thread():
    equation = Equations(seed=0, largest=9, picture_fraction=0.0, picture_side=28)(TRAIN, 0)
    program = Programs(seed=0, num_tests=2)(TRAIN, 0)
    talk = Task(
        prompt=[Message(role="user", content="A colour?")], domain="chat", environment="exact",
        answer="red",
    )  # fmt: skip
    returns = {test["call"]: test["expected"] for test in program.answer["tests"]}
    known = f"def solve(xs): return {returns!r}['solve(%s)' % xs]"
    answers = [
        f"\\boxed{{{equation.answer}}}", "\\boxed{100}",
        known, "exit(0)",
        "red", "blue",
    ]  # fmt: skip
    server = Server(lambda first, second: 10 if first < second else 0)
    with serving(server) as model:
        judge = GenerativeJudge(
            model=model, rubrics={"default": ["Be good."]}, weight=0.2, num_rubrics=1, rounds=1,
            max_answer_chars=2000, canary_every=1, max_canary_score=None, max_cached=10,
            retries=Retries(max_attempts=2, backoff_s=0.01, max_backoff_s=0.1),
        )  # fmt: skip
        verified = collected([equation, program, talk], answers, judge)

    assert verified[::2] == [[1.0, 0.0]] * 3
    assert all(sorted(scores) == [0.0, 1.0] for scores in verified[1::2])
    assert verified[5] == [0.0, 1.0]  # "blue" comes before "red": the judge's own taste
    assert judge.model.session is None
