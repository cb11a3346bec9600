"""The files of one composition: pictures as they are finished, and at the end what can be downloaded."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iteris_sd import bases
from iteris_sd.concepts import Library
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from iteris_sd.calibration import Merged
    from iteris_sd.composer import Composition, Event, Picture


@dataclass(frozen=True)
class Drawn:
    """A finished picture in a file, with its scores: text alignment, and image alignment by concept."""

    method: str
    seed: int
    path: Path
    text: float | None
    images: Mapping[str, float]
    flagged: bool = False


class Bag:
    """Collects the events of a composition, finished or not, and writes what they bring into `folder`."""

    def __init__(self, recipe: Recipe, library: Library, folder: Path) -> None:
        self._recipe, self._library, self._folder = recipe, library, folder
        self._pictures: list[Picture] = []
        self._merged: dict[str, Merged] = {}
        self._whole: Composition | None = None
        self.drawn: tuple[Drawn, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the composition came to its end."""
        return self._whole is not None

    def take(self, event: Event) -> None:
        """Keep what an event brings; a picture is written at once, with its recipe inside."""
        from iteris_sd import composer, export

        if isinstance(event, composer.MergeDone):
            self._merged[event.method] = event.merged
        elif isinstance(event, composer.Composition):
            self._whole = event
        elif isinstance(event, composer.Picture):
            path = self._folder / export.picture_name(event)
            path.write_bytes(export.picture_png(event, self._recipe))
            self._pictures.append(event)
            score = event.score
            made = Drawn(event.method, event.seed, path, score.text, dict(score.images), event.flagged)
            self.drawn = (*self.drawn, made)

    def pack(self) -> tuple[dict[str, Path], dict[str, Any] | None]:
        """Write the downloads; returns them by name (`pictures`, `grid`, `recipe`, `lora.<method>`), and the scores."""
        from iteris_sd import export

        composition = self._whole or self._unfinished()
        files = {"recipe": self._folder / "recipe.json"}
        files["recipe"].write_text(self._recipe.json_text(), encoding="utf-8")
        for method, merged in composition.merged.items():
            files[f"lora.{method}"] = self._pack_lora(composition, method, merged)
        if not composition.pictures:
            return files, None
        scores = export.scores(composition)
        files["scores"] = self._folder / "scores.json"
        files["scores"].write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files["grid"] = self._folder / "grid.png"
        export.grid(composition).save(files["grid"])
        pictures = [drawn.path for drawn in self.drawn]
        files["pictures"] = _zip(self._folder / "pictures.zip", [*pictures, files["recipe"], files["scores"]])
        return files, scores

    def _pack_lora(self, composition: Composition, method: str, merged: Merged) -> Path:
        from iteris_sd import export

        names = "-".join(re.sub(r"[^\w-]+", "_", use.name) for use in self._recipe.concepts)
        folder = self._folder / f"{names}-{method}"
        metadata = export.lora_metadata(self._recipe, composition.concepts, merged)
        written = export.write_lora(
            merged.lora, composition.tokens, folder / f"{folder.name}.safetensors", metadata
        )
        return _zip(folder.with_name(f"{folder.name}.zip"), written, folder)

    def _unfinished(self) -> Composition:
        """What there is of a composition that was stopped."""
        from iteris_sd import composer, scoring

        chosen = self._recipe.scorer or bases.find(self._recipe.base).scorer
        scorer = scoring.SCORERS[chosen].title if chosen in scoring.SCORERS else "nobody"
        concepts = tuple(composer.pick(self._recipe, self._library))
        return composer.Composition(self._recipe, concepts, self._merged, tuple(self._pictures), scorer)


def _zip(path: Path, files: Iterable[Path], within: Path | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.relative_to(within or file.parent))
    return path
