"""Small random models, LoRAs and samples for the tests of the merging engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from iteris_sd.calibration import Part, Samples
from iteris_sd.lora import LoRA, LowRank

Batch = tuple[Tensor, ...]


class AttentionStack(nn.Module):
    """Two transformer blocks as in a U-Net: self-attention, cross-attention to a text, feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [BasicTransformerBlock(16, 2, 8, cross_attention_dim=12) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states=text)
        return hidden


@dataclass(frozen=True)
class Toy:
    """A model, the layers that LoRAs may touch, and how samples are drawn."""

    component: str
    model: nn.Module
    paths: tuple[str, ...]
    draw: Callable[[int, torch.Generator], Batch]

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {f"{self.component}.{path}": self.model.get_submodule(path) for path in self.paths}

    def run(self, model: nn.Module, batch: Batch) -> None:
        model(*batch)

    def samples(self, batches: Sequence[Batch], micro_batch: int | None = None) -> Samples:
        def feed(parts: Sequence[Part]) -> None:
            chosen = [tuple(tensor[part] for tensor in batches[n]) for n, part in parts]
            self.run(self.model, tuple(torch.cat(tensors) for tensors in zip(*chosen, strict=True)))

        return Samples(tuple(len(batch[0]) for batch in batches), feed, micro_batch)

    def lora(self, rank: int, seed: int, paths: Sequence[str] | None = None) -> LoRA:
        rng = torch.Generator().manual_seed(seed)
        layers = {}
        for path in self.paths if paths is None else paths:
            out, width = self.model.get_parameter(f"{path}.weight").flatten(1).shape
            layers[f"{self.component}.{path}"] = random_adapter(out, width, rank, rng)
        return LoRA(layers)

    def dense(self, lora: LoRA) -> dict[str, Tensor]:
        return {name.partition(".")[2]: adapter.delta() for name, adapter in lora.items()}


def random_adapter(out: int, width: int, rank: int, rng: torch.Generator) -> LowRank:
    """A random float64 adapter with ‖ΔW x‖ about half of ‖x‖."""
    down = torch.randn(rank, width, generator=rng, dtype=torch.float64)
    up = torch.randn(out, rank, generator=rng, dtype=torch.float64)
    return LowRank(down, up * 0.5 / (rank * width) ** 0.5)


def text_encoder(layers: int = 2) -> Toy:
    """A random CLIP text model in float64, adapted in q, k, v, out, fc1 and fc2: four stages per layer."""
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=38,
        eos_token_id=39,
    )
    model = randomised(CLIPTextModel(config))
    stem = "" if hasattr(model, "encoder") else "text_model."
    heads = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    paths = tuple(f"{stem}encoder.layers.{i}.{head}" for i in range(layers) for head in heads)
    return Toy("text_encoder", model, paths, lambda m, rng: (torch.randint(0, 40, (m, 8), generator=rng),))


def attention_stack() -> Toy:
    """A random stack of attention blocks in float64, adapted in all attention projections."""
    heads = [f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v", "to_out.0")]
    paths = tuple(f"blocks.{i}.{head}" for i in range(2) for head in heads)

    def draw(m: int, rng: torch.Generator) -> Batch:
        return tuple(torch.randn(m, *s, generator=rng, dtype=torch.float64) for s in ((6, 16), (5, 12)))

    return Toy("unet", randomised(AttentionStack()), paths, draw)


def problem(toy: Toy, ranks: Sequence[int], seed: int = 0) -> tuple[list[LoRA], list[Batch]]:
    """LoRAs of the given ranks on every layer, and samples of unequal number."""
    rng = torch.Generator().manual_seed(seed)
    loras = [toy.lora(rank, seed=100 * seed + n) for n, rank in enumerate(ranks)]
    return loras, [toy.draw(4 + n, rng) for n in range(len(ranks))]


def distance(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; 0 where they are equal, zeros among them (α = 1 merges one input to nothing)."""
    return 0.0 if torch.equal(found, wanted) else float((found - wanted).norm() / wanted.norm())


def worst(found: LoRA, wanted: Any) -> float:
    """The largest relative distance of any layer's ΔW; ``wanted`` is a LoRA or {module path: ΔW}."""
    assert {n.partition(".")[2] for n in found} == {n.partition(".")[2] if n in found else n for n in wanted}
    dense = {n: a.delta() for n, a in wanted.items()} if isinstance(wanted, LoRA) else wanted
    return max(
        distance(adapter.delta(), dense[name] if name in dense else dense[name.partition(".")[2]])
        for name, adapter in found.items()
    )


def randomised(model: nn.Module) -> nn.Module:
    """Fresh weights of unit gain, in float64: library initialisations are too small to show mistakes."""
    rng = torch.Generator().manual_seed(7)
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            fresh = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.data = fresh / parameter.shape[1] ** 0.5
    return model
