"""The engine on models it knows nothing of: Algorithm 1 to convergence on T5, BLIP, a U-Net, both layouts of CLIP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import BlipTextConfig, T5Config, T5ForConditionalGeneration
from transformers.models.blip.modeling_blip_text import BlipTextModel

from iteris_sd import formats
from iteris_sd.calibration import finish, merge
from iteris_sd.layers import applied
from iteris_sd.lora import LoRA, LowRank
from tests.reference import algorithm_1, as_rows
from tests.toys import Batch, Toy, distance, problem, random_adapter, randomised, text_encoder, worst

EXACT = 1e-8


@dataclass(frozen=True)
class Called(Toy):
    """A toy whose model takes its batch in its own way."""

    call: Callable[[nn.Module, Batch], object] = lambda model, batch: model(*batch)

    def run(self, model: nn.Module, batch: Batch) -> None:
        self.call(model, batch)


def t5() -> Toy:
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = randomised(T5ForConditionalGeneration(config))
    paths = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith((".q", ".v", ".k"))
    ]

    def draw(m: int, rng: torch.Generator) -> Batch:
        return torch.randint(0, 40, (m, 7), generator=rng), torch.randint(0, 40, (m, 5), generator=rng)

    return Called(
        "model", model, tuple(paths), draw, lambda model, b: model(input_ids=b[0], decoder_input_ids=b[1])
    )


def blip() -> Toy:
    config = BlipTextConfig(
        vocab_size=40,
        hidden_size=16,
        encoder_hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        is_decoder=True,
        bos_token_id=1,
        sep_token_id=2,
        pad_token_id=0,
    )
    model = randomised(BlipTextModel(config, add_pooling_layer=False))
    paths = [
        n
        for n, m in model.named_modules()
        if n.endswith(("query", "key", "value")) and isinstance(m, nn.Linear)
    ]

    def draw(m: int, rng: torch.Generator) -> Batch:
        ids = torch.randint(1, 40, (m, 6), generator=rng)
        return ids, torch.randn(m, 5, 12, generator=rng, dtype=torch.float64)

    return Called(
        "model",
        model,
        tuple(paths),
        draw,
        lambda model, b: model(input_ids=b[0], encoder_hidden_states=b[1], is_decoder=True, use_cache=False),
    )


def unet() -> Toy:
    """With convolutions of 1 × 1 and 3 × 3, one of stride 2, beside the attention."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    model = model.double().eval()
    wanted = (
        "conv_in",
        "proj_in",
        "attn2.to_k",
        "attn1.to_q",
        "downsamplers.0.conv",
        "mid_block.resnets.0.conv1",
    )
    shortcuts = ("up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut")
    paths = [n for n, m in model.named_modules() if n.endswith((*wanted, *shortcuts))]

    def draw(m: int, rng: torch.Generator) -> Batch:
        latents = torch.randn(m, 4, 8, 8, generator=rng, dtype=torch.float64)
        times = torch.randint(0, 1000, (m,), generator=rng)
        return latents, times, torch.randn(m, 5, 12, generator=rng, dtype=torch.float64)

    return Toy("unet", model, tuple(paths), draw)


