"""What a fork of the template does to itself before it reads its first request.

Order: file system of its own, identity, descriptors, Landlock, rlimits, capabilities, seccomp. Each
layer that the kernel refuses is named in the report with its reason; then the protections are tried
out (a file outside, a socket, the template's process), because an active layer proves nothing.
"""

import errno
import os
import resource
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonlit.agents.sandbox import landlock, seccomp
from moonlit.agents.sandbox.kernel_calls import (
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    attach_tree,
    copy_tree,
    drop_capabilities,
    mount,
    prctl,
)

INSIDE_ID = 1000
"""User and group that a worker is in its own user namespace."""
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
TIME_ZONES = "/usr/share/zoneinfo"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
NUM_INODES = 4096
REFUSALS = {errno.EPERM, errno.EACCES, errno.ESRCH, errno.EROFS, errno.ENETUNREACH}


@dataclass(slots=True)
class Report:
    """Which layers hold and what they protect."""

    layers: dict[str, str] = field(default_factory=dict)
    """``active`` (with what is worth knowing) or why it is not."""
    protections: dict[str, bool] = field(default_factory=dict)
    """``files``, ``network`` and ``processes``, as tried out."""

    def attempt(self, name: str, action: Callable[[], str | None]) -> bool:
        """Try a layer and write down what came of it."""
        try:
            detail = action()
        except OSError as error:
            self.layers[name] = f"off: {error}"
            return False
        self.layers[name] = f"active: {detail}" if detail else "active"
        return True

    def __str__(self) -> str:
        layers = "; ".join(f"{name} {state}" for name, state in self.layers.items())
        missing = [name for name, held in self.protections.items() if not held]
        return f"{layers}; not protected: {', '.join(missing) or 'nothing'}"


def confine(
    policy: dict[str, Any], folder: str, identity: int, keep_fd: int, report: Report
) -> Report:
    """Confine this process for good.

    Args:
        policy: ``Policy.as_json()``.
        folder: the only place it may write; it becomes the working folder.
        identity: user id to take where there are no namespaces.
        keep_fd: the only descriptor that stays, next to the standard ones.
        report: holds the outcome of ``namespaces`` already.
    """
    limits, use = policy["limits"], policy["use"]
    own_namespaces = report.layers.get("namespaces") == "active"
    if own_namespaces:
        report.attempt("folder", lambda: own_file_system(folder, limits["disk_bytes"]))
    elif os.geteuid() == 0 != identity:
        become(identity)
    os.chdir(folder)
    template_pid = os.getppid()
    redirect_descriptors(keep_fd)
    address_space = mapped_bytes() + limits["memory_bytes"]
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in use:
        report.attempt("landlock", lambda: restrict(folder))
    report.attempt("rlimits", lambda: limit(limits, address_space, own_namespaces))
    report.attempt("capabilities", drop_capabilities)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "seccomp" in use:
        allow = policy["allow_processes"] and own_namespaces
        report.attempt("seccomp", lambda: seccomp.install(allow_processes=allow))
    report.protections = {
        "files": all(map(is_refused, (read_outside, lambda: write_outside(folder)))),
        "network": is_refused(open_socket) or report.layers.get("namespaces") == "active",
        "processes": template_pid == 0 or is_refused(lambda: os.kill(template_pid, 0)),
    }
    return report


def own_file_system(folder: str, num_bytes: int) -> str:
    """Become the namespace's user, with a tmpfs of a fixed size that only this process sees.

    An interpreter inside a folder that others may not enter (``/root``, say) stays where it is: the
    folder is covered by an empty one, and the interpreter alone is mounted into that.
    """
    mount("none", "/", "none", MS_REC | MS_PRIVATE, "")
    options = f"mode=700,uid={INSIDE_ID},gid={INSIDE_ID}"
    hidden = {prefix: wall for prefix in interpreter() if (wall := closed_folder(prefix))}
    trees = {prefix: copy_tree(prefix) for prefix in hidden}
    become(INSIDE_ID)
    for wall in sorted(set(hidden.values())):
        mount("tmpfs", wall, "tmpfs", MS_NOSUID | MS_NODEV, f"size=1m,{options}")
    for prefix, tree in trees.items():
        os.makedirs(prefix, exist_ok=True)
        attach_tree(tree, prefix)
    os.makedirs(folder, exist_ok=True)
    size = f"size={num_bytes},nr_inodes={NUM_INODES}"
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"{size},{options}")
    return f"tmpfs of {num_bytes >> 20} MiB"


def become(user_id: int) -> None:
    """Become a user and its group."""
    os.setresgid(user_id, user_id, user_id)
    os.setresuid(user_id, user_id, user_id)


def interpreter() -> list[str]:
    """Folders that hold the interpreter and its packages, none of them inside another."""
    found = sorted({os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)})
    return found[:1] if len(found) > 1 and found[1].startswith(f"{found[0]}/") else found


def closed_folder(path: str) -> str | None:
    """Return the outermost folder on the way to a path that other users may not enter."""
    way = [*reversed(Path(path).parents), Path(path)]
    return next((str(place) for place in way if not place.stat().st_mode & 0o001), None)


def redirect_descriptors(keep_fd: int) -> None:
    """Read from nowhere, write into a file without a name; close what the template had open.

    ``keep_fd`` becomes descriptor 3.
    """
    nowhere = os.open("/dev/null", os.O_RDONLY)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    output = os.open(".output", flags, 0o600)
    os.unlink(".output")
    keep = os.dup2(keep_fd, 63)
    os.dup2(nowhere, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(keep, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))


def restrict(folder: str) -> str:
    """Leave the interpreter, its packages and its libraries to read, and the folder to write."""
    places = sysconfig.get_paths()
    packages = {places[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    binaries = {os.path.realpath(sys.executable), sys.executable, f"{sys.base_prefix}/lib"}
    readable = sorted({*packages, *binaries, *SYSTEM_LIBRARIES, TIME_ZONES})
    return f"ABI {landlock.restrict_files(readable, [folder], DEVICES)}"


def limit(limits: dict[str, Any], address_space: int, counts_processes: bool) -> str:
    """Set the limits of this process and its children; none can be raised again."""
    chosen = {
        resource.RLIMIT_AS: address_space,
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: limits["num_open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if counts_processes:  # elsewhere the count is shared with all other processes of the user
        chosen[resource.RLIMIT_NPROC] = limits["num_processes"]
    if limits["cpu_s"] is not None:
        chosen[resource.RLIMIT_CPU] = limits["cpu_s"]
    for name, value in chosen.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    return "" if counts_processes else "num_processes not enforced"


def mapped_bytes() -> int:
    """Address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def is_refused(action: Callable[[], object]) -> bool:
    """Whether the kernel forbids something."""
    try:
        action()
    except OSError as error:
        return error.errno in REFUSALS
    return False


def read_outside() -> None:
    """Read a file that every system has."""
    Path("/etc/passwd").read_bytes()


def write_outside(folder: str) -> None:
    """Write beside the folder."""
    outside = Path(folder).parent / f"outside-{os.getpid()}"
    outside.touch()
    outside.unlink()


def open_socket() -> None:
    """Open a socket."""
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
