"""A base model in memory: its layers by name, its text encoding, and how adapters and tokens go in and out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from iteris_sd import bases
from iteris_sd.errors import UserError
from iteris_sd.layers import applied, check_fit
from iteris_sd.lora import LoRA, LowRank

_TEXT_LAYOUT = "text_model."  # older transformers put this before every module name


class Backbone:
    """A diffusers pipeline seen from the road: prompts to states, adapters in and out, never copied.

    `layers`: canonical layer name -> the bare linear or convolutional layer. The pipeline's own weights are never
    written to: adapters work through hooks, learned tokens through an embedding table that is put in and taken out.
    """

    def __init__(self, base: bases.Base, pipeline: StableDiffusionPipeline) -> None:
        self.base, self.pipeline = base, pipeline
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.layers: Mapping[str, nn.Module] = MappingProxyType(
            {
                f"{component}.{name.removeprefix(_TEXT_LAYOUT)}": module
                for component, root in (("unet", self.unet), ("text_encoder", self.text_encoder))
                for name, module in root.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d)
            }
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.unet.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one picture's latents."""
        side = self.base.size // self.pipeline.vae_scale_factor
        return self.unet.config.in_channels, side, side

    def tokenise(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, (n, positions) int64, cut off where the text encoder ends."""
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return words.input_ids.to(self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states of prompts, (n, positions, width)."""
        return self.states(self.tokenise(prompts))

    def states(self, ids: Tensor) -> Tensor:
        """Text states of token ids, (n, positions, width)."""
        return self.text_encoder(ids).last_hidden_state

    @contextmanager
    def prepared(self, tokens: Mapping[str, Tensor], lora: LoRA | None = None) -> Iterator[None]:
        """Within the block, learned tokens are known and `lora` is applied; afterwards the model is as before."""
        with ExitStack() as stack:
            stack.enter_context(self._knowing(tokens))
            if lora is not None:
                stack.enter_context(self._adapted(lora))
            yield

    @contextmanager
    def _adapted(self, lora: LoRA) -> Iterator[None]:
        check_fit(lora, self.layers, "This LoRA")
        placed = lora.to(self.device, self.dtype)
        handles = [
            self.layers[name].register_forward_hook(_adding(adapter)) for name, adapter in placed.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _knowing(self, tokens: Mapping[str, Tensor]) -> Iterator[None]:
        """Put learned tokens into a copy of the tokenizer and behind the embedding table."""
        if not tokens:
            yield
            return
        table = self.text_encoder.get_input_embeddings()
        width = table.weight.shape[1]
        for token, vectors in tokens.items():
            if vectors.shape != (1, width):
                raise UserError(
                    f"The token {token!r} has the shape {tuple(vectors.shape)}, but {self.base.title} needs "
                    f"{(1, width)}; it was made for another model."
                )
        if known := tokens.keys() & self.tokenizer.get_vocab().keys():
            raise UserError(f"The base model knows the token {min(known)!r} already; rename it.")
        tokenizer, grown = self.tokenizer, copy.deepcopy(self.tokenizer)
        grown.add_tokens(list(tokens))
        learned = torch.cat([v.to(table.weight) for v in tokens.values()])
        longer = nn.Embedding.from_pretrained(
            torch.cat([table.weight.detach()[: len(tokenizer)], learned]), freeze=True
        )
        try:
            self.text_encoder.set_input_embeddings(longer)
            self.tokenizer = self.pipeline.tokenizer = grown
            yield
        finally:
            self.text_encoder.set_input_embeddings(table)
            self.tokenizer = self.pipeline.tokenizer = tokenizer


def _adding(adapter: LowRank):  # type: ignore[no-untyped-def]  # a torch hook
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + applied(module, adapter, args[0])

    return hook


@lru_cache(maxsize=1)
def load(name: str = "storybook") -> Backbone:
    """The base model called `name`, loaded once per process. Raises UserError when there is none."""
    base = bases.find(name)
    if not Path(base.source, "model_index.json").is_file():
        raise UserError(
            f"The weights of {base.title} are not at {base.source}; fetch the whole project again."
        )
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # ours is the only one
    pipeline = StableDiffusionPipeline.from_pretrained(
        base.source, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.to(device).set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return Backbone(base, pipeline)
