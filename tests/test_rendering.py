"""Drawing: the pictures that plain diffusers draws, each from its own seed alone."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, SchedulerMixin, StableDiffusionPipeline
from PIL import Image

from iteris_sd import backbone as backbones
from iteris_sd import rendering
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import finish
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.rendering import SAMPLERS, Settings
from tests import toybook

PROMPT = "a dog on the beach"


def drawn(backbone: Backbone, seed: int, settings: Settings, negative: str = "") -> Image.Image:
    return finish(rendering.render(backbone, PROMPT, negative, [seed], settings))[0].image


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
@pytest.mark.parametrize(
    ("told", "clips"), [({}, False), ({"clip_sample": True}, True), ({"clip_sample": False}, False)]
)
@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler])
def test_no_sampler_bounds_latents_unless_the_model_says_so(
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    kind: type[SchedulerMixin],
    told: dict[str, bool],
    clips: bool,
) -> None:
    monkeypatch.setattr(backbone.pipeline, "scheduler", kind.from_config(told))
    assert rendering.scheduler(backbone, Settings(sampler)).config["clip_sample"] == clips


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
    work = rendering.render(backbone, PROMPT, "", [0], Settings(steps=4))
    assert [next(work).done, next(work).done] == [1, 2]
    work.close()
    handle.remove()
    assert len(calls) == 2
    with pytest.raises(StopIteration):
        next(work)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_draws_the_same_pictures(backbone: Backbone, sampler: str) -> None:
    settings = Settings(sampler, 3)
    together = finish(rendering.render(backbone, PROMPT, "a barn", [5, 6, 7], settings))
    for seed, one in zip([5, 6, 7], together, strict=True):
        assert apart(one.image, drawn(backbone, seed, settings, "a barn")) <= 1


def test_where_memory_runs_out_batches_get_smaller(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = backbone.unet.forward

    def scarce(latents: torch.Tensor, *rest: object, **more: object) -> object:
        sizes.append(len(latents) // 2)
        if len(latents) > 2 * most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest, **more)

    monkeypatch.setattr(backbone.unet, "forward", scarce)
    most = 1
    made = finish(rendering.render(backbone, PROMPT, "", [1, 2, 3], Settings(steps=1)))
    assert sizes == [3, 1, 2, 1, 1] and len(made) == 3
    most = 0
    with pytest.raises(
        UserError, match="Memory ran out while drawing one picture of 16 px. Ask for a smaller"
    ):
        finish(rendering.render(backbone, PROMPT, "", [1, 2], Settings(steps=1)))


def test_other_errors_are_not_taken_for_want_of_memory(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone.unet, "forward", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        finish(rendering.render(backbone, PROMPT, "", [1, 2], Settings(steps=1)))


def test_pictures_have_the_size_that_was_asked_for(backbone: Backbone) -> None:
    (made,) = finish(rendering.render(backbone, PROMPT, "", [1], Settings(steps=1, size=64)))
    assert made.image.size == (64, 64)


def test_a_picture_that_the_safety_checker_blanks_is_flagged(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(pixels: torch.Tensor, device: object, dtype: object) -> tuple[torch.Tensor, list[bool]]:
        return torch.stack([pixels[0], torch.zeros_like(pixels[1])]), [False, True]

    monkeypatch.setattr(backbone.pipeline, "run_safety_checker", checked)
    fine, blanked = finish(rendering.render(backbone, PROMPT, "", [1, 2], Settings(steps=1)))
    assert not fine.flagged and blanked.flagged
    assert np.asarray(blanked.image).std() == 0 < np.asarray(fine.image).std()


def test_what_overflows_in_halves_is_decoded_again(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = backbone.vae.decoder.conv_out
    latents = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    scale = 1e6 / float(last.weight.abs().max())  # sums of these are beyond 65504, which halves end at
    wanted = np.asarray(rendering.decode(backbone, latents)[0].image, dtype=int)
    try:
        with torch.no_grad():
            backbone.vae.half()
            handle = last.register_forward_hook(lambda _, __, made: made * scale / scale)
            (made,) = rendering.decode(backbone, latents.half())
        assert backbone.vae.dtype == torch.float16  # as it was
        assert np.abs(np.asarray(made.image, dtype=int) - wanted).max() <= 2
    finally:
        handle.remove()
        backbones.forget()


@pytest.mark.parametrize("broken", ["vae", "unet"])
def test_a_picture_of_no_numbers_is_blank_and_flagged_and_the_others_go_on(
    backbone: Backbone, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"vae": backbone.vae.decoder, "unet": backbone.unet}[broken]
    forward, told = network.forward, []

    def overflowing(*given: Any, **more: Any) -> Any:
        made = forward(*given, **more)
        (made.sample if broken == "unet" else made)[0] = float("nan")
        told.append(True)
        return made

    monkeypatch.setattr(network, "forward", overflowing)
    lost, fine = finish(rendering.render(backbone, PROMPT, "", [1, 2], Settings(steps=1, guidance=1.0)))
    assert told and lost.flagged and not np.asarray(lost.image).any()
    assert not fine.flagged and np.asarray(fine.image).std() > 0


@pytest.mark.parametrize("sampler", [name for name in rendering.SAMPLERS if name != "lcm"])
def test_each_step_tells_what_the_finished_latents_are_taken_to_be(backbone: Backbone, sampler: str) -> None:
    """For DDIM that is the x_0 of its own scheduler; of every sampler's last step it is nearly what is decoded."""
    steps: list[rendering.Step] = []
    work = rendering.render(backbone, PROMPT, "", [3], Settings(sampler, 12))
    while True:
        try:
            steps.append(next(work))
        except StopIteration as stop:
            (drawn,) = stop.value
            break
    assert [step.done for step in steps] == list(range(1, 13))
    apart = [float((step.clean[0] - drawn.latents).norm() / drawn.latents.norm()) for step in steps]
    assert apart[-1] < 0.2 and apart[-1] < apart[0]


