"""System calls that Python has no function for, through ctypes; every one raises OSError."""

import ctypes
import os
import platform

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine()

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x8000, 0x1, 0x4
LAST_CAPABILITY = 63


def check(result: int, what: str) -> int:
    """Raise OSError if a call failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, *arguments: int | ctypes.c_void_p) -> int:
    """Change something about this process."""
    words = [a if isinstance(a, ctypes.c_void_p) else ctypes.c_ulong(a) for a in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    return check(LIBC.prctl(option, *words), f"prctl({option})")


def syscall(number: int, what: str, *arguments: object) -> int:
    """Make a system call by its number."""
    return check(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int) -> None:
    """Enter new namespaces; a new pid namespace holds the next child, not the caller."""
    check(LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """Mount a file system."""
    result = LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    check(result, f"mount({kind} at {target})")


def copy_tree(path: str) -> int:
    """Return a descriptor of a copy of the mount at a path, to be attached elsewhere."""
    flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    return syscall(
        428, f"open_tree({path})", ctypes.c_int(AT_FDCWD), path.encode(), ctypes.c_uint(flags)
    )


def attach_tree(tree: int, path: str) -> None:
    """Mount what ``copy_tree`` returned."""
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    at = ctypes.c_int(AT_FDCWD)
    syscall(429, f"move_mount({path})", ctypes.c_int(tree), b"", at, path.encode(), flags)
    os.close(tree)


def drop_capabilities() -> None:
    """Give up every capability, those of a user namespace too, for this process and its heirs."""
    for capability in range(LAST_CAPABILITY + 1):
        if LIBC.prctl(PR_CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0))) != 0:
            break  # past the last one this kernel knows, or not ours to drop: capset decides
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
