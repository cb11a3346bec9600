"""`/compose` and `/merge` for programs: plain values in, files and figures out. Tools for a language model likewise."""

# No `from __future__ import annotations` here: Gradio reads the types of the endpoints from their signatures.

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from iteris_sd import export, limits
from iteris_sd.bases import Base
from iteris_sd.errors import UserError
from iteris_sd.ui import asking
from iteris_sd.ui.jobs import Job, Merging, Work
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


async def _packed(work: Job | Merging, method: str, layout: str = "diffusers") -> Path:
    """The zip of a merged LoRA. Writing it takes long, and others are served meanwhile. Raises UserError."""
    if work.bag is None:
        raise UserError("The merge was stopped before it ended.")
    return await asyncio.to_thread(work.bag.lora, method, layout)


def _file(path: Path) -> gr.FileData:
    return gr.FileData(path=str(path), orig_name=path.name)


def _uses(visit: Visit, concepts: Sequence[str], weights: Sequence[float] | None) -> list[dict[str, Any]]:
    """Concepts as a recipe has them, as strongly as they were kept where no weights are given. Raises UserError."""
    if weights and len(weights) != len(concepts):
        raise UserError(
            f"There are {len(weights)} weights for {len(concepts)} concepts; give one per concept, or none."
        )
    kept = [visit.library.find(str(name)).weight for name in concepts]
    return [{"name": n, "weight": w} for n, w in zip(concepts, weights or kept, strict=True)]


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
        steps: int = base.steps,
        guidance: float = base.guidance,
        sampler: str = base.sampler,
        negative: str = "",
        samples: int = 50,
        base_model: str = base.name,
        size: int | None = None,
        clip_skip: int = 1,
        weights: list[float] | None = None,
        parameters: dict[str, dict[str, Any]] | None = None,
        strength: float = 1.0,
        retention: int = 0,
    ) -> tuple[list[gr.FileData], dict[str, Any], dict[str, Any]]:
        """Merge concepts by several methods, draw the same seeds with each, and score the pictures.

        Args:
            concepts: names of concepts, 1 to 6, such as ["dog", "barn"].
            prompt: what to draw; {0}, {1} … stand for the concepts in order.
            methods: columns of the grid: base, alone, or names that `python -m iteris_sd methods` lists; a list, or
                words with commas.
            seeds: rows of the grid: a list of whole numbers, one number, or numbers with commas.
            steps: denoising steps.
            guidance: how strongly the prompt is followed; 1 means plainly.
            sampler: ddim, dpm++, ddpm, euler a, unipc or lcm.
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
            files: pictures (PNG with the recipe inside), grid.png, recipe.json, scores.json and .csv, pictures.zip, and
                for each merging method a zip with the LoRA and its embeddings.
            summary: the content of scores.json: every score, means, 95 % intervals, n, the scorer's name.
            recipe: the content of recipe.json.
        """
        visit = visits.of(request)
        try:
            recipe = asking.recipe(
                base=base_model,
                concepts=_uses(visit, concepts, weights),
                prompt=prompt,
                negative=negative,
                methods=_words(methods),
                seeds=asking.seeds(seeds),
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                size=size,
                clip_skip=clip_skip,
                samples=samples,
                strength=strength,
                retention=retention,
                parameters=parameters,
            )
            job = await _ended(visit.compose(recipe))
            loras = [await _packed(job, method) for method in (job.bag.merged if job.bag else ())]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        paths = [drawn.path for drawn in job.state.pictures] + list((job.state.files or {}).values()) + loras
        return [_file(path) for path in paths], dict(job.state.scores or {}), json.loads(recipe.json_text())

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
            method: how they are merged, a name that `python -m iteris_sd methods` lists.
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
                steps=base.steps,
                guidance=base.guidance,
                sampler=base.sampler,
                samples=samples,
                parameters={method: parameters or {}},
            )
            export.Form(layout)  # known before the work, too
            work = await _ended(visit.merge(recipe))
            return _file(await _packed(work, method, layout))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.api(merge, api_name="merge", **_WAITING)


def _words(text: list[str] | str) -> list[str]:
    return [word.strip() for word in text.split(",")] if isinstance(text, str) else text
