"""One composition in a thread of its own, so that the page can look at it, stop it, or go away."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from iteris_sd import bases, weights
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe
from iteris_sd.ui import space

if TYPE_CHECKING:
    from iteris_sd.composer import Event
    from iteris_sd.ui.takeaway import Bag, Drawn

_IMPORTING = threading.Lock()
_ONE_AT_A_TIME = threading.Lock()  # the base model is one, and a job changes it while it works


@dataclass(frozen=True)
class State:
    """How far a job is: `done` of `total` within `stage`, the pictures drawn so far and, at the end, the files."""

    phase: Literal["running", "done", "stopped", "failed"] = "running"
    stage: str = "Waiting for the picture before to be finished"
    done: int = 0
    total: int = 1
    pictures: tuple[Drawn, ...] = ()
    files: Mapping[str, Path] | None = None
    scores: Mapping[str, Any] | None = None
    message: str = ""


def bring_in() -> None:
    """Import what is heavy, in one thread at a time: two that begin it at once trip over half-made modules."""
    with _IMPORTING:
        from iteris_sd import adding, backbone, composer, rendering, samples, scoring  # noqa: F401


def load(base: str) -> None:
    """Import what is heavy and load a base model; may take long. Raises UserError."""
    bring_in()
    from iteris_sd import backbone

    with _IMPORTING:  # loading imports, too
        backbone.load(base)


class Job:
    """A recipe at work. It writes into `folder` only; `state` may be read at any time."""

    def __init__(self, recipe: Recipe, library: Library, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.state = State()
        self._library = library
        self._stopping, self._ended = threading.Event(), threading.Event()
        # With the request's context, which a shared GPU is asked for with.
        run = partial(copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="compose", daemon=True)

    def start(self) -> Job:
        """Begin, as soon as the job before has ended."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask it to end; it does so within one denoising step, and keeps what is finished."""
        self._stopping.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, or for some seconds. Returns whether it has ended."""
        return self._ended.wait(seconds)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def _run(self) -> None:
        try:
            with _ONE_AT_A_TIME:
                self._work()
        except UserError as error:
            self.state = replace(self.state, phase="failed", message=str(error))
        except Exception:
            traceback.print_exc()
            message = "Something went wrong inside; what it was stands in the program's log."
            self.state = replace(self.state, phase="failed", message=message)
        finally:
            self._ended.set()

    def _work(self) -> None:
        if self._stopping.is_set():
            self.state = replace(self.state, phase="stopped")
            return
        self.state = replace(self.state, stage="Loading the models")
        bring_in()
        base = bases.find(self.recipe.base)
        if (
            weights.located(base) is not None
        ):  # else it is fetched first, and the page is told how far that is
            load(base.name)
        from iteris_sd.ui.takeaway import Bag

        bag = Bag(self.recipe, self._library, self.folder)
        with closing(space.events(self.recipe, self._library)) as events:
            for event in events:
                bag.take(event)
                self._tell(event, bag)
                if self._stopping.is_set():
                    break
        self.state = replace(self.state, stage="Packing the files")
        whole = bag.is_whole
        files, scores = bag.pack()
        self.state = replace(self.state, phase="done" if whole else "stopped", files=files, scores=scores)

    def _tell(self, event: Event, bag: Bag) -> None:
        from iteris_sd.composer import Picture, Progress

        if isinstance(event, Progress):
            self.state = replace(self.state, stage=event.stage, done=event.done, total=event.total)
        elif isinstance(event, Picture):
            self.state = replace(self.state, pictures=bag.drawn, done=0)
