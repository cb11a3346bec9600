"""Who is at the page: each visit has its own folder of files, at most one job, and the concepts it may use."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from iteris_sd import hub, limits, serving
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.history import Entry, History
from iteris_sd.kept import Kept
from iteris_sd.recipe import Recipe
from iteris_sd.ui import crowd, heavy, jobs, room, space
from iteris_sd.ui.crowd import Crowd
from iteris_sd.ui.takeaway import Bag, Drawn, drawn_before

W = TypeVar("W", bound=jobs.Work)
READING = threading.Lock()  # whole LoRAs are read one at a time: in memory each may take a gigabyte


@dataclass(frozen=True)
class Result:
    """What is shown as the result: of a job, or of a composition in the history, which has no `bag`."""

    recipe: Recipe
    drawn: Sequence[Drawn]
    scores: Mapping[str, Any] | None
    bag: Bag | None = None

    def picture(self, method: str, seed: int) -> Path | None:
        """The file of one picture of the composition, if it was drawn."""
        of = (("", method, seed),)
        return next((one.path for one in self.drawn if (one.scene, one.method, one.seed) in of), None)


class Visit:
    """One open page, or one client of the API.

    `folder`: where what it brings lies; `shown`: where what it composes lies, which whoever is told of a file there can
    fetch. Neither need exist yet. `crowd`: the work of all visits; `address`: where this one's last request came from.
    `kept`: the concepts it may add to and change; `history`: the compositions it may look back at. `given_up`: which
    work was stopped by hand, "compose" or "why": a page is told of it in two ways, and either may come last.
    """

    def __init__(
        self, folder: Path, shown: Path, shipped: Library, kept: Kept, history: History, crowd: Crowd
    ) -> None:
        self.address: str | None = None
        self.job: jobs.Job | None = None
        self.study: jobs.Study | None = None
        self.given_up: set[str] = set()
        self.history = history
        self.seen = time.monotonic()
        self._works: set[jobs.Work] = set()
        self._asked: list[jobs.Work] = []  # by programs
        self._reopened: Result | None = None
        self._folder, self._shown, self._crowd = folder, shown, crowd
        self._shipped, self._kept = shipped, kept

    @property
    def library(self) -> Library:
        """All concepts that can be picked: one's own, and those that come with the project."""
        return self._kept.library().joined(self._shipped)

    def mine(self) -> Mapping[str, Concept]:
        """One's own concepts, by name."""
        return self._kept.library().concepts

    def begin(self, recipe: Recipe) -> jobs.Job:
        """Start a job in a fresh folder; the one before is stopped, and its files go when it has ended.

        Raises UserError when it is larger than a public page does, or too much from the same address has not ended.
        """
        space.check(recipe)
        self.job = self._started(self._composing(recipe), self.job)
        self._reopened = None
        return self.job

    def compose(self, recipe: Recipe) -> jobs.Job:
        """Start a job of a program's, beside all others. Raises UserError likewise."""
        space.check(recipe)
        return self._for_program(self._composing(recipe))

    def merge(self, recipe: Recipe) -> jobs.Merging:
        """Start a merge without pictures, likewise."""
        space.check(recipe)
        return self._for_program(lambda: jobs.Merging(recipe, self.library, self._fresh("merge-")))

    def look_inside(self, recipe: Recipe) -> jobs.Study:
        """Start a look inside the merge of a recipe, likewise."""
        space.check(recipe)
        self.study = self._started(
            lambda: jobs.Study(recipe, self.library, self._fresh("study-")), self.study
        )
        return self.study

    def _composing(self, recipe: Recipe) -> Callable[[], jobs.Job]:
        return lambda: jobs.Job(recipe, self.library, self._fresh("run-"), self.history)

    def _fresh(self, prefix: str) -> Path:
        self._shown.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self._shown))

    def _started(self, make: Callable[[], W], before: jobs.Work | None = None) -> W:
        """Make and start work; the one `before`, which it takes the place of, is stopped, and its files go when it has
        ended. Raises UserError when the crowd is too large."""
        work = self._crowd.admit(self.address, make, before)
        if before is not None:
            before.stop()
            threading.Thread(target=self._forget, args=(before,), daemon=True).start()
        self._works.add(work)
        work.start()
        return work

    def _for_program(self, make: Callable[[], W]) -> W:
        """Start work of a program's; what it asked for long before, and has had time to fetch, goes."""
        work = self._started(make)
        self._asked.append(work)
        ended = [one for one in self._asked if one.ended]
        for one in ended[: max(0, len(self._asked) - limits.MAX_KEPT_CALLS)]:
            self._asked.remove(one)
            self._forget(one)
        return work

    def _forget(self, work: jobs.Work) -> None:
        work.wait()
        shutil.rmtree(work.folder, ignore_errors=True)
        self._works.discard(work)

    @property
    def busy(self) -> bool:
        """Whether any of its work has not ended, or something that it brings is on its way."""
        return any(not work.ended for work in list(self._works)) or room.is_expecting(self._folder)

    @property
    def holds(self) -> bool:
        """Whether anything would be lost with it: work, or files of what it brought or composed."""
        return self.busy or any(True for _ in room.files_in([self._folder, self._shown]))

    @property
    def result(self) -> Result | None:
        """What is shown: what was reopened last, or else what the last job has come to by now."""
        if self._reopened is not None or self.job is None:
            return self._reopened
        state = self.job.state
        return Result(self.job.recipe, state.pictures, state.scores, self.job.bag)

    def reopen(self, entry: Entry) -> Result:
        """Show a composition of the history. Raises UserError when its recipe cannot be read."""
        heavy.bring_in()
        scores = entry.scores()
        self._reopened = Result(entry.recipe(), drawn_before(scores, entry.folder), scores)
        return self._reopened

    def add(
        self,
        files: Sequence[Path],
        words: Mapping[str, Any],
        pictures: Sequence[Path] = (),
    ) -> Concept:
        """Keep a concept from a LoRA with what belongs to it, or from a zip, as `bringing.keep` has it.

        Raises UserError, also when a public page has no room for it.
        """
        heavy.bring_in()
        from iteris_sd import bringing

        self._clear_exports()
        with (
            room.reserved(self._folder, bringing.size(files) + _picture_bytes(pictures), concepts=1),
            READING,
        ):
            return bringing.keep(self._kept, files, references=pictures, most=_most(), **words)

    def look_at(self, files: Sequence[Path]) -> Concept | str:
        """What a LoRA says of itself before it is kept; a sentence where nothing can be said. Raises UserError."""
        heavy.bring_in()
        from iteris_sd import adding, bringing

        if any(map(bringing.is_exported, files)):
            return "This zip has words of its own; keep it as it is."
        with (
            room.reserved(self._folder, bringing.size(files)),
            READING,
            bringing.sorted_out(files, self._folder, _most()) as found,
        ):
            bringing.check_tokens(found.tokens)
            if found.source is not None:
                return adding.opened(found.source)
        return (
            "These are learned tokens; choose the concept that they belong to, or bring its LoRA with them."
        )

    def add_from_hub(
        self, id: hub.LoraId, words: Mapping[str, Any], pictures: Sequence[Path], tokens: Sequence[Path]
    ) -> Generator[tuple[int, int], None, Concept]:
        """Keep a LoRA from the Hub, with files of learned tokens more; yield bytes done and bytes in all.

        What a public page downloads goes at once, since no cache may grow by what strangers ask for. Raises UserError
        likewise.
        """
        heavy.bring_in()
        from iteris_sd import bringing

        self._clear_exports()
        beside = bringing.size(tokens) + _picture_bytes(pictures)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (
            ExitStack() as stack,
            tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as passing,
        ):

            def reserve(size: int) -> None:
                stack.enter_context(room.reserved(self._folder, size + beside, concepts=1))

            cache = Path(passing) if serving.public() else None
            file, own, revision = yield from hub.fetch_lora(id, cache, reserve, _most())
            more: dict[str, Any] = {"origin": str(id), "revision": revision, "tokens": (*own, *tokens)}
            with READING:
                return bringing.keep(self._kept, [file], references=pictures, **words, **more)

    def change(
        self,
        name: str,
        words: Mapping[str, Any],
        pictures: Sequence[Path] = (),
        tokens: Sequence[Path] = (),
    ) -> Concept:
        """Change what is said of one of one's own concepts, and its pictures where there are new ones; add tokens.

        Raises UserError when a word is out of bounds, `tokens` are other files, or a public page has no room; nothing
        changes then.
        """
        if tokens:
            heavy.bring_in()
            from iteris_sd import bringing

            if not bringing.are_tokens(tokens):
                raise UserError(
                    f"Only files of learned tokens (.safetensors) can be added to {name}; choose “A new one” to keep "
                    "another LoRA."
                )
        with room.reserved(self._folder, room.bytes_of(tokens) + _picture_bytes(pictures)):
            return self._kept.edit(name, references=pictures or None, tokens=tokens, **words)

    def remove(self, name: str) -> None:
        """Remove one of one's own concepts. Raises UserError when it cannot be."""
        self._kept.remove(name)
        self._clear_exports()

    def export(self, name: str) -> Path:
        """One of one's own concepts as a zip, in this visit's folder until the next one, or until concepts change.

        Raises UserError when there is none, or a public page has no room for it.
        """
        self._clear_exports()
        path = self._folder / "exports" / f"{name}.zip"
        with room.reserved(self._folder, room.bytes_of([self._kept.folder / name])):
            self._kept.export_zip(name, path)
        return path

    def _clear_exports(self) -> None:
        shutil.rmtree(self._folder / "exports", ignore_errors=True)

    def end(self) -> None:
        """Stop the work and remove all files."""
        for work in list(self._works):
            work.stop()
        threading.Thread(target=self._tidy, daemon=True).start()

    def _tidy(self) -> None:
        for work in list(self._works):
            work.wait()
        for folder in (self._folder, self._shown):
            shutil.rmtree(folder, ignore_errors=True)


