"""What a worker may use and which protections must hold. Every number here is our default."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LAYERS = ("namespaces", "landlock", "seccomp")
PROTECTIONS = ("files", "network", "processes")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one worker."""

    memory_bytes: int = 1024 * MIB
    """Address space beyond what the template has mapped."""
    disk_bytes: int = 64 * MIB
    """Of its folder: a tmpfs of this size; without a mount namespace, of any one file."""
    num_processes: int = 64
    """Threads and processes together; binds where user namespaces work."""
    num_open_files: int = 256
    cpu_s: int | None = None
    """Processor time over its whole life [s]; None: no limit."""
    call_timeout_s: float = 30.0
    interrupt_grace_s: float = 1.0
    """How long an interrupted call may take to stop before the worker is killed [s]."""
    code_chars: int = 200_000
    output_chars: int = 20_000
    num_images: int = 8
    """Pictures one call may return."""
    image_pixels: int = 1024 * 1024
    """Larger pictures are shrunk to this many pixels before they leave the worker."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"limits.{name}={value}: want more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Limits, layers and what must be protected.

    Args:
        limits: bounds on one worker.
        require: protections without which no worker starts, of ``files`` (reads only the
            interpreter and its packages, writes only its own folder), ``network`` (no sockets) and
            ``processes`` (neither sees nor signals any process but its own).
        use: layers to try; leave one out to see what the others hold.
        allow_processes: let code start processes; else only threads. Needs ``namespaces``: they
            count the processes and end with the worker.
        cgroup: folder of a delegated cgroup v2 with the memory and pids controllers enabled for
            its children; None: no cgroup.

    Raises:
        ValueError: if a name is none of ours, or processes are allowed without ``namespaces``.
    """

    limits: Limits = field(default_factory=Limits)
    require: Sequence[str] = PROTECTIONS
    use: Sequence[str] = LAYERS
    allow_processes: bool = False
    cgroup: str | None = None

    def __post_init__(self) -> None:
        for key, names, known in (
            ("require", self.require, PROTECTIONS),
            ("use", self.use, LAYERS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{key}={unknown}: want some of {list(known)}")
        if self.allow_processes and "namespaces" not in self.use:
            raise ValueError("allow_processes=True without the layer 'namespaces'")

    def as_json(self) -> dict[str, Any]:
        """Return what the template needs to know."""
        return {**asdict(self), "require": list(self.require), "use": list(self.use)}
