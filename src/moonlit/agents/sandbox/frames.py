"""Messages between trainer and worker: four bytes of length, then that many of JSON.

JSON because it cannot run anything: what a worker sends is data, however it was made.
"""

import asyncio
import json
import socket
import struct
from typing import Any

HEADER = struct.Struct(">I")


class ProtocolError(Exception):
    """The other side sent what no honest worker sends."""


def pack(message: dict[str, Any]) -> bytes:
    """Return a message's frame."""
    body = json.dumps(message, allow_nan=False).encode()
    return HEADER.pack(len(body)) + body


def unpack(body: bytes) -> dict[str, Any]:
    """Read a frame's body.

    Raises:
        ProtocolError: if it is not a JSON object.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a frame holds {type(message).__name__}: want an object")
    return message


async def read_frame(reader: asyncio.StreamReader, max_bytes: int) -> dict[str, Any]:
    """Read the next message.

    Raises:
        ProtocolError: if it is larger than ``max_bytes`` or not a JSON object.
        asyncio.IncompleteReadError: if the other side has gone.
    """
    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    if size > max_bytes:
        raise ProtocolError(f"a frame of {size} bytes: want at most {max_bytes}")
    return unpack(await reader.readexactly(size))


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """Read the next message on a blocking socket; None: the other side has gone."""
    header = receive_exactly(channel, HEADER.size)
    if header is None:
        return None
    body = receive_exactly(channel, HEADER.unpack(header)[0])
    return None if body is None else unpack(body)


def receive_exactly(channel: socket.socket, num_bytes: int) -> bytes | None:
    """Read so many bytes; None: the other side has gone."""
    pieces = bytearray()
    while len(pieces) < num_bytes:
        piece = channel.recv(min(num_bytes - len(pieces), 1 << 20))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)
