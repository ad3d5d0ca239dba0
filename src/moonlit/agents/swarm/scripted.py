"""A sub-agent without a model: one tool call on what its task names, or a fault as often as told.

For tests, and for training an orchestrator on a machine where a second model would be slow.
"""

import random
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from moonlit.agents.swarm.reward import WORK
from moonlit.agents.swarm.subagent import says
from moonlit.agents.tools import Toolset, tool_message
from moonlit.batch import Span, Task, Trajectory
from moonlit.chat.messages import Message, ToolCall


class OneCall:
    """Calls one tool with the last word of its task, and repeats what the tool says.

    Args:
        tools: lends the tool.
        tool: its name.
        argument: the name of its one argument; a whole number is given as such.
        success_probability: that an attempt does not crash; drawn from the attempt's seed.
    """

    def __init__(
        self,
        *,
        tools: Callable[[Task], AbstractAsyncContextManager[Toolset]],
        tool: str,
        argument: str,
        success_probability: float = 1.0,
    ) -> None:
        if not 0 <= success_probability <= 1:
            raise ValueError(f"success_probability={success_probability}: want it in [0, 1]")
        self.tools, self.tool, self.argument = tools, tool, argument
        self.success_probability = success_probability

    async def work(self, prompt: list[Message], task: Task, *, seed: int) -> Trajectory:
        """Make the call.

        Raises:
            ConnectionError: as often as it is to fail.
        """
        began_s = time.time()
        if random.Random(seed).random() >= self.success_probability:
            raise ConnectionError("the sub-agent was lost")
        words = says(prompt[-1]).split()
        word = words[-1].strip(".,;?!") if words else ""
        value = int(word) if word.isascii() and word.isdigit() else word
        call = ToolCall(self.tool, {self.argument: value}, f"functions.{self.tool}:0")
        async with self.tools(task) as tools:
            output = await tools.run(call)
        found = output.error is None
        messages = [
            Message(role="assistant", content="", tool_calls=[call]),
            tool_message(self.tool, f"functions.{self.tool}:0", output),
            Message(role="assistant", content=output.text if found else ""),
        ]
        return Trajectory(
            segments=[],
            messages=messages,
            spans=[Span(began_s, time.time())] * len(messages),
            stop_reason="answer",
            text=output.text if found else "",
            metrics={WORK: float(found)},
        )
