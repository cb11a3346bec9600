"""Merging problems in the exact shapes of Stable Diffusion v1.5, with random weights: nothing is downloaded.

| scope      | layers that the two LoRAs touch                                                                     |
|------------|-----------------------------------------------------------------------------------------------------|
| text       | q, k, v, out of the text encoder's 12 layers, and the 32 cross-attention K/V of the U-Net: 80        |
| everything | those, and every linear layer of the U-Net's transformer blocks                                     |

In the scope `text` no other part of the U-Net is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from iteris_sd import sd15
from iteris_sd.calibration import Part, Samples
from iteris_sd.formats.naming import canonical
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.samples import micro_batch

KV_WIDTHS = (
    (320,) * 2 + (640,) * 2 + (1280,) * 6 + (640,) * 3 + (320,) * 3
)  # attn2 blocks from input to output


@dataclass(frozen=True)
class Size:
    """How large a problem is; the defaults are the paper's on Stable Diffusion v1.5's shapes."""

    scope: str = "text"
    samples: int = 50
    concepts: int = 2
    rank: int = 32
    layers: int = 12
    width: int = 768
    positions: int = 77
    latents: int = 64
    kv_widths: tuple[int, ...] = KV_WIDTHS
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, LoRAs, and samples: all that a way of merging is given.

    `modules`: layer name -> layer. `run(ids, latents, times)` runs the model; `batches[n]` are its arguments for
    concept n. `macs`: multiply-adds of one sample's forward in all linear and convolutional layers.
    """

    modules: Mapping[str, nn.Module]
    loras: Sequence[LoRA]
    run: Callable[..., Mapping[str, Tensor]]
    batches: Sequence[tuple[Tensor, ...]]
    micro_batch: int
    macs: int

    def samples(self) -> Samples:
        """The samples as the calibration engine takes them."""

        def feed(parts: Sequence[Part]) -> Mapping[str, Tensor]:
            chosen = [[rows[part] for rows in self.batches[n]] for n, part in parts]
            return self.run(*(torch.cat(rows) for rows in zip(*chosen, strict=True)))

        return Samples(tuple(len(b[0]) for b in self.batches), feed, self.micro_batch)


def build(size: Size) -> Problem:
    """The problem of this size; the same at each call."""
    torch.manual_seed(0)
    text = _text_encoder(size)
    modules = _layers("text_encoder", text, ("q_proj", "k_proj", "v_proj", "out_proj"))
    kv = _cross_attention(size) if size.scope == "text" else {}
    unet = _unet(size) if size.scope == "everything" else None
    if unet is not None:
        ends = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out")
        modules |= _layers("unet", unet, ends)
    modules |= kv
    loras = [random_lora(modules, size.rank, seed=n) for n in range(size.concepts)]

    def run(ids: Tensor, *pictured: Tensor) -> Mapping[str, Tensor]:
        states = text(ids).last_hidden_state
        if unet is not None:
            unet(pictured[0], pictured[1], states)
        return dict.fromkeys(kv, states)

    batches = [_batch(size, seed=n) for n in range(size.concepts)]
    at_once = micro_batch(1 if unet is None else size.latents**2)
    macs = _macs(run, [m for part in (text, unet) if part is not None for m in part.modules()], batches[0])
    return Problem(modules, loras, run, batches, at_once, macs)


def _text_encoder(size: Size) -> CLIPTextModel:
    own = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.width // 64),
        "max_position_embeddings": size.positions,
    }
    return CLIPTextModel(CLIPTextConfig(**{**sd15.TEXT, **own})).to(size.device).requires_grad_(False).eval()


def _cross_attention(size: Size) -> dict[str, nn.Module]:
    """The K and V layers alone, named as if they stood in a U-Net."""
    return {
        f"unet.blocks.{k}.attn2.{kind}": nn.Linear(
            size.width, out, bias=False, device=size.device
        ).requires_grad_(False)
        for k, out in enumerate(size.kv_widths)
        for kind in ("to_k", "to_v")
    }


def _unet(size: Size) -> UNet2DConditionModel:
    own = {"sample_size": size.latents, "cross_attention_dim": size.width}
    unet = UNet2DConditionModel(**{**sd15.UNET, **own})
    return unet.to(size.device).requires_grad_(False).eval()


def _layers(component: str, model: nn.Module, ends: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers whose names end in one of these, by their canonical names."""
    return {
        canonical(component, path): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(ends)
    }


def random_lora(modules: Mapping[str, nn.Module], rank: int, seed: int) -> LoRA:
    """A random LoRA on linear layers that changes each one's output by about a quarter of its size."""
    rng = torch.Generator().manual_seed(1000 + seed)
    layers = {}
    for name, module in modules.items():
        weight = module.get_parameter("weight")
        out, width = weight.shape
        down, up = torch.randn(rank, width, generator=rng), torch.randn(out, rank, generator=rng)
        scale = 0.25 * float(weight.detach().norm()) / (out * rank * width) ** 0.5
        layers[name] = LowRank(down, up * scale).to(weight.device)
    return LoRA(layers)


def _batch(size: Size, seed: int) -> tuple[Tensor, ...]:
    """Random prompts, latents and times of one concept; prompts differ in length and share their padding."""
    rng = torch.Generator().manual_seed(2000 + seed)
    ids = torch.randint(0, 49406, (size.samples, size.positions), generator=rng)
    lengths = torch.randint(5, max(6, size.positions // 4), (size.samples, 1), generator=rng)
    ids = torch.where(torch.arange(size.positions) < lengths, ids, 49407).to(size.device)
    if size.scope == "text":
        return (ids,)
    latents = torch.randn(size.samples, 4, size.latents, size.latents, generator=rng)
    times = torch.randint(0, 1000, (size.samples,), generator=rng)
    return ids, latents.to(size.device), times.to(size.device)


def _macs(run: Callable[..., object], modules: Sequence[nn.Module], batch: tuple[Tensor, ...]) -> int:
    """Multiply-adds of all linear and convolutional layers in the forward of one sample."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.get_parameter("weight")[0].numel()

    handles = [m.register_forward_hook(count) for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        run(*(rows[:1] for rows in batch))
    for handle in handles:
        handle.remove()
    return total
