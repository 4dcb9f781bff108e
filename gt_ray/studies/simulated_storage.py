"""The storage of a simulated cluster: one bandwidth for all, and weights that go from node to node."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Generator
from typing import Any

import simpy

Steps = Generator[Any, Any, None]
"""A process of simpy, or a part of one."""


class Storage:
    """An object store or file system.

    Args:
        bytes_per_s: of all transfers together.
        stream_bytes_per_s: of one transfer, and of a copy from node to node.
    """

    def __init__(self, env: simpy.Environment, bytes_per_s: float, stream_bytes_per_s: float) -> None:
        self.env, self.stream_bytes_per_s = env, stream_bytes_per_s
        self.link = Link(env, bytes_per_s, stream_bytes_per_s)
        self.givers: dict[str, simpy.Store] = {}

    def through(self, size_bytes: float) -> Steps:
        """Read or write so much."""
        if size_bytes:
            done = self.link.transfer(size_bytes)
            try:
                yield done
            except simpy.Interrupt:
                self.link.cancel(done)
                raise

    def receive(self, here: dict[str, simpy.Event], model: str, size_bytes: float) -> Steps:
        """Get a model's weights to a node, once; who has them passes them on to one node at a time.

        Args:
            here: models of the node, there or on their way.
        """
        if model in here:
            yield here[model]
            return
        arrived = here[model] = self.env.event()
        if model not in self.givers:
            self.givers[model] = simpy.Store(self.env)
            self.env.process(self._read(model, size_bytes))
        givers = self.givers[model]
        with givers.get() as giver:
            yield giver
        try:
            yield self.env.timeout(size_bytes / self.stream_bytes_per_s)
        finally:
            givers.put(model)
        givers.put(model)
        arrived.succeed()

    def _read(self, model: str, size_bytes: float) -> Steps:
        yield from self.through(size_bytes)
        self.givers[model].put(model)


class Link:
    """A bandwidth that the transfers of a moment share equally, none getting more than `each_bytes_per_s`."""

    def __init__(self, env: simpy.Environment, bytes_per_s: float, each_bytes_per_s: float) -> None:
        self.env, self.bytes_per_s, self.each_bytes_per_s = env, bytes_per_s, each_bytes_per_s
        self.waiting: list[tuple[float, int, simpy.Event]] = []
        self.at_s = self.served_bytes = 0.0
        self.numbers = itertools.count()
        self.turn = 0

    def transfer(self, size_bytes: float) -> simpy.Event:
        """An event that succeeds when so many bytes are through."""
        done = self.env.event()
        self._advance()
        heapq.heappush(self.waiting, (self.served_bytes + size_bytes, next(self.numbers), done))
        self._plan()
        return done

    def cancel(self, done: simpy.Event) -> None:
        """Who waited for it is gone."""
        self._advance()
        self.waiting = [one for one in self.waiting if one[2] is not done]
        heapq.heapify(self.waiting)
        self._plan()

    def _rate(self) -> float:
        return min(self.each_bytes_per_s, self.bytes_per_s / max(1, len(self.waiting)))

    def _advance(self) -> None:
        # What a transfer has got that has been there all the time; since all get the same, the order of ends is fixed.
        self.served_bytes += (self.env.now - self.at_s) * self._rate()
        self.at_s = self.env.now

    def _plan(self) -> None:
        self.turn += 1
        if self.waiting:
            self.env.process(self._finish(self.turn, (self.waiting[0][0] - self.served_bytes) / self._rate()))

    def _finish(self, turn: int, after_s: float) -> Steps:
        yield self.env.timeout(max(0.0, after_s))
        if turn == self.turn:
            self._advance()
            self.served_bytes = max(self.served_bytes, self.waiting[0][0])  # else a rounding error is one more turn
            while self.waiting and self.waiting[0][0] <= self.served_bytes:
                heapq.heappop(self.waiting)[2].succeed()
            self._plan()
