"""A sub-agent without a model: a tool's calls on what its task names, or a fault as often as told.

For tests, and for training an orchestrator on a machine where a second model would be slow.
"""

import random
import time
from collections.abc import Sequence

from moonlit.agents.environment import RunEndingError
from moonlit.agents.swarm.reward import WORK
from moonlit.agents.swarm.swarm import Swarm
from moonlit.agents.toolbox import Toolbox
from moonlit.agents.tools import Toolset, tool_message
from moonlit.batch import Span, Task, Trajectory
from moonlit.chat.messages import Message, ToolCall


class OneCall:
    """Calls one tool with what its task names, and repeats what the tool says.

    That is what stands after the last colon, else the last word.

    Args:
        toolbox: lends the tool.
        tool: its name.
        argument: the name of its one argument; a whole number is given as such.
        success_probability: that an attempt does not crash; drawn from the attempt's seed.
        values: of the argument, a call each, one after another; ``{}`` is what the task names.
    """

    def __init__(
        self,
        *,
        toolbox: Toolbox,
        tool: str,
        argument: str,
        success_probability: float = 1.0,
        values: Sequence[str] = ("{}",),
    ) -> None:
        if not 0 <= success_probability <= 1:
            raise ValueError(f"success_probability={success_probability}: want it in [0, 1]")
        if not values:
            raise ValueError("values=[]: want at least one, such as '{}'")
        self.toolbox, self.tool, self.argument = toolbox, tool, argument
        self.success_probability, self.values = success_probability, tuple(values)

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: Swarm
    ) -> Trajectory:
        """Make the calls.

        Raises:
            ConnectionError: as often as it is to fail.
            RunEndingError: if its toolbox does not lend the tool.
        """
        began_s = time.time()
        if random.Random(seed).random() >= self.success_probability:
            raise ConnectionError("the sub-agent was lost")
        named = named_in(prompt[-1].words)
        messages: list[Message] = []
        found: list[str] = []
        async with self.toolbox(task) as tools:
            self.require_tool(tools)
            for place, form in enumerate(self.values):
                given = form.replace("{}", named)
                value = int(given) if given.isascii() and given.isdigit() else given
                call_id = f"functions.{self.tool}:{place}"
                call = ToolCall(self.tool, {self.argument: value}, call_id)
                output = await tools.run(call)
                messages += [
                    Message(role="assistant", content="", tool_calls=[call]),
                    tool_message(self.tool, call_id, output),
                ]
                found += [output.text] if output.error is None else []
        text = "\n".join(found)
        messages.append(Message(role="assistant", content=text))
        return Trajectory(
            segments=[],
            messages=messages,
            spans=[Span(began_s, time.time())] * len(messages),
            stop_reason="answer",
            text=text,
            metrics={WORK: float(len(found))},
        )

    def require_tool(self, tools: Toolset) -> None:
        """Refuse a toolbox without the tool: no attempt could succeed."""
        if self.tool not in (names := [tool.name for tool in tools.tools]):
            there_are = ", ".join(names) or "none"
            raise RunEndingError(f"OneCall: tool={self.tool!r}: its toolbox lends {there_are}")


def named_in(text: str) -> str:
    """Return what stands after a text's last colon, else its last word."""
    _, colon, behind = text.rpartition(":")
    words = behind.split()
    return (" ".join(words) if colon else "".join(words[-1:])).strip(".,;?!")
