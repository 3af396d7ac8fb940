"""Bytes to a listening server, and the replies that come back until it closes."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class RawReply:
    status: int
    headers: dict[str, str]
    body: bytes


def exchange(port: int, data: bytes, timeout: float = 10.0) -> list[RawReply]:
    """Send everything, read to the end. The server must close: by its own will or because `data` asks for it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            connection.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed before it had read everything; what it said may still be there
        return replies(received(connection), bodies=not data.startswith(b"HEAD "))


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    found = b""
    while True:
        try:
            piece = connection.recv(65_536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece


def replies(data: bytes, *, bodies: bool = True) -> list[RawReply]:
    """Replies one after another; each must be whole."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = status_line.split(" ")
        assert version == "HTTP/1.1", status_line[:80]
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value.strip()
        if int(status) < 200:
            data = rest
            continue
        length = int(headers["content-length"]) if bodies else 0
        assert len(rest) >= length, "the reply ends within its body"
        found.append(RawReply(int(status), headers, rest[:length]))
        data = rest[length:] if bodies else b""
    return found
