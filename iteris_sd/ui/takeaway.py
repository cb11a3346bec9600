"""The files of one composition: pictures as they are finished, and at the end what can be downloaded."""

from __future__ import annotations

import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import bases
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone, Picture
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from iteris_sd.calibration import Merged
    from iteris_sd.concepts import Loaded
    from iteris_sd.events import Event

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
        """Write the downloads; returns them by name (`pictures`, `grid`, `table` …), and the scores."""
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
        return files, scores

    def lora(self, method: str, layout: str = "diffusers") -> Path:
        """A zip with the LoRA that a method merged, in a layout of `export.LAYOUTS`, and its learned tokens.

        Raises UserError when there is no such LoRA or layout.
        """
        from iteris_sd import export

        if method not in self._merged:
            raise UserError(f"There is no LoRA merged by {method!r}; compose with that method first.")
        form, merged = export.Form(layout), self._merged[method]
        names = "-".join(re.sub(r"[^\w-]+", "_", use.name) for use in self._recipe.concepts)
        name = f"{export.short(names)}-{method}"
        folder = self._folder / f"{method}-{layout}"
        packed = self._folder / f"{name}-{layout}.zip"
        with self._packing:
            if not packed.exists():
                composition = self._composition()
                metadata = export.lora_metadata(self._recipe, composition.concepts, merged)
                path = folder / (name if layout == "peft" else f"{name}.safetensors")
                written = export.write_lora(merged.lora, composition.tokens, path, metadata, form)
                _zip(packed, written, folder)
                shutil.rmtree(folder)
        return packed

    def _composition(self) -> Composition:
        """The composition, or what there is of one that was stopped."""
        from iteris_sd import merger, scoring

        if self._whole is not None:
            return self._whole
        chosen = self._recipe.scorer or bases.find(self._recipe.base).scorer
        scorer = scoring.SCORERS[chosen].title if chosen in scoring.SCORERS else "nobody"
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.relative_to(within or file.parent))
    return path
