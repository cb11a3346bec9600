"""What a person takes away from a composition: the grid, the pictures, the scores, the recipe, the merged LoRAs.

A folder or a pair of files is made beside its place and then moved there, so that nothing half-written stays.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo

from iteris_sd import __version__, bases
from iteris_sd.errors import UserError
from iteris_sd.files import nearest, patiently, possible
from iteris_sd.grid import grid
from iteris_sd.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from iteris_sd.calibration import Merged
    from iteris_sd.concepts import Loaded
    from iteris_sd.events import Composition, Picture
    from iteris_sd.lora import LoRA

__all__ = [
    "Form",
    "check_folder",
    "check_lora_path",
    "grid",
    "lora_metadata",
    "picture_name",
    "picture_png",
    "scores",
    "scores_csv",
    "write",
    "write_diagnostics",
    "write_lora",
]

SUFFIX = ".safetensors"
LAYOUTS = ("diffusers", "kohya", "peft")  # those of `formats.write`, known before torch is loaded
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_MADE_BY = f"iteris-sd {__version__}"


def write(composition: Composition, folder: Path) -> None:
    """Write everything into `folder`: all of it, or nothing.

    Files of the same names are replaced, and those of an earlier composition go; others are left alone. Raises
    UserError when the folder cannot be written.
    """
    earlier = _earlier(folder)
    with _assembled(folder) as draft:
        grid(composition).save(draft / "grid.png")
        for picture in (*composition.pictures, *composition.retained):
            (draft / picture_name(picture)).write_bytes(picture_png(picture, composition.recipe))
        (draft / "scores.json").write_text(_json(scores(composition)), encoding="utf-8")
        (draft / "scores.csv").write_text(scores_csv(composition), encoding="utf-8")
        (draft / "recipe.json").write_text(composition.recipe.json_text(), encoding="utf-8")
        for method, merged in composition.merged.items():
            metadata = lora_metadata(composition.recipe, composition.concepts, merged)
            write_lora(merged.lora, composition.tokens, draft / "merged" / f"{method}{SUFFIX}", metadata)
        now = {str(file.relative_to(draft)).lower() for file in draft.rglob("*")}
    for file in (file for file in earlier if str(file).lower() not in now):
        with suppress(OSError):  # all is written; what cannot be removed stays
            patiently((folder / file).unlink)


def _earlier(folder: Path) -> list[Path]:
    """Pictures and merged LoRAs of the composition that `folder` holds, as far as its own files tell of them."""
    try:
        told = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        names = [picture["file"] for kind in ("pictures", "retained") for picture in told[kind]]
        methods = [use.name for use in Recipe.read(folder / "recipe.json").merging]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return []
    pictures = [Path(Path(str(name)).name) for name in names]
    merged = [Path("merged", f"{method}{SUFFIX}") for method in methods]
    return [picture for picture in pictures if picture.suffix == ".png"] + merged


@dataclass(frozen=True)
class Form:
    """How a LoRA is written: a layout of `formats.write`, `precision` fp32, fp16 or bf16 (as it is where None), and
    whether learned tokens go into the file, which only kohya's layout can hold. Raises UserError for what is not."""

    layout: str = "diffusers"
    precision: str | None = None
    bundle: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"There is no layout {self.layout!r}; choose one of {', '.join(LAYOUTS)}.")
        if self.precision not in (None, *PRECISIONS):
            raise UserError(
                f"There is no precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}."
            )
        if self.bundle and self.layout != "kohya":
            raise UserError(f"Learned tokens fit into files of kohya's layout only, not {self.layout}'s.")


def write_lora(
    lora: LoRA, tokens: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], form: Form = Form()
) -> list[Path]:
    """Write a LoRA to `path` and the learned tokens as `<name>.embeddings/<token>.safetensors`: all or nothing.

    The two travel apart, unless `form` bundles them, because diffusers refuses a LoRA file that carries tokens; loaded
    together, they draw our picture there, at the strength that the recipe names. Returns the files written. Raises
    UserError when the path has an ending that does not suit the form, a number does not fit the precision, or nothing
    can be written.
    """
    import torch

    from iteris_sd import formats

    check_lora_path(path, form)
    dtype = None if form.precision is None else getattr(torch, PRECISIONS[form.precision])
    inside, beside = (tokens, {}) if form.bundle else ({}, tokens)
    with _assembled(path.parent) as draft:
        files = formats.write(draft / path.name, lora, metadata, dtype, form.layout, inside)
        names = [file.relative_to(draft) for file in files]
        for name, (token, vectors) in zip(_token_files(beside), beside.items(), strict=True):
            names.append(Path(f"{path.stem}.embeddings", name))
            formats.write_embedding(draft / names[-1], token, vectors)
    return [path.parent / name for name in names]


