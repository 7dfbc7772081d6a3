"""Messages between a warden and its sessions: JSON with a length before it, with descriptors attached.

What a session sends is not to be trusted: it is short, and may be anything.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REQUEST = struct.Struct("!dI")  # of a call: the seconds that its program has, the bytes of code that follow
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("iII")  # struct ucred
_MOST_DESCRIPTORS = 4
ANSWER_BYTES = 1 << 12  # of an answer at most


@dataclass(frozen=True)
class Received:
    """A message, and what the kernel says of it."""

    values: dict[str, Any]
    descriptors: tuple[int, ...] = ()
    sender: int = 0  # its process id, where the socket has SO_PASSCRED


def send(channel: socket.socket, values: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message.  Raises OSError."""
    data = json.dumps(values).encode()
    data = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(channel, [data], descriptors) if descriptors else 0
    if sent < len(data):
        channel.sendall(data[sent:])


def receive(channel: socket.socket, most: int) -> Received:
    """The next message, of ``most`` bytes.  Raises OSError (ConnectionError at its end), and ValueError for
    what is none."""
    space = socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
    data, attached, _, _ = channel.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors: array.array[int] = array.array("i")
    sender = 0
    for level, kind, content in attached:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            sender = _CREDENTIALS.unpack(content)[0]
    (length,) = _LENGTH.unpack(data + _exactly(channel, _LENGTH.size - len(data)))
    if length > most:
        raise ValueError(f"a message of {length} bytes")
    values: Any = json.loads(_exactly(channel, length))
    if not isinstance(values, dict):
        raise ValueError("a message that is no object")
    return Received(values, tuple(descriptors), sender)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = channel.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError("closed")
        data += chunk
    return bytes(data)
