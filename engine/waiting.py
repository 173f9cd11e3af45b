"""Waking whoever reads tokens: one wake-up per step and reader, whether threads or coroutines are waiting."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Protocol


class Waiter(Protocol):
    """Something the engine thread can wake."""

    def wake(self) -> None:
        """Say that there may be something new. Cheap, never blocks, callable from any thread."""


class ThreadWaiter:
    """For readers in a thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wake(self) -> None:
        """See Waiter."""
        if not self._event.is_set():  # a set event is cheaper to look at than to set again
            self._event.set()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Block until ``ready()`` holds; it is asked again after every wake-up."""
        while not ready():
            self._event.wait()
            self._event.clear()


class LoopWaiter:
    """For all coroutines of one asyncio loop: a step costs the engine thread one call into the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # engines keep waiters by loop, and must not keep the loop
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._scheduled = False

    def wake(self) -> None:
        """See Waiter."""
        loop = self._loop()
        if self._scheduled or loop is None:
            return
        self._scheduled = True
        try:
            loop.call_soon_threadsafe(self._dispatch)
        except RuntimeError:  # the loop is closed: nobody is left to wake
            self._scheduled = False

    def _dispatch(self) -> None:
        self._scheduled = False
        still = []
        for ready, future in self._waiting:
            if future.done():
                continue
            if ready():
                future.set_result(None)
            else:
                still.append((ready, future))
        self._waiting = still

    async def wait_until(self, ready: Callable[[], bool]) -> None:
        """Suspend until ``ready()`` holds."""
        if not ready():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((ready, future))
            await future  # done once ready() holds, which only the caller can change again
