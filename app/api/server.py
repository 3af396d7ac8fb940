"""uvicorn with a drain: readiness falls first, then the listener closes, then requests in flight finish."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType

import anyio.to_thread
import uvicorn
from fastapi import FastAPI

from app.api.deps import Readiness
from app.api.protocol import Protocol
from app.engine import Engine
from app.errors import InvalidSettings

if sys.platform != "win32":
    import resource

DRAIN_DELAY = 1.0  # seconds between failing readiness and closing the listener, for a load balancer to notice
LAST_EVENTS = 10.0  # seconds for the error events of streams that outlived the drain
MAX_CONNECTIONS = 10_000
RESERVED_FILES = 100  # file descriptors for everything that is no connection


def bind(host: str, port: int, *, stall_timeout: float) -> socket.socket:
    """A bound socket that does not listen yet. Raises InvalidSettings if the address cannot be had.

    A connection whose peer acknowledges nothing for `stall_timeout` seconds is dropped by the kernel (RFC 5482):
    closing it in the usual way would wait for ever to deliver what the peer does not take.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_timeout * 1000))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidSettings(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def max_connections() -> int:
    """As many as this process may open, and some files beside them."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, files - RESERVED_FILES))


class Server(uvicorn.Server):
    """Runs an application on a bound socket until SIGTERM or SIGINT."""

    def __init__(
        self,
        app: FastAPI,
        listener: socket.socket,
        *,
        readiness: Readiness,
        engine: Engine,
        drain_timeout: float,
        receive_timeout: float,
        send_timeout: float,
        greeting: str = "",
        drain_delay: float = DRAIN_DELAY,
    ) -> None:
        protocol = partial(
            Protocol, receive_timeout=receive_timeout, send_timeout=send_timeout, max_connections=max_connections()
        )
        super().__init__(
            uvicorn.Config(
                app,
                # NOTE: h11's, because httptools would take a head of any size. uvicorn calls whatever is no name.
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=20,
                timeout_graceful_shutdown=int(drain_timeout + LAST_EVENTS),
            )
        )
        self._listener = listener
        self._readiness = readiness
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._drain_delay = drain_delay
        self._greeting = greeting
        self._close_at = float("inf")

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets=sockets or [self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets=sockets)
        except OSError as error:  # another server bound the same address, and listened first
            raise InvalidSettings(f"cannot listen: {error.strerror}") from None
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"softprompt ready on http://{shown}:{port} {self._greeting}\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; a second one closes the listener at once, a third gives up on requests.

        The base class would raise the signal again at the end, and the exit status would not be 0.
        """
        if self.should_exit:
            self.force_exit = True
        elif self._readiness.draining or sig == signal.SIGINT:
            self._readiness.draining = True
            self.should_exit = True
        else:
            self._readiness.draining = True
            self._close_at = time.monotonic() + self._drain_delay

    async def on_tick(self, counter: int) -> bool:
        if self._engine.stats().given_up:
            return True  # whoever runs this process can start a new one; waiting would mend nothing
        return await super().on_tick(counter) or time.monotonic() >= self._close_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut = asyncio.create_task(self._stop_engine())
        try:
            await super().shutdown(sockets=sockets)
        finally:
            cut.cancel()

    async def _stop_engine(self) -> None:
        """What has not ended by then gets an error event, which is better than a cut connection."""
        await asyncio.sleep(self._drain_timeout)
        await anyio.to_thread.run_sync(self._engine.stop)
