"""The model that a run starts with: freshly drawn, or with the weights of an earlier phase.

Whole, for one process; or without memory, for a strategy that cuts it first and then fills the
parts: of the rest no rank ever holds more than one module (freshly drawn), one tensor (a
checkpoint's file, a release) or nothing (a checkpoint of shards). The bits are the same either way.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moonlit.distributed.checkpoint import load_weights
from moonlit.distributed.sharded_checkpoint import is_sharded
from moonlit.hub.reader import load_released
from moonlit.models.kimi import Kimi
from moonlit.models.placement import write


class InitialModel:
    """Builds the model of a run.

    Args:
        build: makes the network, freshly drawn, on the current device.
        init_from: weights to start with: a checkpoint, or a folder in the released layout.
    """

    def __init__(self, build: Callable[[], Kimi], init_from: str | None) -> None:
        self.build = build
        self.init_from = None if init_from is None else Path(init_from)
        self.twin: Kimi | None = None
        self.random_state: Tensor | None = None

    def __call__(self) -> Kimi:
        """Build it whole."""
        model = self.build()
        if self.init_from is not None:
            self.load(model, shapes_of(model))
        return model

    def empty(self) -> Kimi:
        """Build it without memory, to be cut and then filled."""
        self.random_state = torch.get_rng_state()
        with torch.device("meta"):
            self.twin = self.build()
            return self.build()

    @torch.no_grad()
    def fill(self, model: Kimi) -> None:
        """Give what is left of the empty model on this rank its weights. Every rank must call this.

        Args:
            model: from ``empty``, cut and materialised.

        Raises:
            RuntimeError: if the ranks would start from different weights.
        """
        assert self.twin is not None, "empty() first"
        assert self.random_state is not None
        require_same_start(self.identity())
        if self.init_from is not None:
            self.load(model, shapes_of(self.twin))
            return
        parameters = model.state_dict()
        torch.set_rng_state(self.random_state)
        for name, tensor in drawn(self.twin):
            if name in parameters:
                write(parameters[name], tensor)

    def load(self, model: Kimi, shapes: Mapping[str, torch.Size]) -> None:
        """Read the weights into a model, or into this rank's part of it."""
        assert self.init_from is not None
        released = self.init_from.is_dir() and not is_sharded(self.init_from)
        (load_released if released else load_weights)(model, self.init_from, shapes=shapes)

    def identity(self) -> str:
        """Say what the weights are a function of."""
        if self.init_from is not None:
            return f"init_from={self.init_from}"
        assert self.random_state is not None, "empty() first"
        digest = hashlib.sha256(self.random_state.numpy().tobytes()).hexdigest()
        return f"seed {digest[:12]}"


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every entry of a model's state dict."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def drawn(twin: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Draw the weights of a model on the meta device, module by module.

    The random numbers are those that the model would have been built with: its modules draw when
    they are made, in the order in which they stand. A module's memory goes when the next one comes.

    Yields:
        Names as in the state dict, and whole tensors on the CPU.
    """
    saved = twin.state_dict().keys()
    for path, module in twin.named_modules():
        prefix = f"{path}." if path else ""
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        names = [name for name, _ in own if prefix + name in saved]
        if not names:
            continue
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
        for name in names:
            yield prefix + name, getattr(module, name).detach()
        module.to_empty(device="meta", recurse=False)


def require_same_start(identity: str) -> None:
    """Refuse ranks that would start from different weights.

    Raises:
        RuntimeError: naming two of them.
    """
    if not dist.is_initialized():
        return
    identities: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(identities, identity)
    if different := sorted(set(identities) - {identities[0]}):
        raise RuntimeError(
            f"the ranks would start from different weights, {identities[0]} and {different[0]}: "
            "give every rank the same seed and the same init_from"
        )