def _most() -> int:
    """How many bytes one file may have that a visitor brings, out of a zip or from the Hub, too."""
    return limits.MAX_PUBLIC_FILE_BYTES if serving.public() else limits.MAX_FILE_BYTES


def _picture_bytes(pictures: Sequence[Path]) -> int:
    """How many bytes pictures have at most once they are kept: a PNG is hardly larger than its pixels."""
    return len(pictures) * 3 * limits.MAX_REFERENCE_SIDE**2


class Visits:
    """All visits, by the session of the page. Their files lie under `root`, which goes with this object.

    `shown`: the part of it that the page may serve. Whoever is told of a picture knows where it lies, and names there
    lead to nothing else: concepts, drafts and exports lie under other names, elsewhere.
    `kept`, `history`: where concepts that people add, and what they compose, stay; None, as for a public page: with
    each visit, and as long as it.
    """

    def __init__(self, shipped: Library, kept: Kept | None = None, history: History | None = None) -> None:
        self._shipped, self._kept, self._history = shipped, kept, history
        self._temporary = tempfile.TemporaryDirectory(prefix="iteris-sd-", ignore_cleanup_errors=True)
        self.root = Path(self._temporary.name)
        self.shown = self.root / "shown"
        self._open: dict[str, Visit] = {}
        self._crowd = Crowd()
        self._lock = threading.Lock()

    @property
    def library(self) -> Library:
        """What everyone can pick from."""
        return self._shipped if self._kept is None else self._kept.library().joined(self._shipped)

    def of(self, request: gr.Request) -> Visit:
        """The visit that a request belongs to; a new one where there is none, or the request names no session.

        Raises gr.Error, which the page shows whatever was asked for, when there is no room for a new one.
        """
        session = request.session_hash or secrets.token_hex(8)
        with self._lock:
            if session in self._open:
                self._open[session].seen = time.monotonic()
            self._sweep()
            if session not in self._open:
                self._make_room()
                self._open[session] = self._new()
            self._open[session].address = crowd.address(request)
            return self._open[session]

    def _new(self) -> Visit:
        """A visit whose folders are called so that nobody guesses them, and which has none yet."""
        folder, shown = self.root / f"visit-{secrets.token_hex(8)}", self.shown / secrets.token_hex(8)
        kept = self._kept or Kept(folder / "concepts")
        most = limits.MAX_PUBLIC_HISTORY, limits.MAX_PUBLIC_HISTORY_BYTES
        history = self._history or History(shown / secrets.token_hex(8), *most)
        return Visit(folder, shown, self._shipped, kept, history, self._crowd)

    def _sweep(self) -> None:
        """End visits that have long been idle."""
        long_ago = time.monotonic() - limits.MAX_IDLE_SECONDS
        for session, visit in list(self._open.items()):
            if visit.seen < long_ago and not visit.busy:
                self._open.pop(session).end()

    def _make_room(self) -> None:
        """Where there are too many visits for one more, end the longest idle one that holds nothing, else the longest
        idle one, where that is for long enough; sessions cost nothing, and must not end what others have made."""
        if len(self._open) < limits.MAX_VISITS:
            return
        fair = time.monotonic() - limits.FAIR_IDLE_SECONDS
        idle = sorted((visit.seen, session) for session, visit in self._open.items() if not visit.busy)
        going = next((session for _, session in idle if not self._open[session].holds), None)
        if going is None and idle and idle[0][0] < fair:
            going = idle[0][1]
        if going is None:
            raise gr.Error(
                f"{limits.MAX_VISITS} visitors have concepts or pictures on this page, and it has no room for more; "
                f"come back in {limits.FAIR_IDLE_SECONDS // 60} minutes, or run the page on a machine of your own.",
                print_exception=False,
            )
        self._open.pop(going).end()

    def leave(self, request: gr.Request) -> None:
        """The page was closed, or lost its connection: its visit ends unless it is seen again within seconds."""
        session, since = request.session_hash or "", time.monotonic()

        def end() -> None:
            with self._lock:
                visit = self._open.get(session)
                if visit is None or visit.seen > since:
                    return
                del self._open[session]
            visit.end()

        timer = threading.Timer(limits.GRACE_SECONDS, end)
        timer.daemon = True
        timer.start()
