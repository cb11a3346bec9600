"""Who is at the page: each visit has its own folder of files, at most one job, and the concepts it may use."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from iteris_sd.concepts import Concept, Library
from iteris_sd.kept import Kept
from iteris_sd.recipe import Recipe
from iteris_sd.ui import jobs, space


class Visit:
    """One open page, or one client of the API. `kept`: the concepts it may add to and change."""

    def __init__(self, folder: Path, shipped: Library, kept: Kept) -> None:
        self.job: jobs.Job | None = None
        self._folder, self._shipped, self._kept = folder, shipped, kept

    @property
    def library(self) -> Library:
        """All concepts that can be picked: one's own, and those that come with the project."""
        return self._kept.library().joined(self._shipped)

    def mine(self) -> Mapping[str, Concept]:
        """One's own concepts, by name."""
        return self._kept.library().concepts

    def begin(self, recipe: Recipe) -> jobs.Job:
        """Start a job in a fresh folder; the one before is stopped, and its files go when it has ended.

        Raises UserError when it is larger than a public page does.
        """
        space.check(recipe)
        before, self.job = self.job, None
        if before is not None:
            before.stop()
            if before.ended:
                shutil.rmtree(before.folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self._folder))
        self.job = jobs.Job(recipe, self.library, folder).start()
        return self.job

    def add(
        self,
        file: Path,
        words: Mapping[str, Any],
        pictures: Sequence[Path] = (),
        **more: Any,
    ) -> Concept:
        """Keep a concept from a LoRA file, or from a zip that a concept was exported to. Raises UserError.

        `more`: as `Kept.add` has it.
        """
        jobs.bring_in()
        from iteris_sd import adding

        if file.suffix == ".zip":
            return adding.unpack(self._kept, file)
        return adding.keep(self._kept, file, references=pictures, **words, **more)

    def change(self, name: str, words: Mapping[str, Any], pictures: Sequence[Path] = ()) -> Concept:
        """Change what is said of one of one's own concepts, and its pictures where there are new ones."""
        if pictures:
            self._kept.set_references(name, pictures)
        return self._kept.edit(name, **words)

    def remove(self, name: str) -> None:
        """Remove one of one's own concepts. Raises UserError when it cannot be."""
        self._kept.remove(name)

    def export(self, name: str) -> Path:
        """One of one's own concepts as a zip, in this visit's folder."""
        folder = Path(tempfile.mkdtemp(prefix="export-", dir=self._folder))
        path = folder / f"{name}.zip"
        self._kept.export_zip(name, path)
        return path

    def end(self) -> None:
        """Stop the job and remove all files."""
        if self.job is not None:
            self.job.stop()
        threading.Thread(target=self._tidy, daemon=True).start()

    def _tidy(self) -> None:
        if self.job is not None:
            self.job.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Visits:
    """All visits, by the session of the page. Their files lie under `root`, which goes with this object.

    `kept`: where concepts that people add stay; None, as for a public page: with each visit, and as long as it.
    """

    def __init__(self, shipped: Library, kept: Kept | None = None) -> None:
        self._shipped, self._kept = shipped, kept
        self._temporary = tempfile.TemporaryDirectory(prefix="iteris-sd-")
        self.root = Path(self._temporary.name)
        self._open: dict[str, Visit] = {}
        self._lock = threading.Lock()

    @property
    def library(self) -> Library:
        """What everyone can pick from."""
        return self._shipped if self._kept is None else self._kept.library().joined(self._shipped)

    def of(self, request: gr.Request) -> Visit:
        """The visit that a request belongs to; a new one where there is none."""
        session = request.session_hash or "nobody"
        with self._lock:
            if session not in self._open:
                folder = Path(tempfile.mkdtemp(prefix="visit-", dir=self.root))
                self._open[session] = Visit(folder, self._shipped, self._kept or Kept(folder / "concepts"))
            return self._open[session]

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        with self._lock:
            visit = self._open.pop(request.session_hash or "nobody", None)
        if visit is not None:
            visit.end()
