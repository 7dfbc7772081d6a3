"""Linux system calls that Python's library lacks, through ctypes.  Each raises OSError with its errno."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

MACHINE = platform.machine()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# Numbers above 423 are the same on every architecture.
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CLONE = {"x86_64": 56, "aarch64": 220}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MS_MOVE, MS_NOATIME = 0x2000, 0x400
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 15, 22, 38
_SECCOMP_MODE_FILTER = 2
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 1 << 3
_M_ARENA_MAX = -8
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_CREATE_RULESET_VERSION = 1


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: object) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), what)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def enter_namespace(namespace: int, kind: int) -> None:
    """Be in the namespace of this ``kind`` (CLONE_NEW…) behind a descriptor.  A PID namespace is entered by
    the next child only."""
    _check(_libc.setns(namespace, kind), "setns")


def fork_first(more: int = 0) -> int:
    """Fork, as the first process of a new PID namespace; ``more``: other new namespaces (CLONE_NEW…).
    :func:`unshare` does that as well, but lets a process start no thread any more.

    The C library's own preparations are left out: the child, as its parent, must have one thread, and start
    processes only.
    """
    return _syscall("clone", _CLONE[MACHINE], CLONE_NEWPID | more | signal.SIGCHLD, 0, 0, 0, 0)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    arguments = (encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data))
    _check(_libc.mount(*arguments), f"mount {target}")


def mount_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    """Add mount attributes, keeping those already set (mount_setattr, Linux 5.12)."""
    attr = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0))
    flags = _AT_RECURSIVE if recursive else 0
    _syscall("mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, attr, 32)


def move_mount(source: str, target: str) -> None:
    """Move what is mounted at ``source`` to the directory ``target``."""
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(MS_MOVE), None),
        f"move of {source}",
    )


def unmount(target: str) -> None:
    """Let go of what is mounted there, whoever still uses it."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount of {target}")


def pivot_root(new_root: str) -> None:
    """Make ``new_root`` (a mount point) the root directory and let go of the old one."""
    os.chdir(new_root)
    _syscall("pivot_root", _PIVOT_ROOT[MACHINE], b".", b".")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def _prctl(what: str, option: int, *arguments: object) -> None:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_libc.prctl(option, *words), what)


def set_name(name: str) -> None:
    """The name that ``ps`` shows for this process."""
    _prctl("PR_SET_NAME", _PR_SET_NAME, name.encode()[:15])


def die_with_parent(signal_number: int) -> None:
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal_number)


def no_new_privileges() -> None:
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up every capability of this thread, for good once no_new_privileges holds."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    _syscall("capset", _CAPSET[MACHINE], header, ctypes.create_string_buffer(24))


class _SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    @classmethod
    def of(cls, program: bytes) -> tuple[_SockFprog, object]:
        """It, and what it points to, which has to be kept."""
        code = ctypes.create_string_buffer(program, len(program))
        return cls(len(program) // 8, ctypes.cast(code, ctypes.c_void_p)), code


def install_filter(program: bytes) -> None:
    """Put a seccomp-BPF program (8 bytes an instruction) on this thread and all it will ever start."""
    fprog, _code = _SockFprog.of(program)
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(fprog))


def install_listened_filter(program: bytes) -> int:
    """The same for a program that leaves some calls to another process to decide; returns the descriptor at
    which that one hears of them (Linux 5.5)."""
    fprog, _code = _SockFprog.of(program)
    arguments = (_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.byref(fprog))
    return _syscall("seccomp", _SECCOMP[MACHINE], *arguments)


def one_arena() -> None:
    """Let all threads of this process allocate from one heap: a heap for each reserves address space."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0 where it has none."""
    try:
        return _syscall(
            "landlock", _LANDLOCK_CREATE_RULESET, ctypes.c_void_p(None), 0, _LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def landlock_ruleset(fs_rights: int, net_rights: int, scopes: int) -> int:
    """A file descriptor of a new ruleset that denies the given rights except where a rule allows them."""
    attr = ctypes.create_string_buffer(struct.pack("QQQ", fs_rights, net_rights, scopes), 24)
    size = 24 if scopes else 16 if net_rights else 8
    return _syscall("landlock_create_ruleset", _LANDLOCK_CREATE_RULESET, attr, size, 0)


def landlock_allow(ruleset: int, handle: int, rights: int) -> None:
    """Allow ``rights`` on the file or directory (and all beneath) behind the descriptor ``handle``."""
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
    _syscall("landlock_add_rule", _LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)


def landlock_restrict(ruleset: int) -> None:
    _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
