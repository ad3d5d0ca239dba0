"""A pool of gloo processes that stays for the session: starting one costs more than most cases."""

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["torch.distributed.fsdp", "lightning", "moonlit.phases.joint_pretraining"]


class Ranks:
    """Calling it runs a function on every rank and returns all answers."""

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, num_ranks, port, theirs))
            process.daemon = True
            process.start()
            theirs.close()  # or a rank that dies would not be noticed
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = [self.answer_of(rank) for rank in range(len(self.pipes))]
        if failures := [text for failed, text in answers if failed]:
            raise AssertionError("\n".join(failures))
        return [pickle.loads(answer) for _, answer in answers]

    def answer_of(self, rank: int) -> tuple[bool, Any]:
        try:
            if self.pipes[rank].poll(timeout=200):
                return self.pipes[rank].recv()
            return True, f"rank {rank} did not answer"
        except EOFError:
            self.processes[rank].join(timeout=5)
            code = self.processes[rank].exitcode
            return True, f"rank {rank} has died ({code}); its last words are on stderr"

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)


def serve(rank: int, num_ranks: int, port: int, pipe: Connection) -> None:
    import faulthandler

    import torch

    faulthandler.enable()

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0",
        LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks),
    )  # fmt: skip
    dist = torch.distributed
    is_first = rank == 0
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_first, wait_for_workers=False)
    for case in count():
        # A world for each case: a group has a thread that wakes a hundred times a second, and two
        # hundred of them left a core no time. Under a name of its own: the store keeps addresses.
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"case {case}", store), rank=rank,
            world_size=num_ranks, timeout=timedelta(seconds=150),
        )  # fmt: skip
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = pickle.dumps(function(*args, **kwargs))  # not torch's, which shares memory
            pipe.send((False, answer))
        except BaseException:
            pipe.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
        dist.destroy_process_group()
        gc.collect()  # of phases and meshes, which hold groups too