def old_clip() -> Toy:
    """The layout of older transformers: everything one level down, under `text_model`."""

    class Wrapped(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.text_model = model

        def forward(self, ids: Tensor) -> object:
            return self.text_model(ids)

    toy = text_encoder()
    inner = toy.model if hasattr(toy.model, "encoder") else toy.model.text_model
    paths = tuple(f"text_model.{path.removeprefix('text_model.')}" for path in toy.paths)
    return Toy("text_encoder", Wrapped(inner), paths, toy.draw)


MODELS = {"t5": t5, "blip": blip, "unet": unet, "clip": text_encoder, "clip, older layout": old_clip}


@pytest.mark.parametrize("name", MODELS)
def test_the_sweep_is_algorithm_1_run_to_convergence(name: str) -> None:
    toy = MODELS[name]()
    loras, batches = problem(toy, (2, 3))
    loras = [LoRA(lora, kernels(toy)) for lora in loras]
    dense = [toy.dense(lora) for lora in loras]
    wanted = algorithm_1(toy.model, toy.run, dense, batches, 1e-3, iterations=14)
    for micro_batch in (None, 2):
        work = merge(toy.modules, loras, toy.samples(batches, micro_batch), "iteris", {"alpha": 1e-3})
        assert worst(finish(work).lora, wanted) < EXACT
    early = algorithm_1(toy.model, toy.run, dense, batches, 1e-3, iterations=0)
    assert max(distance(early[n], wanted[n]) for n in wanted) > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_comes_to_the_same_merge(name: str) -> None:
    toy = MODELS[name]()
    loras, batches = problem(toy, (2, 3))
    loras = [LoRA(lora, kernels(toy)) for lora in loras]
    here = finish(merge(toy.modules, loras, toy.samples(batches), "iteris", {"alpha": 1e-3})).lora
    toy.model.to("cuda")
    there = [tuple(tensor.to("cuda") for tensor in batch) for batch in batches]
    moved = [lora.to("cuda") for lora in loras]
    found = finish(merge(toy.modules, moved, toy.samples(there), "iteris", {"alpha": 1e-3})).lora
    wanted = {layer: adapter.delta() for layer, adapter in here.items()}
    assert worst(found.to("cpu"), wanted) < 1e-5


def kernels(toy: Toy) -> dict[str, tuple[int, int]]:
    return {
        n: (m.kernel_size[0], m.kernel_size[1]) for n, m in toy.modules.items() if isinstance(m, nn.Conv2d)
    }


def test_layers_that_read_the_encoder_share_one_site() -> None:
    toy = t5()
    loras, batches = problem(toy, (2, 3))
    found = finish(merge(toy.modules, loras, toy.samples(batches), "iteris", {}))
    readers = [r for r in found.reports if "EncDecAttention" in r.name and r.name.endswith((".k", ".v"))]
    assert len(readers) == 4 and len({r.site for r in readers}) == 1


def test_a_convolution_and_its_shortcut_share_no_moments() -> None:
    """They look at one tensor in two ways, where it comes to both."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.halved = nn.Conv2d(3, 4, 3, padding=1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x) + self.halved(x).repeat(1, 1, 2, 2)

    def draw(m: int, rng: torch.Generator) -> Batch:
        return (torch.randn(m, 3, 4, 4, generator=rng, dtype=torch.float64),)

    toy = Toy("unet", Fork().double().eval(), ("wide", "narrow", "halved"), draw)
    loras, batches = problem(toy, (2, 3))
    loras = [LoRA(lora, kernels(toy)) for lora in loras]
    found = finish(merge(toy.modules, loras, toy.samples(batches), "iteris", {}))
    assert {r.site for r in found.reports} == set(toy.modules)
    assert [r.rows for r in found.reports] == [9 * 16, 9 * 16, 9 * 4]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_an_adapter_on_a_convolution_is_its_weights_change(kernel: int, stride: int) -> None:
    layer = nn.Conv2d(3, 5, kernel, stride, padding=kernel // 2, bias=False).double().requires_grad_(False)
    adapter = random_adapter(5, 3 * kernel**2, 2, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    changed = nn.functional.conv2d(x, adapter.delta().view_as(layer.weight), None, stride, kernel // 2)
    torch.testing.assert_close(applied(layer, adapter, x), changed)
    torch.testing.assert_close(
        (as_rows(layer, x) @ adapter.delta().T).T.reshape(5, -1), changed.transpose(0, 1).flatten(1)
    )


def test_convolutions_are_written_and_read_back(tmp_path) -> None:
    rng = torch.Generator().manual_seed(0)
    name, plain = "unet.down_blocks.0.resnets.0.conv1", "unet.mid_block.attentions.0.proj_in"
    layers = {name: random_adapter(6, 36, 2, rng), plain: random_adapter(6, 4, 3, rng)}
    formats.write(tmp_path / "conv.safetensors", LoRA(layers, {name: (3, 3), plain: (1, 1)}))
    found = formats.read(tmp_path / "conv.safetensors").lora
    assert dict(found.kernels) == {name: (3, 3), plain: (1, 1)}
    for key, adapter in layers.items():
        assert distance(found[key].delta(), adapter.delta()) < EXACT
    assert LowRank.nothing(found[name]).rank == 0
