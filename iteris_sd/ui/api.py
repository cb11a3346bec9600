"""`/compose` and `/merge` for programs: plain values in, files and figures out. Tools for a language model likewise."""

# No `from __future__ import annotations` here: Gradio reads the types of the endpoints from their signatures.

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from iteris_sd import bases, export, limits
from iteris_sd.bases import Base
from iteris_sd.errors import UserError
from iteris_sd.merging import registry
from iteris_sd.ui import asking
from iteris_sd.ui.jobs import Job, Merging, Work
from iteris_sd.ui.takeaway import Bag
from iteris_sd.ui.visits import Visit, Visits

W = TypeVar("W", bound=Work)
_USUAL = ",".join(asking.DEFAULT_METHODS)
_WAITING = {"concurrency_limit": limits.MAX_CALLS, "concurrency_id": "programs"}  # work itself takes its turn


async def _ended(work: W) -> W:
    """The work when it has ended; its error is the endpoint's."""
    try:
        while not work.ended:
            await asyncio.sleep(0.1)
    finally:
        work.stop()  # a cancelled call ends its work
    if work.state.phase != "done":
        raise gr.Error(work.state.message or "It was stopped before it ended.", print_exception=False)
    return work


def _bag(work: Job | Merging) -> Bag:
    """What ended work brought. Packing it takes long: in a thread, so that others are served meanwhile."""
    if work.bag is None:
        raise UserError("It was stopped before it ended.")
    return work.bag


def _file(path: Path) -> gr.FileData:
    return gr.FileData(path=str(path), orig_name=path.name)


def _uses(visit: Visit, concepts: Any, weights: Any) -> list[dict[str, Any]]:
    """Concepts as a recipe has them, as strongly as they were kept where no weights are given. Raises UserError."""
    names = _words(concepts, "concepts")
    if not isinstance(weights, list | tuple | None) or weights and len(weights) != len(names):
        raise UserError(
            f"For {len(names)} concepts there should be as many weights in a list, or none, not {weights!r}."
        )
    asking.check_count("concepts", names, limits.MAX_CONCEPTS)
    library = visit.library  # read anew each time it is asked for
    kept = [library.find(name).weight for name in names]
    return [{"name": n, "weight": w} for n, w in zip(names, weights or kept, strict=True)]


def _words(given: Any, what: str) -> list[str]:
    """Names in a list, or with commas between them. Raises UserError for anything else."""
    if isinstance(given, str):
        return [word.strip() for word in given.split(",")]
    if not isinstance(given, list | tuple) or not all(isinstance(word, str) for word in given):
        raise UserError(f"{what} should be names in a list, or with commas between them, not {given!r}.")
    return list(given)


def _table(given: Any, such: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"parameters should be a table, such as {such}, not {given!r}.")
    return given


