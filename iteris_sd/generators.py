"""Work as a generator: it yields as it goes on, so that it can be watched and stopped, and returns its result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")
T = TypeVar("T")


def relayed(work: Generator[S, None, T], told: Callable[[S], R]) -> Generator[R, None, T]:
    """Pass on each step as it is `told`, and return the result."""
    with closing(work):
        while True:
            try:
                step = next(work)
            except StopIteration as stop:
                result: T = stop.value
                return result
            yield told(step)


def finish(work: Generator[S, None, T], heard: Callable[[S], None] = lambda _: None) -> T:
    """Run work to its end, `heard` step by step, and return the result."""
    with closing(work):
        while True:
            try:
                step = next(work)
            except StopIteration as stop:
                return stop.value
            heard(step)
