"""Deciding, in a tree's warden, which session may fork: the one that it asked to, once."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import threading

from system.tools.sandbox import seccomp

# struct seccomp_notif: id, pid, flags, and what is called: number, architecture, instruction, six arguments.
_ASKED = struct.Struct("QIIiIQ6Q")
_DECIDED = struct.Struct("QqiI")  # struct seccomp_notif_resp: id, value, error, flags
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


class ForkGate:
    """Answers every ``clone`` that is no thread, in a thread of its own: EPERM, but to whom it is armed for.

    All that decides stands in the caller's registers, which the kernel keeps until the answer; no other
    thread of its process can change it.
    """

    def __init__(self) -> None:
        self._listeners = select.epoll()
        self._armed, self._lock = 0, threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def add(self, listener: int) -> None:
        """Decide for all who have the filter behind ``listener``, which is closed with the last of them."""
        self._listeners.register(listener, select.EPOLLIN)

    def arm(self, pid: int) -> None:
        """Let process ``pid`` fork once."""
        with self._lock:
            self._armed = pid

    def disarm(self) -> bool:
        """Let it no more; whether it has."""
        with self._lock:
            used, self._armed = not self._armed, 0
            return used

    def _serve(self) -> None:
        while True:
            for listener, event in self._listeners.poll():
                if event & select.EPOLLIN:
                    self._decide(listener)
                else:
                    self._listeners.unregister(listener)
                    os.close(listener)

    def _decide(self, listener: int) -> None:
        asked = bytearray(_ASKED.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, asked)
            call, pid, _, _, _, _, flags, stack, *_ = _ASKED.unpack(asked)
            with self._lock:
                allowed = pid == self._armed and flags in seccomp.FORKS and not stack
                if allowed:
                    self._armed = 0
                decided = (0, 0, _CONTINUE) if allowed else (0, -errno.EPERM, 0)
                fcntl.ioctl(listener, _SEND, bytearray(_DECIDED.pack(call, *decided)))
        except OSError:  # who asked was killed meanwhile
            return
