"""Connections that cannot be held: who neither asks nor reads for long is cut off, and makes room for others.

uvicorn waits without end for a request to begin, for its headers, and for a client to read the answer (slowloris).
What comes in between, the body of a request, has its time limit in `web`.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from mnist_flax.serving.app import BUSY, PATIENCE

MOST_CONNECTIONS = 256  # at a time; further ones are told to come back


class Protocol(H11Protocol):
    """uvicorn's, with `PATIENCE` for the headers of a request, and for a client to take what it asked for."""

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def handle_events(self) -> None:
        before = self.cycle
        if len(self.connections) > MOST_CONNECTIONS:  # uvicorn has a limit too, with an answer that is none of ours
            self.app = BUSY
        super().handle_events()
        if self.cycle is not before and self._asking:  # the headers are there
            self._asking.cancel()

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading:
            self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._asking, self._reading):
            if timer:
                timer.cancel()

    def _wait_for_request(self) -> None:
        if self._asking:
            self._asking.cancel()
        self._asking = self.loop.call_later(PATIENCE, self.transport.abort)