def looks(backbone: Backbone) -> list[rendering.Look]:
    """The base model and two concepts, whose LoRAs touch the text encoder and the U-Net."""
    loras = [Library.shipped().find(name).load().lora for name in ("dog", "barn")]
    return [rendering.Look("a dog next to a barn", None), *(rendering.Look(PROMPT, lora) for lora in loras)]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler a"])
def test_several_adapters_in_one_batch_draw_what_each_draws_alone(
    backbone: Backbone, sampler: str, guidance: float
) -> None:
    settings, passes = Settings(sampler, 3, guidance), []
    handle = backbone.unet.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    several = finish(rendering.render_columns(backbone, looks(backbone), "a cat", [5, 6], settings))
    handle.remove()
    assert passes == [6 if guidance == 1.0 else 12] * 3
    for look, drawn_together in zip(looks(backbone), several, strict=True):
        with backbone.prepared({}, look.lora):
            alone = finish(rendering.render(backbone, look.prompt, "a cat", [5, 6], settings))
        for one, other in zip(drawn_together, alone, strict=True):
            assert apart(one.image, other.image) <= 1
    assert apart(several[1][0].image, several[2][0].image) > 1  # the adapters do make a difference


def test_where_memory_does_not_suffice_for_several_adapters_one_is_drawn_after_the_other(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = finish(rendering.render_columns(backbone, looks(backbone), "", [5], Settings(steps=2)))
    forward = backbone.unet.forward

    def scarce(latents: torch.Tensor, *rest: object, **more: object) -> object:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest, **more)

    before = toybook.trace(backbone)
    monkeypatch.setattr(backbone.unet, "forward", scarce)
    made = finish(rendering.render_columns(backbone, looks(backbone), "", [5], Settings(steps=2)))
    monkeypatch.undo()
    assert [len(column) for column in made] == [1, 1, 1]
    assert all(apart(one[0].image, two[0].image) <= 1 for one, two in zip(made, wanted, strict=True))
    assert toybook.trace(backbone) == before


def test_prompts_read_in_more_pieces_than_others_are_drawn_apart(backbone: Backbone) -> None:
    long = rendering.Look(" ".join(["a dog"] * 60), looks(backbone)[1].lora)
    made = finish(rendering.render_columns(backbone, [looks(backbone)[0], long], "", [5], Settings(steps=1)))
    assert [len(column) for column in made] == [1, 1]
