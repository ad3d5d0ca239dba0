"""An orchestrator by script over real sub-agents: what the tests of a swarm share."""

import asyncio
import inspect

from data_modules.tasks.wide_facts import WideFacts, open_pages
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.scripted import OneCall
from moonlit.batch import Trajectory
from moonlit.rl.rewards.rules import RuleJudge
from moonlit.rl.swarm_environment import SwarmEnvironment
from tests.rl.scripted import SPECIAL, TOKENIZER, Scripted, conversation

TASK = WideFacts(seed=0, min_people=3, max_people=3)("train", 7)
NAMES = [name for name, _ in TASK.answer]
READER = OneCall(toolbox=open_pages, tool="open", argument="title")


def calls(*named: tuple[str, str], first: int = 0) -> list[int]:
    ids = [SPECIAL.tool_calls_section_begin_id]
    for place, (name, arguments) in enumerate(named, start=first):
        ids += [
            SPECIAL.tool_call_begin_id,
            *TOKENIZER.encode(f"functions.{name}:{place}"),
            SPECIAL.tool_call_argument_begin_id,
            *TOKENIZER.encode(arguments),
            SPECIAL.tool_call_end_id,
        ]
    return [*ids, SPECIAL.tool_calls_section_end_id, SPECIAL.im_end_id]


def creates(n: int) -> tuple[str, str]:
    return "create_subagent", f'{{"name": "w{n}", "system_prompt": "read"}}'


def assigns(n: int, prompt: str) -> tuple[str, str]:
    return "assign_task", f'{{"agent": "w{n}", "prompt": "{prompt}"}}'


PARALLEL = calls(
    *map(creates, range(3)), *(assigns(n, f"age of {name}") for n, name in enumerate(NAMES))
)


def untyped(kind: type, **settings: object) -> object:
    """Make a part as a run does: without the type checks that tests add."""
    made = object.__new__(kind)
    inspect.unwrap(kind.__init__)(made, **settings)
    return made


def environment(worker=READER, *, faults=None, toolbox=open_pages, **limits) -> SwarmEnvironment:
    return SwarmEnvironment(
        workers=worker if isinstance(worker, dict) else {"w": worker},
        toolbox=toolbox,
        judge=RuleJudge(),
        reward=ParlReward(parallel_weight=0.1, finish_weight=0.1, annealed_by=0.5, cap=2),
        limits=SwarmLimits(**limits),
        faults=faults,
    )


def run(*turns: list[int], worker=READER, seed: int = 3, **settings) -> Trajectory:
    policy = conversation(Scripted(*turns), max_turns=6)
    return asyncio.run(environment(worker, **settings).run(TASK, policy, seed=seed))


def found(n: int) -> str:
    """What a reader's result says: who, what, and where it stood."""
    name, age = TASK.answer[n]
    return f"w{n}: {name} {age}\n[pages: {name}]"


def told(trajectory: Trajectory) -> list[str]:
    return [m.parts[0].text for m in trajectory.messages if m.role == "tool"]
