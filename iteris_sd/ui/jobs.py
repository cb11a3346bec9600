"""Long work in a thread of its own, so that the page can look at it, stop it, or go away; one at a time, in turn."""

from __future__ import annotations

import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from iteris_sd import bases, serving, weights
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Picture, Progress
from iteris_sd.history import History
from iteris_sd.recipe import Recipe
from iteris_sd.ui import heavy, space
from iteris_sd.ui.inline import data_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iteris_sd.events import Event
    from iteris_sd.explaining import Explanation
    from iteris_sd.ui.takeaway import Bag, Drawn

T = TypeVar("T")
_LOOK_AGAIN = 0.2  # seconds


@dataclass(frozen=True)
class Preview:
    """What the pictures that are being drawn look like by now: data URIs by column and seed, all of one scene."""

    scene: str
    pictures: Mapping[tuple[str, int], str]


@dataclass(frozen=True)
class State:
    """How far work is: `done` of `total` within `stage`, `left` seconds of it, and what there is so far.

    `files`, `scores`: at the end, of what was finished. `before`: how many wait for their turn before this. `at_once`:
    how many pictures are being drawn together.
    """

    phase: Literal["waiting", "running", "done", "stopped", "failed"] = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 1
    before: int = 0
    at_once: int = 0
    left: float | None = None
    pictures: tuple[Drawn, ...] = ()
    preview: Preview | None = None
    files: Mapping[str, Path] | None = None
    scores: Mapping[str, Any] | None = None
    message: str = ""


class _Turns:
    """Who works next: the base model is one, and work changes it while it lasts."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, stopping: threading.Event, tell: Callable[[int], None]) -> Iterator[None]:
        """Wait until all who came before are done, or this is to stop; `tell` hears how many there are."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            while self._waiting[0] is not me and not stopping.is_set():
                tell(self._waiting.index(me))
                self._changed.wait(_LOOK_AGAIN)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.remove(me)
                self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting)


_TURNS = _Turns()


@dataclass
class Clock:
    """How long a stage still takes, from how fast it went since it began."""

    stage: str = ""
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0

    def left(self, stage: str, done: float, total: float) -> float | None:
        """Seconds until `total`; None where nothing is known yet."""
        now = time.monotonic()
        if stage != self.stage or done < self.first:
            self.stage, self.began, self.first = stage, now, done
            return None
        if done <= self.first or now - self.began < 0.5:
            return None
        return (now - self.began) * (total - done) / (done - self.first)


def device() -> str | None:
    """What pictures are drawn on, in words; None while nobody knows yet."""
    return space.device() if heavy.is_there() else None


def load(base: str) -> None:
    """Import what is heavy and load a base model; may take long. Raises UserError.

    Where a GPU is lent, models are loaded before anybody asks (`space.prepare`), and not in a thread: the pretended GPU
    is there in the main one only.
    """
    heavy.bring_in()
    if serving.lent():
        return
    from iteris_sd import backbone

    with heavy.IMPORTING:  # loading imports, too
        backbone.load(base)