def write_diagnostics(merged: Merged, recipe: Recipe, folder: Path) -> list[Path]:
    """Write the table and figures of `diagnostics` into `folder`: all of them, or nothing. Raises UserError."""
    from iteris_sd import diagnostics

    with _assembled(folder) as draft:
        names = [file.name for file in diagnostics.write(merged, [c.name for c in recipe.concepts], draft)]
    return [folder / name for name in names]


def lora_metadata(recipe: Recipe, concepts: Sequence[Loaded], merged: Merged) -> dict[str, str]:
    """What a merged LoRA's file says of itself: how it was made, from what, and the triggers it answers to."""
    sources = [
        {
            "name": c.concept.name,
            "trigger": c.concept.trigger,
            "licence": c.concept.licence,
            "weight": use.weight,
            "blocks": use.blocks.model_dump(),
            "file": c.concept.lora.name,
            "sha256": c.sha256,
        }
        for c, use in zip(concepts, recipe.concepts, strict=True)
    ]
    base, names = bases.find(recipe.base), " + ".join(c.concept.name for c in concepts)
    # What other tools show: https://github.com/Stability-AI/ModelSpec, and kohya's sd-scripts.
    shown = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": f"{names}, merged by {merged.method}",
        "modelspec.resolution": f"{base.size}x{base.size}",
        "modelspec.trigger_phrase": ", ".join(c.concept.trigger for c in concepts),
        "modelspec.prediction_type": base.prediction,
        "ss_base_model_version": base.kohya_version,
        "ss_network_module": "networks.lora",
    }
    return shown | {
        "made_by": _MADE_BY,
        "base": bases.called(recipe.base),
        "method": merged.method,
        "parameters": json.dumps(dict(merged.parameters)),
        "calibration": json.dumps(recipe.calibration.model_dump(mode="json")),
        "micro_batch": json.dumps(merged.micro_batch),
        "sources": json.dumps(sources, ensure_ascii=False),
    }


def picture_name(picture: Picture) -> str:
    """The name of a picture's file."""
    scene = f"retention-{short(picture.scene)}_" if picture.scene else ""
    return re.sub(r"[^\w.-]+", "-", f"{scene}{short(picture.method)}_seed{picture.seed}.png")


def short(name: str) -> str:
    """A name as part of a file's: a long one cut, and told apart by a digest, since files' names have 255 bytes.

    Paths have 260 characters on Windows.
    """
    return name if len(name) <= 40 else f"{name[:24]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def picture_png(picture: Picture, recipe: Recipe) -> bytes:
    """The picture as a PNG that says how it was made.

    Two text entries: `parameters`, worded as other picture tools do; `iteris_sd`, JSON with the recipe, the method,
    the seed, the prompt and the scores.
    """
    told = {**recipe.model_dump(mode="json"), "base": bases.called(recipe.base)}
    facts = {"made_by": _MADE_BY, "recipe": told, **_facts(picture)}
    entries = PngInfo()
    entries.add_text("parameters", _parameters(picture, recipe))
    entries.add_text("iteris_sd", json.dumps(facts, ensure_ascii=False))
    content = io.BytesIO()
    picture.image.save(content, format="PNG", pnginfo=entries)
    return content.getvalue()


def scores(composition: Composition) -> dict[str, Any]:
    """Every picture's scores, their summary by method, and how methods differ from the linear average, seed by seed.

    `scorer` is the name of the one that compared with the text; `encoders` are those that compared with reference
    pictures. Plain values for JSON.
    """
    from iteris_sd import intervals, scoring

    pictures = composition.pictures
    return {
        "scorer": composition.scorer,
        "encoders": scoring.encoders(composition.scorer, pictures),
        "base": bases.called(composition.recipe.base),
        "seconds": dict(composition.seconds),
        "summary": [asdict(row) for row in intervals.summarise(pictures)],
        "paired": [asdict(row) for row in intervals.paired(pictures, intervals.BASELINE)],
        "pictures": [{"file": picture_name(p), **_facts(p)} for p in pictures],
        "retained": [{"file": picture_name(p), **_facts(p)} for p in composition.retained],
    }


