"""The system calls a sandboxed program may make, as a seccomp-BPF allow-list; everything else is EPERM.

Allowed: ordinary file, memory, time and signal-handling calls, threads.  Not allowed, and why:

- ``socket``, ``connect``, …: no network, and no way to a local daemon either (socketpair(AF_UNIX,
  SOCK_STREAM), which asyncio needs, is harmless: it has no address);
- ``fork``, ``clone`` without CLONE_THREAD, ``execve``: a call is one process.  That makes the CPU, memory and
  file-size limits, which the kernel counts per process, limits on the call, and killing that process ends
  everything;
- ``kill``/``tgkill`` of anyone but oneself (of anyone, in a session), F_SETOWN/F_SETSIG (signals by way of a
  descriptor), ``ptrace``, ``process_vm_*``, ``pidfd_*``, ``prlimit64`` on others: no touching other processes
  of the same user;
- ``truncate``, ``open(O_RDONLY | O_TRUNC)`` (Landlock before Linux 6.2 lets them pass), ``chmod``, ``chown``,
  ``utime``, ``setxattr`` (which Landlock never restricts): no change outside the scratch directory, not even
  to metadata;
- ``memfd_create``, System V and POSIX IPC, ``mmap(MAP_SHARED | MAP_ANONYMOUS)``: memory that stays when no
  address of it is left, so that no limit counts it;
- ``open(O_TMPFILE)``: a file that leaves its directory as it was, but not the counts of its file system,
  which the next program would then see;
- ``mount``, ``unshare``, ``setns``, ``bpf``, ``io_uring_*``, ``keyctl``, ``kexec_load``, ``perf_event_open``,
  ``userfaultfd``, …: the parts of the kernel where its holes are found.

Commands of a shell (:func:`shell_program`) start processes; there is no other filter that allows it.

A session may fork when its warden lets it: ``clone`` as the C library's fork() makes it passes the list, and
:func:`fork_program`, a second filter, leaves it to the warden.  Of its children a session hears nothing.

The filter is a classic BPF program over ``struct seccomp_data`` (Linux,
Documentation/userspace-api/seccomp_filter.rst).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence

# name: (x86_64, aarch64); None where the architecture has no such call
_PLAIN: dict[str, tuple[int | None, int | None]] = {
    # files: reading, writing, descriptors
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "splice": (275, 76), "tee": (276, 77), "fadvise64": (221, 223),
    # files: names and metadata
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "creat": (85, None), "umask": (95, 166), "statfs": (137, 43),
    "fstatfs": (138, 44), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None),
    "eventfd2": (290, 19), "timerfd_create": (283, 85), "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87),
    # the two ends of a socketpair
    "recvfrom": (45, 207), "sendto": (44, 206), "shutdown": (48, 210), "getsockopt": (55, 209),
    "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
    # memory
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "mincore": (27, 232), "membarrier": (324, 283),
    # oneself
    "exit": (60, 93), "exit_group": (231, 94), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "getrusage": (98, 165),
    "times": (100, 153), "sysinfo": (99, 179), "uname": (63, 160), "getrlimit": (97, 163),
    "setrlimit": (160, 164), "getpriority": (140, 141), "capget": (125, 90), "wait4": (61, 260),
    "waitid": (247, 95), "arch_prctl": (158, None),
    # threads and scheduling
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "getcpu": (309, 168), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "rseq": (334, 293), "futex": (202, 98), "futex_waitv": (449, 449),
    # handling signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "pause": (34, None), "alarm": (37, None), "setitimer": (38, 103),
    "getitimer": (36, 102), "restart_syscall": (219, 128),
    # time and chance
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "getrandom": (318, 278),
}  # fmt: skip

_OF_SHELLS: dict[str, tuple[int | None, int | None]] = {  # beside those
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "tkill": (200, 130),
    "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140), "flock": (73, 32),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "truncate": (76, 45), "utimensat": (280, 88), "utimes": (235, None), "utime": (132, None),
    "futimesat": (261, None), "sync": (162, 81), "syncfs": (306, 267), "getitimer": (36, 102),
    "sendmsg": (46, 211), "recvmsg": (47, 212),
}  # fmt: skip

_SET_ATTRIBUTE = {"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # table column, AUDIT_ARCH_*

_X32_BIT = 0x40000000  # the x32 calls of x86_64 would slip past a filter on plain numbers
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080  # CLONE_NEW*: namespaces
_CLONE_IDS = 0x01200000  # CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID, as fork() of the C library sets them
FORKS = (signal.SIGCHLD | _CLONE_IDS, int(signal.SIGCHLD))  # flags of clone for a fork and nothing else
_NAMELESS = os.O_TMPFILE & ~os.O_DIRECTORY
_MAP_TYPE = 0x0F  # of the flags of mmap: shared, private, …
_SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
# TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PRCTLS = (15, 16, 0x53564D41)  # PR_SET_NAME PR_GET_NAME PR_SET_VMA
_FCNTLS = (
    *(fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC),
    *(fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW),
    1032,  # F_GETPIPE_SZ
)

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06  # BPF: A = word at k; A &= k; return k
_EQUAL, _GREATER, _AT_LEAST, _ANY_OF = 0x15, 0x25, 0x35, 0x45  # BPF: if A ? k skip jt else jf instructions
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_USER_NOTIFICATION = 0x7FC00000

Instruction = tuple[int, int, int, int]  # code, jt, jf, k
Checked = tuple[tuple[int | None, int | None], list[Instruction]]  # numbers as in _PLAIN, what decides
_ARCH_OFFSET, _NUMBER_OFFSET = 4, 0


def supported(machine: str) -> bool:
    return machine in _ARCHITECTURES


def program(machine: str, pid: int) -> bytes:
    """The filter for a process that knows itself as ``pid``, which installs it before it starts a thread."""
    return _compiled(machine, _checked(pid))


def session_program(machine: str) -> bytes:
    """The filter for a session and all that will be forked from it.  It needs :func:`fork_program` as well.

    Its process ids are many: it signals none of them, and waits for none.
    """
    recvmsg = {"recvmsg": ((47, 212), [(_RETURN, 0, 0, _ALLOW)])}  # it gets what its warden sends, no more
    checked = _checked(0) | {
        "kill": ((62, 129), [_refuse()]),
        "tgkill": ((234, 131), [_refuse()]),
        "clone": ((56, 220), [*_unless_masked(0, _CLONE_THREAD, 0)[:-1], *_one_of(0, FORKS)]),
        "wait4": ((61, 260), [_refuse(errno.ECHILD)]),
        "waitid": ((247, 95), [_refuse(errno.ECHILD)]),
    }
    return _compiled(machine, checked | recvmsg)


def shell_program(machine: str) -> bytes:
    """The filter for commands and all that they start, in a PID namespace and a file system of their own.

    They may start programs and processes, signal what they can see, and change the metadata of files, of
    which they can write their own only.  No namespaces, no network.
    """
    allowed: list[Instruction] = [(_RETURN, 0, 0, _ALLOW)]
    free = {name: (numbers, allowed) for name, numbers in _OF_SHELLS.items()}
    fifo = [(_AND, 0, 0, stat.S_IFMT(0xFFFF)), (_EQUAL, 0, 1, stat.S_IFIFO), *allowed, _refuse()]
    checked = _checked(0) | {
        "kill": ((62, 129), allowed),
        "tgkill": ((234, 131), allowed),
        "prlimit64": ((302, 261), allowed),
        "clone": (
            (56, 220),
            [_load_argument(0), (_AND, 0, 0, _CLONE_NEW), (_EQUAL, 0, 1, 0), *allowed, _refuse()],
        ),
        # As where a file system keeps none: `sed -i` and `cp` then do without.
        **{name: (numbers, [_refuse(errno.EOPNOTSUPP)]) for name, numbers in _SET_ATTRIBUTE.items()},
        "mknod": ((133, None), [_load_argument(1), *fifo]),
        "mknodat": ((259, 33), [_load_argument(2), *fifo]),
    }
    return _compiled(machine, checked | free)


def fork_program(machine: str) -> bytes:
    """The filter that leaves each ``clone`` which is no thread to whoever listens, and allows all else."""
    column, _ = _ARCHITECTURES[machine]
    clone = (56, 220)[column]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_EQUAL, 0, 4, clone),
        _load_argument(0),
        (_AND, 0, 0, _CLONE_THREAD),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _USER_NOTIFICATION),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return _packed(code)


def _compiled(machine: str, checked: Mapping[str, Checked]) -> bytes:
    """The list of what is allowed: ``_PLAIN`` but for what is ``checked``, and what that allows."""
    column, arch = _ARCHITECTURES[machine]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL_PROCESS)]
    numbers = [pair[column] for name, pair in _PLAIN.items() if name not in checked]
    for low, high in _ranges(n for n in numbers if n is not None):
        code += [(_AT_LEAST, 0, 2, low), (_GREATER, 1, 0, high), (_RETURN, 0, 0, _ALLOW)]
    for pair, body in checked.values():
        if (number := pair[column]) is not None:
            code += [(_EQUAL, 0, len(body), number), *body]
    code.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return _packed(code)


def _packed(code: Iterable[Instruction]) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _checked(pid: int) -> dict[str, Checked]:
    """Calls that are allowed for some arguments only: their numbers, as in ``_PLAIN``, and instructions that
    decide, each path of which returns."""
    return {
        "open": ((2, None), _opening(1)),
        "openat": ((257, 56), _opening(2)),
        "fcntl": ((72, 25), _one_of(1, _FCNTLS)),
        "ioctl": ((16, 29), _one_of(1, _IOCTLS, errno.ENOTTY)),
        "prctl": ((157, 167), _one_of(0, _PRCTLS)),
        "prlimit64": ((302, 261), _one_of(0, (0, pid))),
        "kill": ((62, 129), _one_of(0, (pid,))),
        "tgkill": ((234, 131), _one_of(0, (pid,))),
        "mmap": ((9, 222), _unless_masked(3, _MAP_TYPE | mmap.MAP_ANONYMOUS, _SHARED, errno.ENOMEM)),
        "clone": ((56, 220), _unless_masked(0, _CLONE_THREAD, 0)),
        # Its flags lie in memory, out of a filter's sight; on ENOSYS the C library uses clone.
        "clone3": ((435, 435), [_refuse(errno.ENOSYS)]),
        "socketpair": ((53, 199), _local_stream()),
    }


def _opening(flags: int) -> list[Instruction]:
    """``flags``: which argument they are."""
    named = _unless_masked(flags, os.O_ACCMODE | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC)
    # As where a file system cannot do it: the C library and Python take a file that has a name at first.
    nameless = [(_ANY_OF, 0, 1, _NAMELESS), _refuse(errno.EOPNOTSUPP)]
    return [_load_argument(flags), *nameless, *named[1:]]


def _local_stream() -> list[Instruction]:
    """socketpair(AF_UNIX, SOCK_STREAM); a datagram socket could still send to an address."""
    flags = (0, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC)
    stream = _one_of(1, [socket.SOCK_STREAM | extra for extra in flags])
    return [_load_argument(0), (_EQUAL, 0, len(stream), socket.AF_UNIX), *stream, _refuse()]


def _load_argument(index: int) -> Instruction:
    """Low 32 bits of an argument (little-endian); of these ``int`` arguments the kernel reads no more."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _refuse(number: int = errno.EPERM) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | number)


def _one_of(index: int, values: Sequence[int], otherwise: int = errno.EPERM) -> list[Instruction]:
    tests = [(_EQUAL, len(values) - i, 0, value & 0xFFFFFFFF) for i, value in enumerate(values)]
    return [_load_argument(index), *tests, _refuse(otherwise), (_RETURN, 0, 0, _ALLOW)]


def _unless_masked(index: int, mask: int, refused: int, number: int = errno.EPERM) -> list[Instruction]:
    compare = [(_AND, 0, 0, mask), (_EQUAL, 1, 0, refused)]
    return [_load_argument(index), *compare, (_RETURN, 0, 0, _ALLOW), _refuse(number)]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as inclusive runs: [1, 2, 3, 7] -> [(1, 3), (7, 7)]."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
