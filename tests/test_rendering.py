"""Drawing: the pictures that plain diffusers draws, each from its own seed alone."""

from collections.abc import Generator

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from iteris_sd import backbone as backbones
from iteris_sd import rendering
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import finish
from iteris_sd.errors import UserError
from iteris_sd.rendering import SAMPLERS, Settings
from tests import toybook

PROMPT = "a dog on the beach"


def drawn(backbone: Backbone, seed: int, settings: Settings, negative: str = "") -> Image.Image:
    return finish(rendering.render(backbone, PROMPT, negative, seed, settings))


def drawn_plainly(backbone: Backbone, sampler: str, guidance: float, negative: str) -> Image.Image:
    """Seed 5 in four steps by the pipeline's own loop."""
    pipeline = StableDiffusionPipeline(**backbone.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SAMPLERS[sampler].from_config(pipeline.scheduler.config)
    return pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        height=backbone.base.size,
        width=backbone.base.size,
    ).images[0]


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any pixel, of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("guidance", "negative"), [(4.0, ""), (4.0, "a barn"), (1.0, "")])
def test_the_loop_draws_what_plain_diffusers_draws(
    backbone: Backbone, sampler: str, guidance: float, negative: str
) -> None:
    ours = drawn(backbone, 5, Settings(sampler, 4, guidance), negative)
    assert ours.size == (toybook.SIDE, toybook.SIDE)
    assert np.asarray(ours).std() > 5  # not a blank
    assert apart(ours, drawn_plainly(backbone, sampler, guidance, negative)) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_draws_what_plain_diffusers_draws_on_the_shipped_model(sampler: str) -> None:
    try:
        backbone = backbones.load("storybook")
    except UserError as absent:
        pytest.skip(str(absent))
    assert apart(drawn(backbone, 5, Settings(sampler, 4)), drawn_plainly(backbone, sampler, 4.0, "")) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_does_not_depend_on_what_was_drawn_before(backbone: Backbone, sampler: str) -> None:
    settings = Settings(sampler, 3)
    first = drawn(backbone, 1, settings)
    assert apart(drawn(backbone, 2, settings), first) > 5
    torch.rand(7)
    assert apart(drawn(backbone, 1, settings), first) == 0


def test_it_can_be_stopped_after_every_step(backbone: Backbone) -> None:
    calls: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    work: Generator[int, None, Image.Image] = rendering.render(backbone, PROMPT, "", 0, Settings(steps=4))
    assert [next(work), next(work)] == [1, 2]
    work.close()
    handle.remove()
    assert len(calls) == 2
    with pytest.raises(StopIteration):
        next(work)
