"""The whole road on a simulated GPU: every tensor is where it must be, whatever the memory, in events nowhere else."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iteris_sd import backbone as backbones
from iteris_sd import (
    bases,
    calibration,
    composer,
    explaining,
    memory,
    merger,
    rendering,
    scoring,
    sd15,
    spilling,
)
from iteris_sd.backbone import Backbone
from iteris_sd.benchmarks import authors, merging, problems
from iteris_sd.benchmarks import rendering as benchmark
from iteris_sd.calibration import finish
from iteris_sd.concepts import Library
from iteris_sd.errors import UserError
from iteris_sd.events import Composition, MergeDone
from iteris_sd.merging import METHODS
from iteris_sd.merging.moments import Moments
from iteris_sd.recipe import Recipe
from iteris_sd.rendering import SAMPLERS, Drawn, Look, Settings
from tests import simulated_gpu, toybook
from tests.test_benchmarks import TINY
from tests.toys import attention_stack, problem, worst

GPU = torch.device("cuda")
GB = 2**30
THIN: dict[str, Any] = {
    "unet": {**sd15.UNET, "block_out_channels": (32, 32, 32, 32), "attention_head_dim": 4},
    "vae": {**sd15.VAE, "block_out_channels": (32, 32, 32, 32)},
    "text": {**sd15.TEXT, "num_hidden_layers": 2, "intermediate_size": 32},
}
CLOSE = 1e-2  # what a condition number of 1e4 makes of float32's rounding
ROOMY, TIGHT, SMALL = (
    80 * GB,
    3 * GB // 2,
    GB // 2,
)  # free memory: plenty; in pieces; parts wait in main memory


@pytest.fixture
def gpu() -> Iterator[None]:
    """A simulated GPU for the length of a test."""
    with simulated_gpu.installed():
        yield


def thin(device: torch.device) -> Backbone:
    """A narrow Stable Diffusion v1.5 in halves, placed as free memory allows."""
    pipeline = sd15.random_pipeline(**THIN)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(torch.float16)
    memory.place(pipeline, device)
    return Backbone(bases.find("sd15"), pipeline)


def held(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in an event, with the way to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from held(one, f"{path}[{key}]")
    elif isinstance(value, list | tuple):
        for k, one in enumerate(value):
            yield from held(one, f"{path}[{k}]")
    elif is_dataclass(value):
        for one in fields(value):
            yield from held(getattr(value, one.name), f"{path}.{one.name}")


def asked(*methods: str, **changes: object) -> Recipe:
    """Dog and barn by some methods, as quickly as may be."""
    data: dict[str, object] = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "methods": [{"name": name} for name in methods],
        "seeds": [1, 2],
        "steps": 2,
        "calibration": {"samples": 6, "steps": 2, "unconditional": 2},
    }
    return Recipe.of(data | changes)


# The simulation


def test_it_refuses_what_a_gpu_refuses(gpu: None) -> None:
    there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    assert there.device.type == "cuda" and (there + there).device == there.device
    for wrong in (
        lambda: there + here,
        lambda: here @ there.T,
        lambda: there.numpy(),
        lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: torch.nn.Linear(3, 3)(there),
        lambda: torch.nn.functional.scaled_dot_product_attention(there[None], here[None], here[None]),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    there[:1] += 1
    there.copy_(there + torch.tensor(1.0))
    assert there.cpu().tolist() == [[3.0] * 3, [2.0] * 3] and not isinstance(there.cpu(), type(there))


# Drawing


@cache
def drawn_on_a_cpu(sampler: str) -> list[Drawn]:
    """What `drawn` makes of the model where there is no GPU."""
    return drawn(thin(torch.device("cpu")), sampler)


def drawn(backbone: Backbone, sampler: str, prompt: str = "a dog <rex>, (red:1.3)") -> list[Drawn]:
    """Two seeds under a learned token and a LoRA."""
    lora = toybook.random_lora(backbone.pipeline, 2, torch.Generator().manual_seed(0))
    token = torch.randn(2, 768, generator=torch.Generator().manual_seed(1))
    with backbone.prepared({"<rex>": token}, lora, clip_skip=2):
        return finish(rendering.render(backbone, prompt, "blurry", [1, 2], Settings(sampler, 2, 4.0, 64)))


def apart(one: Drawn, other: Drawn) -> float:
    """The mean difference of pixels, of 255; halves round otherwise in batches of another size."""
    return float(np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).mean())


@pytest.mark.parametrize(
    ("sampler", "free"), [*((sampler, ROOMY) for sampler in SAMPLERS), ("ddim", TIGHT), ("ddim", SMALL)]
)
def test_a_gpu_draws_what_a_cpu_draws_whatever_the_memory(sampler: str, free: int) -> None:
    wanted = drawn_on_a_cpu(sampler)
    assert apart(*wanted) > 20
    with simulated_gpu.installed(free):
        backbone = thin(GPU)
        assert backbone.device.type == "cuda" and backbone.dtype == torch.float16
        assert (backbone.unet.device.type == "cpu") == (free == SMALL)
        backbone.encode(["the text encoder is there when tokens come"])
        for found, want in zip(drawn(backbone, sampler), wanted, strict=True):
            assert apart(found, want) < 2 and found.latents.device.type == "cuda"
        assert backbone.encode(["and is whole when they are gone"]).device.type == "cuda"


def test_columns_are_drawn_at_once_where_there_is_room(gpu: None) -> None:
    backbone = thin(GPU)
    loras = [
        toybook.random_lora(backbone.pipeline, 2, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    looks = [Look("a dog", lora) for lora in (None, *loras)]
    rows: list[int] = []
    handle = backbone.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    several = finish(rendering.render_columns(backbone, looks, "", [1, 2], Settings("ddim", 2, 4.0, 64)))
    handle.remove()
    assert rows == [2 * 3 * 2] * 2
    for look, pictures in zip(looks, several, strict=True):
        with backbone.prepared({}, look.lora):
            alone = finish(rendering.render(backbone, "a dog", "", [1, 2], Settings("ddim", 2, 4.0, 64)))
        for found, want in zip(pictures, alone, strict=True):
            assert apart(found, want) < 2


def test_a_large_gpu_draws_more_at_once() -> None:
    sizes = {}
    for free in (2 * GB, 8 * GB, 80 * GB):
        with simulated_gpu.installed(free):
            sizes[free] = [
                memory.enlarged(torch.nn.Linear(1, 1, device="cuda", dtype=dtype))
                for dtype in (torch.float16, torch.float32)
            ]
    assert sizes == {2 * GB: [1, 1], 8 * GB: [2, 1], 80 * GB: [4, 4]}
    assert memory.enlarged(torch.nn.Linear(1, 1)) == 1


def test_pictures_are_cut_into_batches_seeds_first() -> None:
    assert list(rendering.batches(3, [1, 2], 4)) == [(slice(0, 2), [1, 2]), (slice(2, 4), [1, 2])]
    assert list(rendering.batches(2, [1, 2, 3], 2)) == [
        (slice(0, 1), [1, 2]),
        (slice(1, 2), [1, 2]),
        (slice(0, 2), [3]),
    ]


def test_pictures_are_decoded_one_by_one_where_memory_does_not_suffice(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = backbone.vae.decode, list[int]()

    def scarce(latents: Tensor) -> Any:
        calls.append(len(latents))
        if len(latents) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return decode(latents)

    monkeypatch.setattr(backbone.vae, "decode", scarce)
    assert len(rendering.decode(backbone, torch.zeros(3, *backbone.latent_shape()))) == 3
    assert calls == [3, 1, 1, 1]


# Merging


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_on_a_gpu_as_on_a_cpu(method: str, toy: Path) -> None:
    quick = {"steps": 3} if method == "gradient_fusion" else {}
    recipe = asked(method, methods=[{"name": method, "parameters": quick}])
    (wanted,) = finish(merger.merge_all(recipe, Library.shipped()))[1].values()
    merger.forget()
    backbones.forget()
    with simulated_gpu.installed():
        events = list(composer.compose(recipe, Library.shipped(), previews=True))
        assert backbones.load("storybook").device.type == "cuda"
        backbones.forget()
    (done,) = (event for event in events if isinstance(event, MergeDone))
    assert [path for event in events for path, tensor in held(event) if tensor.device.type != "cpu"] == []
    assert worst(done.merged.lora, wanted.lora) < CLOSE
    assert isinstance(events[-1], Composition) and len(events[-1].pictures) == 2


@pytest.mark.parametrize(
    "parameters",
    [{}, {"iterations": 2}, {"objective": "full", "adaptive_on": "full"}],
    ids=["sweep", "iterations", "full"],
)
def test_merging_goes_on_where_parts_of_the_model_wait(parameters: dict, toy: Path) -> None:
    method = {"name": "iteris", "parameters": parameters}
    recipe = asked("iteris", methods=[method], scorer="none")
    (wanted,) = finish(merger.merge_all(recipe, Library.shipped()))[1].values()
    merger.forget()
    backbones.forget()
    with simulated_gpu.installed(GB // 4):
        (found,) = finish(merger.merge_all(recipe, Library.shipped()))[1].values()
        assert memory.waits(backbones.load("storybook").unet)
        backbones.forget()
    assert worst(found.lora, wanted.lora) < CLOSE


def test_the_shipped_model_and_scorer_work_on_a_gpu(gpu: None) -> None:
    try:
        backbones.load("storybook")
    except UserError as absent:
        pytest.skip(str(absent))
    try:
        *_, made = composer.compose(asked("linear", seeds=[1]), Library.shipped(), previews=True)
        assert isinstance(made, Composition) and made.pictures[0].score.text_cosine is not None
    finally:
        backbones.forget()
        scoring.load.cache_clear()
        merger.forget()


def test_a_look_inside_works_on_a_gpu(toy: Path, gpu: None) -> None:
    for event in explaining.explain(asked("iteris"), Library.shipped(), 1):
        assert [path for path, tensor in held(event) if tensor.device.type != "cpu"] == []
    backbones.forget()


def test_what_waits_on_a_gpu_is_bounded_by_its_memory() -> None:
    with simulated_gpu.installed(80 * GB):
        assert spilling.bound(GPU) == 40 * GB
        assert spilling.bound(torch.device("cpu")) == 4 * GB


@pytest.mark.parametrize("width", [700, 768, 1600])
def test_moments_are_the_same_in_wide_blocks(width: int) -> None:
    x, y = torch.randn(2, 30, width, dtype=torch.float64)
    with simulated_gpu.installed():
        found = Moments.of(x.to("cuda"), y.to("cuda"))
        for part, wanted in ((found.own, x.T @ x), (found.merged, y.T @ y), (found.cross, y.T @ x)):
            torch.testing.assert_close(part.cpu(), wanted)


@pytest.mark.parametrize("parameters", [{}, {"iterations": 2}])
def test_the_engine_alone_merges_there(parameters: dict) -> None:
    toy = attention_stack()
    loras, batches = problem(toy, (2, 3))
    wanted = finish(calibration.merge(toy.modules, loras, toy.samples(batches, 2), "iteris", parameters))
    with simulated_gpu.installed():
        toy.model.to("cuda")
        there = [tuple(tensor.to("cuda") for tensor in batch) for batch in batches]
        placed = [lora.to("cuda") for lora in loras]
        found = finish(calibration.merge(toy.modules, placed, toy.samples(there, 2), "iteris", parameters))
    assert worst(found.lora.to("cpu"), wanted.lora) < 1e-4


# Benchmarks


def test_the_benchmarks_run_there(gpu: None) -> None:
    there = problems.build(replace(TINY, device="cuda"))
    theirs, ours = next(authors.solves(there, 1e-3)), merging._merged(there, 1e-3, iterations=0)
    assert merging._difference(ours.lora, theirs) < 1e-4
    job = benchmark.Job(methods=2, seeds=1, steps=1, size=64, rank=2, device="cuda")
    drawn = benchmark.run(job, partial(sd15.random_pipeline, **THIN))
    assert drawn.machine == "a simulated GPU" and drawn.batch == 2
    assert min(drawn.ours, drawn.plain, drawn.bound) > 0
