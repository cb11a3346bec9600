"""The files of one composition: pictures as they are finished, and at the end what can be downloaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import bases, limits
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone, Picture
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from iteris_sd.calibration import Merged
    from iteris_sd.concepts import Loaded
    from iteris_sd.events import Event
    from iteris_sd.export import Form

SHOWN = ("scene", "method", "seed", "flagged")  # what scores.json says of a picture, and `Drawn` too


@dataclass(frozen=True)
class Drawn:
    """A finished picture in a file, and its `measures` by the names that `scoring.measures` has.

    `scene`, `method`, `seed`, `flagged`: as `events.Picture` has them.
    """

    scene: str
    method: str
    seed: int
    path: Path
    measures: Mapping[str, float]
    flagged: bool = False


class Bag:
    """Collects the events of a composition, finished or not, and writes what they bring into `folder`."""

    def __init__(self, recipe: Recipe, library: Library, folder: Path) -> None:
        self._recipe, self._library, self._folder = recipe, library, folder
        self._pictures: list[Picture] = []
        self._merged: dict[str, Merged] = {}
        self._whole: Composition | None = None
        self._concepts: tuple[Loaded, ...] | None = None
        self._packing = threading.Lock()
        self._loras: dict[tuple[str, str], Path] = {}  # zips, by method and layout, in the order of packing
        self.drawn: tuple[Drawn, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the composition came to its end."""
        return self._whole is not None

    @property
    def merged(self) -> tuple[str, ...]:
        """The methods that a merged LoRA can be had of."""
        return tuple(self._merged)

    def take(self, event: Event) -> None:
        """Keep what an event brings; a picture is written at once, with its recipe inside."""
        from iteris_sd import export, scoring

        if isinstance(event, MergeDone):
            self._concepts = event.concepts
            self._merged[event.method] = event.merged
        elif isinstance(event, Composition):
            self._whole = event
        elif isinstance(event, Picture):
            path = self._folder / export.picture_name(event)
            path.write_bytes(export.picture_png(event, self._recipe))
            self._pictures.append(event)
            told = {key: getattr(event, key) for key in SHOWN}
            made = Drawn(path=path, measures=scoring.measures(event.score), **told)
            self.drawn = (*self.drawn, made)

    def pack(self) -> tuple[dict[str, Path], dict[str, Any] | None]:
        """Write the downloads; returns them by name (`pictures`, `grid`, `table` …), and the scores.

        Called once: afterwards pictures are in files only, not in memory. Raises UserError when there is no room.
        """
        from iteris_sd import export

        composition = self._composition()
        files = {"recipe": self._folder / "recipe.json"}
        files["recipe"].write_text(self._recipe.json_text(), encoding="utf-8")
        if not self._pictures:
            return files, None
        scores = export.scores(composition)
        files["scores"], files["table"] = self._folder / "scores.json", self._folder / "scores.csv"
        files["scores"].write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files["table"].write_text(export.scores_csv(composition), encoding="utf-8")
        files["grid"] = self._folder / "grid.png"
        export.grid(composition).save(files["grid"])
        pictures = [drawn.path for drawn in self.drawn]
        told = [files["recipe"], files["scores"], files["table"]]
        files["pictures"] = _zip(self._folder / "pictures.zip", [*pictures, *told])
        self._pictures.clear()
        if self._whole is not None:
            self._whole = replace(self._whole, pictures=(), retained=())
        return files, scores

    def lora(self, method: str, layout: str = "diffusers") -> Path:
        """A zip with the LoRA that a method merged, in a layout of `export.LAYOUTS`, and its learned tokens.

        It lies in a folder whose name nobody can guess who knows that of a picture; the oldest of too many goes. Raises
        UserError when there is no such LoRA or layout, or no room.
        """
        from iteris_sd import export

        if method not in self._merged:
            raise UserError(f"There is no LoRA merged by {method!r}; compose with that method first.")
        form = export.Form(layout)
        with self._packing:
            if (method, layout) not in self._loras:
                self._loras[method, layout] = self._packed(method, form)
            for old in list(self._loras)[: -limits.MAX_PACKED_LORAS]:
                shutil.rmtree(self._loras.pop(old).parent, ignore_errors=True)
            return self._loras[method, layout]

    def _packed(self, method: str, form: Form) -> Path:
        """The zip, alone in its folder. Raises UserError when there is no room, and leaves nothing then."""
        from iteris_sd import export

        merged, composition = self._merged[method], self._composition()
        names = "-".join(re.sub(r"[^\w-]+", "_", use.name) for use in self._recipe.concepts)
        name = f"{export.short(names)}-{method}"
        metadata = export.lora_metadata(self._recipe, composition.concepts, merged)
        with _writing(f"The LoRA merged by {method}"):
            place = Path(tempfile.mkdtemp(prefix="lora-", dir=self._folder))
        draft = place / "draft"
        try:
            path = draft / (name if form.layout == "peft" else f"{name}.safetensors")
            written = export.write_lora(merged.lora, composition.tokens, path, metadata, form)
            return _zip(place / f"{name}-{form.layout}.zip", written, draft)
        except Exception:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _composition(self) -> Composition:
        """The composition, or what there is of one that was stopped."""
        from iteris_sd import merger, scoring

        if self._whole is not None:
            return self._whole
        chosen = self._recipe.scorer or bases.find(self._recipe.base).scorer
        scored = any(picture.score.text is not None for picture in self._pictures)  # else none could be had
        scorer = scoring.SCORERS[chosen].title if scored and chosen in scoring.SCORERS else "nobody"
        if self._concepts is None:  # nothing was merged
            self._concepts = tuple(merger.pick(self._recipe, self._library))
        composed, retained = ([p for p in self._pictures if bool(p.scene) == of_one] for of_one in (0, 1))
        return Composition(
            self._recipe, self._concepts, self._merged, tuple(composed), scorer, retained=tuple(retained)
        )


def drawn_before(scores: Mapping[str, Any] | None, folder: Path) -> tuple[Drawn, ...]:
    """The pictures that a scores.json speaks of, as far as they still lie in `folder`. Raises UserError for others."""
    from iteris_sd import scoring

    told = [*(scores or {}).get("pictures", ()), *(scores or {}).get("retained", ())]
    try:
        return tuple(
            Drawn(
                path=folder / Path(one["file"]).name,
                measures=scoring.measures(scoring.Score(**one["scores"])),
                **{key: one[key] for key in SHOWN},
            )
            for one in told
            if (folder / Path(one["file"]).name).is_file()
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The scores in {folder.name} are not as they are written here; delete that composition, and compose anew."
        ) from error


def _zip(path: Path, files: Iterable[Path], within: Path | None = None) -> Path:
    """A zip of files, whole or not there at all. Raises UserError when it cannot be written."""
    draft = path.with_name(f"{path.name}.unfinished")
    try:
        with _writing(path.name):
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
                for file in files:
                    archive.write(file, file.relative_to(within or file.parent))
            os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Within the block, what the disk refuses is told as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written ({error.strerror or error}); make room on the disk, and try again."
        ) from error
