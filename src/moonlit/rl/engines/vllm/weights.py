"""A trainer's weights on their way to vLLM servers: fetched from here, or read from a folder.

Both hold the released layout. What was sent last is kept, for a server that comes back has none.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import rmtree

import torch
from aiohttp import web
from safetensors.torch import save
from torch import Tensor

from moonlit.chat.tokenizer import Tokenizer
from moonlit.hub.released_layout import ReleasedTensor, released_tensors
from moonlit.hub.writer import save_released
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.sync import whole
from moonlit.rl.engines.vllm.server import VllmServer
from moonlit.rl.engines.wire import MAX_PART_BYTES, SECRET_HEADER


class Gathered(Mapping[str, Tensor]):
    """A module's tensors by name, whole: every rank of a mesh must ask, in the same order."""

    def __init__(self, module: Kimi) -> None:
        self.tensors = module.state_dict()
        self.last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self.last is None or self.last[0] != name:
            self.last = (name, whole(self.tensors[name]).detach())
        return self.last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def layout_of(module: Kimi) -> list[ReleasedTensor]:
    """Return what the module's release holds, in order."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    family = "deepseek_v3" if module.vision_shape is None else "kimi_k25"
    return released_tensors(shapes, family)


def gather_all(module: Kimi) -> None:
    """Take part in the gathering of each tensor, where nothing is kept."""
    weights = Gathered(module)
    for name in dict.fromkeys(tensor.parameter for tensor in layout_of(module)):
        weights[name]


class ServedWeights:
    """Parts in this process' memory, behind an HTTP server that vLLM's workers ask.

    Args:
        secret: that they must bear.
    """

    def __init__(self, secret: str) -> None:
        self.secret, self.label = secret, ""
        self.parts: list[bytes] = []
        self.runner: web.AppRunner | None = None
        self.port = 0

    def made(self, module: Kimi, label: str) -> Callable[[], None]:
        """Make the parts of new weights, in the trainer's own dtype; return what exchanges them."""
        dtype = next(module.parameters()).dtype
        parts = list(parts_of(layout_of(module), Gathered(module), dtype))

        def exchange() -> None:
            self.parts, self.label = parts, label

        return exchange

    async def into(self, server: VllmServer) -> None:
        """Let a server's workers fetch them, through vLLM's update interface."""
        await self.start()
        host = socket.gethostname() if not is_local(server.url) else "127.0.0.1"
        first = f"http://{host}:{self.port}/{self.label}"
        urls = [f"{first}/{place}" for place in range(len(self.parts))]
        await server.load(urls, {SECRET_HEADER: self.secret}, self.label)

    async def start(self) -> None:
        """Serve, from the first time on, on a free port of every interface."""
        if self.runner is not None:
            return
        application = web.Application()
        application.add_routes([web.get("/{label}/{place}", self.part)])
        self.runner = web.AppRunner(application)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "0.0.0.0", 0)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def part(self, request: web.Request) -> web.Response:
        """Give one part to who bears the secret."""
        if request.headers.get(SECRET_HEADER) != self.secret:
            return web.Response(status=403, text="not of this job: wrong secret")
        label, place = request.match_info["label"], request.match_info["place"]
        if label != self.label or not place.isdecimal() or int(place) >= len(self.parts):
            return web.Response(status=404, text=f"no part {place} of weights {label}")
        return web.Response(body=self.parts[int(place)])

    async def close(self) -> None:
        """Serve no more."""
        if self.runner is not None:
            await self.runner.cleanup()


class WrittenWeights:
    """A folder on a file system that all servers see.

    Args:
        folder: each sync has one of its own in it; the last is deleted when the next is there.
        tokenizer: the one the model was trained with.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer, self.label = folder, tokenizer, ""
        self.current: Path | None = None

    def made(self, module: Kimi, label: str) -> Callable[[], None]:
        """Write new weights, in the trainer's own dtype; return what exchanges them."""
        written = self.folder / label
        if written.exists():  # of a run that was killed
            rmtree(written)
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = next(module.parameters()).dtype
        save_released(module, self.tokenizer, written, dtype=dtype, weights=Gathered(module))

        def exchange() -> None:
            before, self.current, self.label = self.current, written, label
            if before is not None and before != written:
                rmtree(before)

        return exchange

    async def into(self, server: VllmServer) -> None:
        """Let a server read them."""
        assert self.current is not None
        await server.reload(str(self.current.resolve()), self.label)

    async def close(self) -> None:
        """Leave the folder: a server may be started on it."""


@torch.no_grad()
def parts_of(
    layout: Sequence[ReleasedTensor], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[bytes]:
    """Yield safetensors of about ``MAX_PART_BYTES``."""
    part: dict[str, Tensor] = {}
    size = 0
    for tensor in layout:
        made = tensor.view_in(weights[tensor.parameter]).to("cpu", tensor.dtype(dtype))
        part[tensor.name] = made.contiguous()
        size += made.nbytes
        if size >= MAX_PART_BYTES:
            yield save(part)
            part, size = {}, 0
    if part:
        yield save(part)


def is_local(url: str) -> bool:
    """Whether a server is reached through this machine's own address."""
    return url.split("//")[1].split(":")[0] in ("127.0.0.1", "localhost")
