"""`/compose` for programs: plain values in, files and figures out."""

# No `from __future__ import annotations` here: Gradio reads the types of the endpoint from its signature.

import asyncio
import json
from typing import Any

import gradio as gr

from iteris_sd.bases import Base
from iteris_sd.errors import UserError
from iteris_sd.ui import asking
from iteris_sd.ui.jobs import Job
from iteris_sd.ui.visits import Visits

ONE_AT_A_TIME = {
    "concurrency_limit": 1,
    "concurrency_id": "compose",
}  # the page's and the programs' jobs alike


async def _finished(job: Job) -> tuple[list[gr.FileData], dict[str, Any]]:
    """Its files and scores, when a job has ended."""
    try:
        while not job.ended:
            await asyncio.sleep(0.1)
    finally:
        job.stop()  # a cancelled call ends its job
    if job.state.phase == "failed":
        raise gr.Error(job.state.message, print_exception=False)
    paths = [drawn.path for drawn in job.state.pictures] + list((job.state.files or {}).values())
    files = [gr.FileData(path=str(path), orig_name=path.name) for path in paths]
    return files, dict(job.state.scores or {})


def add(visits: Visits, base: Base) -> None:
    """Add the endpoint to the page that is being built."""
    usual = ",".join(asking.DEFAULT_METHODS)

    async def compose(
        request: gr.Request,
        concepts: list[str],
        prompt: str,
        methods: list[str] | str = usual,
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
    ) -> tuple[list[gr.FileData], dict[str, Any], dict[str, Any]]:
        """Merge concepts by several methods, draw the same seeds with each, and score the pictures.

        Args:
            concepts: names of concepts, 1 to 6, such as ["dog", "barn"].
            prompt: what to draw; {0}, {1} … stand for the concepts in order.
            methods: columns of the grid: base, or names that `python -m iteris_sd methods` lists; a list, or words with
                commas.
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

        Returns:
            files: pictures (PNG with the recipe inside), grid.png, recipe.json, scores.json, pictures.zip, and for each
                merging method a zip with the LoRA and its embeddings.
            summary: the content of scores.json: every score, means, 95 % intervals, n, the scorer's name.
            recipe: the content of recipe.json.
        """
        visit = visits.of(request)
        try:
            recipe = asking.recipe(
                base=base_model,
                concepts=concepts,
                prompt=prompt,
                negative=negative,
                methods=[m.strip() for m in methods.split(",")] if isinstance(methods, str) else methods,
                seeds=asking.seeds(seeds),
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                size=size,
                clip_skip=clip_skip,
                samples=samples,
                weights=weights or [visit.library.find(str(name)).weight for name in concepts],
                parameters=parameters,
            )
            job = visit.begin(recipe)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return (*await _finished(job), json.loads(recipe.json_text()))

    gr.api(compose, api_name="compose", **ONE_AT_A_TIME)
