"""A seccomp filter: system calls that image code never needs fail with EPERM, for good.

Refused: sockets (but for the pair an event loop wakes itself with), tracing and reading other
processes, mounts and namespaces, BPF, keys, kernel modules, clocks, System V and POSIX queues,
``io_uring`` (it would go around this filter), memory files (they escape the address-space limit),
modes, owners, times and extended attributes of files (Landlock lets an owner change them anywhere)
and every number the filter does not know. ``clone3`` does not exist here, so that C libraries fall
back to ``clone``, whose flags a filter can read. Numbers: the kernel's tables for each machine.
"""

import ctypes
import errno
import struct

from moonlit.agents.sandbox.kernel_calls import (
    MACHINE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    prctl,
)

SINCE_5_1 = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "quotactl_fd": 443, "memfd_secret": 447, "process_mrelease": 448,
    "set_mempolicy_home_node": 450, "pidfd_send_signal": 424, "fchmodat2": 452,
}  # fmt: skip
"""The same on every machine."""
REFUSED = {
    "x86_64": {
        "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "fchownat": 260,
        "futimesat": 261, "fchmodat": 268, "utimensat": 280,
        "shmget": 29, "shmat": 30, "socket": 41, "connect": 42, "accept": 43, "bind": 49,
        "listen": 50, "semget": 64, "msgget": 68, "ptrace": 101, "syslog": 103, "setuid": 105,
        "setgid": 106, "personality": 135, "pivot_root": 155, "adjtimex": 159, "chroot": 161,
        "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167,
        "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172,
        "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179,
        "clock_settime": 227, "mbind": 237, "set_mempolicy": 238, "mq_open": 240,
        "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
        "migrate_pages": 256, "unshare": 272, "move_pages": 279, "accept4": 288,
        "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "memfd_create": 319,
        "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
        "fremovexattr": 16, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "utimensat": 88,
        "acct": 89, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "quotactl": 60,
        "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105,
        "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142,
        "setgid": 144, "setuid": 146, "sethostname": 161, "setdomainname": 162,
        "settimeofday": 170, "adjtimex": 171, "mq_open": 180, "msgget": 186, "semget": 190,
        "shmget": 194, "shmat": 196, "socket": 198, "bind": 200, "listen": 201, "accept": 202,
        "connect": 203, "add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224,
        "swapoff": 225, "mbind": 235, "set_mempolicy": 237, "migrate_pages": 238,
        "move_pages": 239, "perf_event_open": 241, "accept4": 242, "fanotify_init": 262,
        "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273,
        "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
    },
}  # fmt: skip
NEW_PROCESS = {"x86_64": {"fork": 57, "vfork": 58}, "aarch64": {}}
CLONE = {"x86_64": 56, "aarch64": 220}
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
CLONE3 = 435
HIGHEST_KNOWN = 462
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD, AF_UNIX = 0x00010000, 1

LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_SET, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT = 0, 4, 16
ALLOW, KILL = 0x7FFF0000, 0x80000000
SECCOMP_MODE_FILTER = 2


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse(code: int) -> int:
    """Return the verdict that fails a call with an errno."""
    return 0x00050000 | code


def instructions(machine: str, *, allow_processes: bool) -> list[tuple[int, int, int, int]]:
    """Return the filter: code, jump if true, jump if false, operand."""
    denied = dict(SINCE_5_1) | REFUSED[machine]
    if not allow_processes:
        denied |= NEW_PROCESS[machine]
    program = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_ABOVE, 0, 1, HIGHEST_KNOWN),  # the x32 twins of all calls too
        (RETURN, 0, 0, refuse(errno.ENOSYS)),
        *when_number(CLONE3, refuse(errno.ENOSYS)),
    ]
    for number in sorted(denied.values()):
        program += when_number(number, refuse(errno.EPERM))
    program += [
        (JUMP_EQUAL, 0, 4, SOCKETPAIR[machine]),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (JUMP_EQUAL, 0, 1, AF_UNIX),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, refuse(errno.EPERM)),
    ]
    if not allow_processes:
        program += [
            (JUMP_EQUAL, 0, 4, CLONE[machine]),
            (LOAD, 0, 0, FIRST_ARGUMENT_AT),
            (JUMP_SET, 0, 1, CLONE_THREAD),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, refuse(errno.EPERM)),
        ]
    return [*program, (RETURN, 0, 0, ALLOW)]


def when_number(number: int, verdict: int) -> list[tuple[int, int, int, int]]:
    """Return a verdict on one system call."""
    return [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, verdict)]


def install(*, allow_processes: bool) -> None:
    """Filter this process and its children from now on.

    Raises:
        OSError: if the kernel has no filters, or this machine's numbers are not known here.
    """
    if MACHINE not in REFUSED:
        raise OSError(errno.ENOSYS, f"no table of system calls for {MACHINE!r}")
    program = instructions(MACHINE, allow_processes=allow_processes)
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    holder = Program(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    address = ctypes.cast(ctypes.byref(holder), ctypes.c_void_p)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, address)
