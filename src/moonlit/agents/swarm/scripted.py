"""A sub-agent without a model: it opens the page its task names, or fails as often as it is told.

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


class PageReader:
    """Reads one page and repeats what it says.

    Args:
        tools: lends ``open``.
        success_probability: that an attempt does not crash; drawn from the attempt's seed.
    """

    def __init__(
        self,
        *,
        tools: Callable[[Task], AbstractAsyncContextManager[Toolset]],
        success_probability: float = 1.0,
    ) -> None:
        if not 0 <= success_probability <= 1:
            raise ValueError(f"success_probability={success_probability}: want it in [0, 1]")
        self.tools, self.success_probability = tools, success_probability

    async def work(self, prompt: list[Message], task: Task, *, seed: int) -> Trajectory:
        """Open the page that the last word of the task names.

        Raises:
            ConnectionError: as often as it is to fail.
        """
        began_s = time.time()
        if random.Random(seed).random() >= self.success_probability:
            raise ConnectionError("the sub-agent was lost")
        words = says(prompt[-1]).split()
        title = words[-1].strip(".,;?!") if words else ""
        call = ToolCall("open", {"title": title}, "functions.open:0")
        async with self.tools(task) as tools:
            output = await tools.run(call)
        found = output.error is None
        messages = [
            Message(role="assistant", content="", tool_calls=[call]),
            tool_message("open", "functions.open:0", output),
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