def _settings(given: Any, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameters by method. Raises UserError for those of a method that is not asked for, and what is no table."""
    such = '{"iteris": {"alpha": 0.0001}}'
    tables = {str(method): _table(table, such) for method, table in _table(given or {}, such).items()}
    if strange := sorted(set(tables) - set(methods)):
        raise UserError(
            f"There are parameters for {strange[0]!r}, which is not among the methods asked for; ask for it, or leave "
            "them out."
        )
    return tables


def _drawing(base: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures are drawn: as was given, and else as suits the base model. Raises UserError for one unknown."""
    return bases.find(str(base)).drawing | {name: value for name, value in given.items() if value is not None}


def add(visits: Visits, base: Base) -> None:
    """Add the endpoints to the page that is being built."""
    _add_compose(visits, base)
    _add_merge(visits, base)


def _add_compose(visits: Visits, base: Base) -> None:
    async def compose(
        request: gr.Request,
        concepts: list[str],
        prompt: str,
        methods: list[str] | str = _USUAL,
        seeds: list[int] | int | str = "0,1,2,3",
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        negative: str = "",
        samples: int = 50,
        base_model: str = base.name,
        size: int | None = None,
        clip_skip: int = 1,
        weights: list[float] | None = None,
        parameters: dict[str, dict[str, Any]] | None = None,
        strength: float = 1.0,
        retention: int = 0,
    ) -> tuple[gr.FileData, gr.FileData, list[gr.FileData], dict[str, Any], dict[str, Any]]:
        """Merge concepts by several methods, draw the same seeds with each, and score the pictures.

        Args:
            concepts: names of concepts, 1 to 6, such as ["dog", "barn"].
            prompt: what to draw; {0}, {1} … stand for the concepts in order.
            methods: columns of the grid, a list or words with commas: METHODS.
            seeds: rows of the grid: a list of whole numbers, one number, or numbers with commas.
            steps: denoising steps; as many as suit the base model if left out.
            guidance: how strongly the prompt is followed, 1 means plainly; as suits the base model if left out.
            sampler: ddim, dpm++, ddpm, euler a, unipc or lcm; what suits the base model if left out.
            negative: what the picture should not show.
            samples: calibration samples per concept.
            base_model: storybook, sd15 or another that the page offers.
            size: side of the pictures in pixels, a multiple of 64; the base model's own if left out.
            clip_skip: 1 reads the text encoder's last layer, 2 the one before.
            weights: how strongly each concept is applied; as it was kept if left out.
            parameters: of methods, as {"iteris": {"alpha": 0.0001}}.
            strength: how strongly merged adapters are applied while drawing, 0 to 2.
            retention: of so many of the seeds, also draw each concept alone by its own LoRA and by each merged one.

        Returns:
            grid: one picture of all pictures with their scores.
            archive: a zip with the pictures (PNG with the recipe inside), recipe.json, scores.json and .csv.
            loras: for each merging method a zip with the LoRA and its embeddings.
            summary: the content of scores.json: every score, means, 95 % intervals, n, the scorer's name.
            recipe: the content of recipe.json.
        """
        visit = visits.of(request)
        try:
            columns = _words(methods, "methods")
            given = {"sampler": sampler, "steps": steps, "guidance": guidance}
            recipe = asking.recipe(
                base=base_model,
                concepts=_uses(visit, concepts, weights),
                prompt=prompt,
                negative=negative,
                methods=columns,
                seeds=asking.seeds(seeds),
                **_drawing(base_model, given),
                size=size,
                clip_skip=clip_skip,
                samples=samples,
                strength=strength,
                retention=retention,
                parameters=_settings(parameters, columns),
            )
            job = await _ended(visit.compose(recipe))
            bag = _bag(job)
            # In a list, which Gradio serves from where they are; of a file of its own it keeps a copy for each call.
            loras = [_file(await asyncio.to_thread(bag.lora, method)) for method in bag.merged]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        files, scores = job.state.files or {}, dict(job.state.scores or {})
        return _file(files["grid"]), _file(files["pictures"]), loras, scores, json.loads(recipe.json_text())

    compose.__doc__ = (compose.__doc__ or "").replace("METHODS", ", ".join(asking.METHOD_CHOICES))

    gr.api(compose, api_name="compose", **_WAITING)


def _add_merge(visits: Visits, base: Base) -> None:
    async def merge(
        request: gr.Request,
        concepts: list[str],
        method: str = "iteris",
        layout: str = "diffusers",
        samples: int = 50,
        base_model: str = base.name,
        weights: list[float] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> gr.FileData:
        """Merge concepts into one LoRA that other tools load; no pictures.

        Args:
            concepts: names of concepts, 1 to 6, such as ["dog", "barn"].
            method: how they are merged: METHODS.
            layout: diffusers (also ComfyUI), kohya (A1111, Forge, ComfyUI) or peft.
            samples: calibration samples per concept.
            base_model: storybook, sd15 or another that the page offers.
            weights: how strongly each concept is applied; as it was kept if left out.
            parameters: of the method, as {"alpha": 0.0001}.

        Returns:
            lora: a zip with the merged LoRA and the learned tokens of all concepts.
        """
        visit = visits.of(request)
        try:
            recipe = asking.recipe(
                base=base_model,
                concepts=_uses(visit, concepts, weights),
                prompt="a picture",  # a recipe has one, which the merge does not depend on
                negative="",
                methods=[method],
                seeds=[0],
                **_drawing(base_model, {}),
                samples=samples,
                parameters={method: _table(parameters or {}, '{"alpha": 0.0001}')},
            )
            export.Form(layout)  # known before the work, too
            registry.find(method)
            work = await _ended(visit.merge(recipe))
            return _file(await asyncio.to_thread(_bag(work).lora, method, layout))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    merge.__doc__ = (merge.__doc__ or "").replace("METHODS", ", ".join(registry.METHODS))
    gr.api(merge, api_name="merge", **_WAITING)