class Work(ABC):
    """Something that takes long. It writes into `folder` only; `state` may be read at any time."""

    def __init__(self, recipe: Recipe, library: Library, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.state = State(before=len(_TURNS))
        self._library = library
        self._stopping, self._ended = threading.Event(), threading.Event()
        # With the request's context, which a shared GPU is asked for with.
        run = partial(copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name=type(self).__name__, daemon=True)

    def start(self) -> None:
        """Begin, as soon as the work before has ended."""
        self._thread.start()

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

    def tell(self, **changes: Any) -> None:
        """Change the state."""
        self.state = replace(self.state, **changes)

    def _run(self) -> None:
        try:
            with _TURNS.turn(self._stopping, lambda before: self.tell(before=before)):
                self._begin()
        except UserError as error:
            self.tell(phase="failed", message=str(error))
        except Exception:
            traceback.print_exc()
            message = "Something went wrong inside; what it was stands in the program's log."
            self.tell(phase="failed", message=message)
        finally:
            self._ended.set()

    def _begin(self) -> None:
        if self._stopping.is_set():
            self.tell(phase="stopped")
            return
        self.tell(phase="running", stage="Loading the models")
        heavy.bring_in()
        base = bases.find(self.recipe.base)
        if (
            weights.located(base) is not None
        ):  # else it is fetched first, and the page is told how far that is
            load(base.name)
        self._work()

    @abstractmethod
    def _work(self) -> None:
        """Do it, and tell the state; the models are loaded."""

    def _each(self, events: Generator[T, None, Any]) -> Iterator[T]:
        """The events of some work until it ends or is to stop, in which case it is closed."""
        with closing(events):
            for event in events:
                yield event
                if self._stopping.is_set():
                    return


class Job(Work):
    """A composition. `bag`: what it has brought so far, once it is at work. What it came to is kept in `history`."""

    bag: Bag | None = None

    def __init__(self, recipe: Recipe, library: Library, folder: Path, history: History) -> None:
        super().__init__(recipe, library, folder)
        self._history = history

    def _work(self) -> None:
        from iteris_sd.ui.takeaway import Bag

        bag = self.bag = Bag(self.recipe, self._library, self.folder)
        clock = Clock()
        try:
            for event in self._each(space.events(self.recipe, self._library)):
                bag.take(event)
                self._tell(event, bag, clock)
        except Exception:
            if bag.drawn:  # what is finished is kept, whatever befell the rest
                self._keep(bag, "stopped")
            raise
        self.tell(phase=self._keep(bag, "done" if bag.is_whole else "stopped"))

    def _keep(self, bag: Bag, phase: Literal["done", "stopped"]) -> Literal["done", "stopped"]:
        """Pack the files, and keep what was drawn in the history."""
        self.tell(stage="Packing the files", left=None, preview=None, at_once=0)
        files, scores = bag.pack()
        self.tell(files=files, scores=scores)
        if bag.drawn:
            try:
                kept = [drawn.path for drawn in bag.drawn] + [files["grid"]]
                self._history.keep(self.recipe, scores, kept, phase)
            except UserError as error:  # the pictures are there all the same
                self.tell(message=f"It is not in the history: {error}")
        return phase

    def _tell(self, event: Event, bag: Bag, clock: Clock) -> None:
        if isinstance(event, Picture):
            self.tell(pictures=bag.drawn, done=0, preview=None)
        elif isinstance(event, Progress):
            drawing, steps = event.at_once > 0, self.recipe.steps
            done = len(bag.drawn) * steps + event.done * event.at_once if drawing else event.done
            total = self.recipe.count * steps if drawing else event.total
            left = clock.left("drawing" if drawing else event.stage, done, total)
            told = {"stage": event.stage, "done": event.done, "total": event.total}
            self.tell(left=left, at_once=event.at_once, **told)
            if event.preview is not None:
                shown = {place: data_uri(picture) for place, picture in event.preview.pictures.items()}
                self.tell(preview=Preview(event.preview.scene, shown))


class Merging(Work):
    """A merge without pictures. `bag`: has the merged LoRAs, once it is at work."""

    bag: Bag | None = None

    def _work(self) -> None:
        from iteris_sd.ui.takeaway import Bag

        bag = Bag(self.recipe, self._library, self.folder)
        for event in self._each(space.merged(self.recipe, self._library)):
            bag.take(event)
            if isinstance(event, Progress):
                self.tell(stage=event.stage, done=event.done, total=event.total)
        whole = len(bag.merged) == len(self.recipe.merging)
        self.bag = bag if whole else None
        self.tell(phase="done" if whole else "stopped")


class Study(Work):
    """A look inside a merge. `found`: what came of it, and `figures` its figures by name."""

    found: Explanation | None = None
    figures: Mapping[str, Path] = MappingProxyType({})

    def _work(self) -> None:
        from iteris_sd.explaining import Explanation

        clock, found = Clock(), None
        for event in self._each(space.explained(self.recipe, self._library)):
            if isinstance(event, Explanation):
                found = event
            elif isinstance(event, Progress):
                left = clock.left(event.stage, event.done, event.total)
                self.tell(stage=event.stage, done=event.done, total=event.total, left=left)
        if found is None:
            self.tell(phase="stopped")
            return
        self.tell(stage="Drawing the figures", left=None)
        self.figures = found.figures(self.folder)
        self.found = found
        self.tell(phase="done")
