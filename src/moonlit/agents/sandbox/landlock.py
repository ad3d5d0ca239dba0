"""Landlock: which files a process may touch, for good, without any privilege.

Everything is forbidden that the kernel knows how to forbid; paths are then allowed back. It also
forbids TCP (ABI 4) and signals and abstract sockets out of the domain (ABI 6), and a process in a
domain cannot trace one outside it. Source: the kernel's userspace API, ``landlock(7)``.
"""

import ctypes
import errno
import os
from collections.abc import Sequence

from moonlit.agents.sandbox.kernel_calls import PR_SET_NO_NEW_PRIVS, prctl, syscall

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
VERSION_FLAG = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
NUM_FILE_RIGHTS = {3: 15, 4: 15, 5: 16}
"""By ABI: rights are bits from 0 up; later versions add none for files."""
FILE_ONLY = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15
"""What can be allowed on something that is not a folder."""
NETWORK_RIGHTS, SCOPES = 0b11, 0b11
TRUNCATE_ABI, SIGNAL_SCOPE_ABI = 3, 6


class Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``."""

    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathRule(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """Return the kernel's Landlock version; raises OSError where there is none."""
    return syscall(
        CREATE_RULESET, "landlock", None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_FLAG)
    )


def restrict_files(readable: Sequence[str], writable: Sequence[str], devices: Sequence[str]) -> int:
    """Confine this process and its children to these paths.

    Args:
        readable: may be read and executed.
        writable: anything may be done there but executing.
        devices: files that may be read and written.

    Returns:
        The ABI that was enforced.
    """
    version = abi()
    if version < TRUNCATE_ABI:
        raise OSError(errno.ENOTSUP, f"Landlock ABI {version} cannot forbid truncation: want 3")
    rights = (1 << NUM_FILE_RIGHTS[min(version, max(NUM_FILE_RIGHTS))]) - 1
    ruleset = Ruleset(
        rights, NETWORK_RIGHTS if version >= 4 else 0, SCOPES if version >= SIGNAL_SCOPE_ABI else 0
    )
    size = 24 if version >= SIGNAL_SCOPE_ABI else 16 if version >= 4 else 8
    ruleset_fd = syscall(
        CREATE_RULESET, "landlock", ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    for paths, allowed in (
        (readable, EXECUTE | READ_FILE | READ_DIR),
        (writable, rights & ~EXECUTE),
        (devices, READ_FILE | WRITE_FILE),
    ):
        for path in paths:
            allow(ruleset_fd, path, allowed)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    syscall(RESTRICT_SELF, "landlock", ctypes.c_int(ruleset_fd), ctypes.c_uint32(0))
    os.close(ruleset_fd)
    return version


def allow(ruleset_fd: int, path: str, allowed: int) -> None:
    """Allow something beneath a path; a path that does not exist needs no rule."""
    try:
        path_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        allowed &= FILE_ONLY
    rule = PathRule(allowed, path_fd)
    syscall(
        ADD_RULE,
        f"landlock rule for {path}",
        ctypes.c_int(ruleset_fd),
        ctypes.c_int(RULE_PATH_BENEATH),
        ctypes.byref(rule),
        ctypes.c_uint32(0),
    )
    os.close(path_fd)
