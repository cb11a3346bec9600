"""Who is at the page: each visit has its own concepts, its own folder of files and at most one job."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

import gradio as gr

from iteris_sd import concepts
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.recipe import Recipe
from iteris_sd.ui import jobs


class Visit:
    """One open page, or one client of the API."""

    def __init__(self, folder: Path, library: Library) -> None:
        self.library = library
        self.job: jobs.Job | None = None
        self._folder = folder

    def begin(self, recipe: Recipe) -> jobs.Job:
        """Start a job in a fresh folder; the one before is stopped, and its files go when it has ended."""
        before, self.job = self.job, None
        if before is not None:
            before.stop()
            if before.ended:
                shutil.rmtree(before.folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self._folder))
        self.job = jobs.Job(recipe, self.library, folder).start()
        return self.job

    def add_file(self, file: Path, trigger: str, class_noun: str, base: str) -> concepts.Concept:
        """Add a LoRA file to this visit's library. Raises UserError unless it is one that fits the base model."""
        kept = Path(tempfile.mkdtemp(prefix="lora-", dir=self._folder)) / file.name
        shutil.copyfile(file, kept)
        try:
            concept = concepts.from_file(kept, trigger=trigger, class_noun=class_noun, base=base)
            library = self.library.with_concept(concept)
            _check_fits(concept, base)
        except UserError:
            shutil.rmtree(kept.parent, ignore_errors=True)
            raise
        self.library = library
        return concept

    def end(self) -> None:
        """Stop the job and remove all files."""
        if self.job is not None:
            self.job.stop()
        threading.Thread(target=self._tidy, daemon=True).start()

    def _tidy(self) -> None:
        if self.job is not None:
            self.job.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_fits(concept: concepts.Concept, base: str) -> None:
    lora = concept.load().lora  # read before the base model is loaded: a broken file is told of at once
    jobs.load(base)
    from iteris_sd import backbone
    from iteris_sd.layers import check_fit

    check_fit(lora, backbone.load(base).layers, f"The LoRA {concept.lora.name}")


class Visits:
    """All visits, by the session of the page. Their files lie under `root`, which goes with this object."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._temporary = tempfile.TemporaryDirectory(prefix="iteris-sd-")
        self.root = Path(self._temporary.name)
        self._open: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visit:
        """The visit that a request belongs to; a new one where there is none."""
        session = request.session_hash or "nobody"
        with self._lock:
            if session not in self._open:
                folder = Path(tempfile.mkdtemp(prefix="visit-", dir=self.root))
                self._open[session] = Visit(folder, self.library)
            return self._open[session]

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        with self._lock:
            visit = self._open.pop(request.session_hash or "nobody", None)
        if visit is not None:
            visit.end()