def scores_csv(composition: Composition) -> str:
    """A table with one line per picture: method, seed, prompt, flagged (true or false), then `scoring.measures`.

    What a picture was not scored by stays empty. A text that a spreadsheet would take for a formula has an apostrophe
    before it.
    """
    from iteris_sd import scoring

    found = [(picture, scoring.measures(picture.score)) for picture in composition.pictures]
    columns = list(dict.fromkeys(measure for _, own in found for measure in own))
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow(["method", "seed", "prompt", "flagged", *map(_inert, columns)])
    for picture, own in found:
        flagged = str(picture.flagged).lower()
        values = [own.get(measure, "") for measure in columns]
        table.writerow([_inert(picture.method), picture.seed, _inert(picture.prompt), flagged, *values])
    return content.getvalue()


def check_folder(folder: Path) -> None:
    """Raise UserError when `folder` can be no folder to write into; called before the work, too."""
    there = nearest(folder)
    if not there.is_dir():
        raise UserError(f"{there} is a file; choose a folder to write into.")
    if not os.access(there, os.W_OK):
        raise UserError(f"Nothing may be written into {there}; choose another folder.")


def check_lora_path(path: Path, form: Form = Form()) -> None:
    """Raise UserError when `path` can be no LoRA to write in that form; called before the work, too."""
    if form.layout == "peft":
        if path.suffix == SUFFIX or path.is_file():
            raise UserError(
                f"PEFT's layout is a folder; {path} cannot be one. Give it a name without an ending."
            )
    elif path.suffix != SUFFIX or path.is_dir():
        raise UserError(f"A LoRA cannot be written to {path}; give it a name that ends in {SUFFIX}.")
    check_folder(path.parent)


def _facts(picture: Picture) -> dict[str, Any]:
    """Scene, method, seed, prompt and scores of one picture."""
    return {
        "scene": picture.scene,
        "method": picture.method,
        "seed": picture.seed,
        "prompt": picture.prompt,
        "scores": asdict(picture.score),
        "flagged": picture.flagged,
    }


def _inert(text: str) -> str:
    """The text as a cell that no spreadsheet computes (https://owasp.org/www-community/attacks/CSV_Injection)."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _parameters(picture: Picture, recipe: Recipe) -> str:
    facts = {
        "Steps": recipe.steps,
        "Sampler": recipe.sampler,
        "CFG scale": f"{recipe.guidance:g}",
        "Seed": picture.seed,
        "Size": "{}x{}".format(*picture.image.size),
        "Model": bases.called(recipe.base),
        "Method": picture.method,
        "Concepts": " + ".join(f"{use.name} ({use.weight:g})" for use in recipe.concepts),
        "Version": _MADE_BY,
    }
    negative = [f"Negative prompt: {recipe.negative}"] if recipe.negative else []
    return "\n".join(
        [picture.prompt, *negative, ", ".join(f"{name}: {fact}" for name, fact in facts.items())]
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _token_files(tokens: Iterable[str]) -> list[str]:
    """A file name for each token, all different, whatever characters a foreign token has."""
    names: list[str] = []
    for token in tokens:
        name = possible(re.sub(r"[^\w-]+", "_", token.strip("<>")) or "token")
        while f"{name}{SUFFIX}".lower() in (other.lower() for other in names):
            name += "_"
        names.append(f"{name}{SUFFIX}")
    return names


@contextmanager
def _assembled(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; what is in it moves to `folder` if the block ends well, else it vanishes."""
    check_folder(folder)
    try:
        # Inside the folder, where it exists: beside it may be another disk, and nothing moves there in one step.
        around = folder if folder.exists() else folder.parent
        around.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=around) as temporary:
            draft = Path(temporary, "draft")
            draft.mkdir()
            yield draft
            _move(draft, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from error


def _move(draft: Path, folder: Path) -> None:
    """Put the files of `draft` into `folder`, which may exist."""
    if not folder.exists():
        patiently(lambda: draft.rename(folder))
        return
    places = {file: folder / file.relative_to(draft) for file in draft.rglob("*") if file.is_file()}
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise UserError(f"{place} is a folder where a file should be written; rename it.")
    for file, place in places.items():
        patiently(partial(file.replace, place))
