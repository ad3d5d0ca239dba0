"""Work beside what a rank goes on to do: on a CUDA stream of its own, elsewhere on a thread."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Background:
    """Runs one piece of work after the other; autocast is on there where it is on here.

    Args:
        device: where the work's tensors lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "background") if self.stream is None else None

    def start(
        self, work: Callable[[], Result], tensors: Callable[[Result], Iterable[Tensor]]
    ) -> Callable[[], Result]:
        """Begin work that reads what was computed until now.

        Args:
            work: must not communicate.
            tensors: of its result, which are handed to the caller's stream.

        Returns:
            What waits for the work and returns its result, or raises what it raised.
        """
        if self.thread is not None:
            autocast = torch.autocast(
                self.device.type,
                dtype=torch.get_autocast_dtype(self.device.type),
                enabled=torch.is_autocast_enabled(self.device.type),
            )
            return self.thread.submit(autocast(work)).result
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = work()
        return partial(self._hand_over, result, tensors)

    def _hand_over(self, result: Result, tensors: Callable[[Result], Iterable[Tensor]]) -> Result:
        """Let the caller's stream wait for this one, and own the result's tensors with it."""
        assert self.stream is not None
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self.stream)
        for tensor in tensors(result):
            tensor.record_stream(here)
        return result
