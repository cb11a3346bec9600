"""A base model in memory: its layers by name, its text encoding, and how adapters and tokens go in and out."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from iteris_sd import bases, checkpoints, compiling, memory, prompting, sd15, weights
from iteris_sd.errors import UserError
from iteris_sd.formats.naming import canonical
from iteris_sd.layers import added, check_fit, weight
from iteris_sd.lora import LoRA, LowRank

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What the libraries raise for files that are.
_BROKEN = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)
_LOADING = threading.Lock()  # so that two threads that want it load it once
_loaded: dict[bases.Base, Backbone] = {}  # Storybook, which is small, and one other


class Backbone:
    """A diffusers pipeline seen from the road: prompts to states, adapters in and out, never copied.

    `layers`: canonical layer name -> the bare linear or convolutional layer. The pipeline's own weights are never
    written to: adapters work through hooks, learned tokens through an embedding table that is put in and taken out.
    """

    def __init__(self, base: bases.Base, pipeline: StableDiffusionPipeline) -> None:
        self.base, self.pipeline = base, pipeline
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        # A tokenizer without settings knows no bound, and the text encoder has one.
        most = pipeline.text_encoder.config.max_position_embeddings
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, most)
        # Learned tokens of several vectors, in lower case -> as the tokenizer knows them.
        self._spelled: Mapping[str, str] = {}
        self._clip_skip = 1
        self.layers: Mapping[str, nn.Module] = MappingProxyType(
            {
                canonical(component, name): module
                for component, root in (("unet", self.unet), ("text_encoder", self.text_encoder))
                for name, module in root.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d)
            }
        )
        compiled = compiling.wanted() and not memory.waits(self.unet)  # what waits cannot be compiled
        self._compiled = compiling.Compiled(self.unet, self.layers) if compiled else None

    def predict(self, latents: Tensor, time: Tensor, states: Tensor) -> Tensor:
        """The U-Net's prediction (n, c, h, w) for drawing, compiled where that is wanted."""
        unet = self._compiled or self.unet
        return unet(latents, time, states).sample

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.pipeline._execution_device  # where parts go when they wait elsewhere
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.unet.dtype

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one picture of `size` pixels; its own size unless given."""
        side = (size or self.base.size) // self.pipeline.vae_scale_factor
        return self.unet.config.in_channels, side, side

    def spell(self, prompt: str) -> str:
        """A prompt with every learned token of several vectors written out, in whatever case it stands there."""
        if not self._spelled:
            return prompt
        found = "|".join(re.escape(token) for token in sorted(self._spelled, key=len, reverse=True))
        words = re.compile(rf"(?<!\w)(?:{found})(?!\w)", re.IGNORECASE)
        return words.sub(lambda token: self._spelled.get(token[0].lower(), token[0]), prompt)

    def tokenise(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of plain prompts, (n, positions) int64, cut off where the text encoder ends."""
        words = self.tokenizer(
            [self.spell(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return words.input_ids.to(self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states of prompts, (n, chunks · positions, width): weighed words, and texts of any length.

        Raises UserError for a weight too large.
        """
        ids, weights = prompting.tokenised(self.tokenizer, [self.spell(prompt) for prompt in prompts])
        states = self.states(ids.flatten(0, 1).to(self.device))
        return prompting.weighed(states, weights.flatten(0, 1)).reshape(len(ids), -1, states.shape[-1])

    def states(self, ids: Tensor) -> Tensor:
        """Text states of token ids, (n, positions, width), of the layer that clip skip asks for."""
        if self._clip_skip == 1:
            return self.text_encoder(ids).last_hidden_state
        encoder = getattr(self.text_encoder, "text_model", self.text_encoder)
        after = encoder.config.num_hidden_layers + 1 - self._clip_skip
        hidden = self.text_encoder(ids, output_hidden_states=True).hidden_states[after]
        return encoder.final_layer_norm(hidden)

    @contextmanager
    def prepared(
        self, tokens: Mapping[str, Tensor], lora: LoRA | None = None, clip_skip: int | None = None
    ) -> Iterator[None]:
        """Within the block, learned tokens are known and `lora` is applied; afterwards the model is as before.

        `clip_skip`: take the text states of the last layer (1), the one before (2) …, as A1111 counts; as it was
        unless given.
        """
        with ExitStack() as stack:
            stack.enter_context(self._knowing(tokens))
            stack.enter_context(self._skipping(clip_skip or self._clip_skip))
            if lora is not None:
                stack.enter_context(self._adapted(lora))
            yield

    @contextmanager
    def _skipping(self, clip_skip: int) -> Iterator[None]:
        before, self._clip_skip = self._clip_skip, clip_skip
        try:
            yield
        finally:
            self._clip_skip = before

    @contextmanager
    def _adapted(self, lora: LoRA) -> Iterator[None]:
        check_fit(lora, self.layers, "This LoRA")
        placed = lora.to(self.device, self.dtype)
        with ExitStack() as stack:
            if self._compiled is not None:
                stack.enter_context(self._compiled.filled([placed]))
                placed = placed.parts().get("text_encoder", LoRA({}))
            for name, adapter in placed.items():
                stack.callback(self.layers[name].register_forward_hook(_adding([adapter], 0)).remove)
            yield

    @contextmanager
    def adapted_rows(self, loras: Sequence[LoRA | None], rows: int) -> Iterator[None]:
        """Within the block the U-Net applies to every row of a batch one of several adapters.

        A batch is one block or several of `rows` rows with the first adapter, as many with the second, and so on.
        """
        for lora in loras:
            check_fit(lora or LoRA({}), self.layers, "This LoRA")
        placed = [(lora or LoRA({})).to(self.device, self.dtype) for lora in loras]
        touched = {name: None for lora in placed for name in lora if name.startswith("unet.")}
        with ExitStack() as stack:
            if self._compiled is not None:
                stack.enter_context(self._compiled.filled(placed, rows))
                touched = {}
            for name in touched:
                adapters = [lora.get(name) for lora in placed]
                stack.callback(self.layers[name].register_forward_hook(_adding(adapters, rows)).remove)
            yield

    @contextmanager
    def _knowing(self, tokens: Mapping[str, Tensor]) -> Iterator[None]:
        """Put learned tokens into a copy of the tokenizer and behind the embedding table."""
        if not tokens:
            yield
            return
        table = self.text_encoder.get_input_embeddings()
        width = table.weight.shape[1]
        for token, vectors in tokens.items():
            if vectors.ndim != 2 or vectors.shape[1] != width:
                raise UserError(
                    f"The token {token!r} has vectors of the shape {tuple(vectors.shape)}, but {self.base.title} needs "
                    f"them {width} wide; it was made for another model."
                )
        pieces = {
            token: [prompting.vector_name(token, k) for k in range(len(v))] for token, v in tokens.items()
        }
        names = [name for several in pieces.values() for name in several]
        _check_different(names)
        if known := set(names) & self.tokenizer.get_vocab().keys():
            raise UserError(f"The base model knows the token {min(known)!r} already; rename it.")
        spelled, tokenizer, grown = self._spelled, self.tokenizer, copy.deepcopy(self.tokenizer)
        grown.add_tokens(names)
        learned = torch.cat([v.to(table.weight) for v in tokens.values()])
        longer = nn.Embedding.from_pretrained(
            torch.cat([table.weight.detach()[: len(tokenizer)], learned]), freeze=True
        )
        try:
            self.text_encoder.set_input_embeddings(longer)
            self.tokenizer = self.pipeline.tokenizer = grown
            self._spelled = {t.lower(): " ".join(p) for t, p in pieces.items() if len(p) > 1}
            yield
        finally:
            self._spelled = spelled
            # The model may have moved meanwhile, where parts of it wait in main memory.
            self.text_encoder.set_input_embeddings(table.to(longer.weight.device))
            self.tokenizer = self.pipeline.tokenizer = tokenizer


def _adding(adapters: Sequence[LowRank | None], rows: int):  # type: ignore[no-untyped-def]  # a torch hook
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return added(module, args[0], output, adapters, rows)

    return hook


def _check_different(names: Sequence[str]) -> None:
    """Raise UserError where two vectors would go by one name; case does not count, as CLIP reads all in lower case."""
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise UserError(
                f"Two learned vectors would be called {name!r} (the vectors of a token <a> are <a>, <a>_1, <a>_2 …, in "
                "whatever case); rename the token of one of these concepts."
            )
        seen.add(name.lower())


def fetch(name: str) -> Generator[tuple[int, int], None, None]:
    """Download the base model called `name`, if its weights are not here; yield bytes done and bytes in all.

    Raises UserError when there is no such model, or it cannot be had.
    """
    base = bases.find(name)
    if Path(base.source).is_absolute() or weights.located(base) is not None:
        return
    try:
        yield from weights.fetch(base)
    except UserError as error:
        raise UserError(
            f"{base.title} is not on this machine. {error} The built-in model, Storybook, works without a network."
        ) from error


def load(name: str = "storybook") -> Backbone:
    """The base model called `name`, loaded once per process, on a GPU if there is one.

    Beside Storybook one is kept, and let go before the next is loaded; whoever still uses it keeps it. Raises
    UserError when there is no such model, or its weights are not here (`fetch` gets them).
    """
    base = bases.find(name)
    with _LOADING:
        if base not in _loaded:
            _loaded[base] = _opened(base)
        return _loaded[base]


def _opened(base: bases.Base) -> Backbone:
    place = weights.located(base)
    if place is None or not (place.is_file() or (place / weights.INDEX).is_file()):
        raise UserError(_absent(base))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(base, device)
    _make_room(base)
    try:
        with _quietly():
            pipeline = _single_file(place, dtype) if place.is_file() else _folder(place, dtype)
            _check_whole(pipeline)
    except _BROKEN as error:
        raise UserError(f"The weights of {base.title} at {place} cannot be loaded: {error}") from error
    memory.place(pipeline, device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return Backbone(base, pipeline)


def _make_room(base: bases.Base) -> None:
    """Let go of the model whose place another takes, so that the memory it held counts as free."""
    for other in [kept for kept in _loaded if "storybook" not in (base.name, kept.name)]:
        del _loaded[other]
        memory.tidy()


def _dtype(base: bases.Base, device: torch.device) -> torch.dtype:
    """What the model computes in: what ITERIS_SD_DTYPE says, else halves on a GPU, float32 elsewhere."""
    told = os.environ.get("ITERIS_SD_DTYPE", "")
    if told and told not in DTYPES:
        raise UserError(f"ITERIS_SD_DTYPE is {told!r}; choose one of {', '.join(DTYPES)}.")
    if base.family == "storybook":  # it is small, and was trained in float32
        return torch.float32
    return DTYPES[told or ("fp16" if device.type == "cuda" else "fp32")]


def _folder(place: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    kind = weights.variant(place) or ""
    told = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    checker = weights.checker(place) if weights.safety_wanted() else None
    parts: dict[str, Any] = {
        "text_encoder": _text_encoder(place / "text_encoder", variant=kind or None, **told)
    }
    if checker is None:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    elif checker != kind:  # diffusers takes halves beside plain weights for a mistake
        own = place / "safety_checker"
        loaded = StableDiffusionSafetyChecker.from_pretrained(own, variant=checker or None, **told)
        parts["safety_checker"] = loaded
    return StableDiffusionPipeline.from_pretrained(place, variant=kind or None, **told, **parts)


def _single_file(place: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    # Diffusers knows one way to name the text encoder's tensors, and some checkpoints have another.
    with safe_open(place, "pt") as file:
        named = checkpoints.text_encoder(file.keys())
        tensors = {name: file.get_tensor(key) for name, key in named.items()}
    config = CLIPTextConfig(**sd15.TEXT)
    encoder = _text_encoder(None, config=config, state_dict=tensors, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="iteris-sd-") as folder:
        sd15.write_configuration(Path(folder), checkpoints.noise_schedule(place))
        try:
            return StableDiffusionPipeline.from_single_file(
                str(place),
                config=folder,
                text_encoder=encoder,
                torch_dtype=dtype,
                local_files_only=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except NotImplementedError as error:  # what torch says where there is no data to move
            raise ValueError("it lacks weights; download it again.") from error


def _text_encoder(place: Path | None, **told: Any) -> CLIPTextModel:
    """A text encoder that has all its weights; ValueError otherwise: they would be random, and nobody would see."""
    encoder, found = CLIPTextModel.from_pretrained(place, output_loading_info=True, **told)
    if missing := found["missing_keys"]:
        raise ValueError(f"its text encoder has no {min(missing)}; download it again.")
    return encoder


def _check_whole(pipeline: StableDiffusionPipeline) -> None:
    """Raise ValueError where a network lacks weights."""
    for part in ("unet", "vae", "text_encoder"):
        for name, parameter in getattr(pipeline, part).named_parameters():
            if parameter.is_meta:
                raise ValueError(f"it has no {part}.{name}; download it again.")


def _absent(base: bases.Base) -> str:
    """That a base model is not where it should be, and what to do."""
    if base.name == "storybook":
        return f"The weights of {base.title} are not at {base.source}; fetch the whole project again."
    if base.download:
        return f"The weights of {base.title} are not in the cache."
    return f"The base model {base.title} is no longer at {base.source}; put it back, or choose another one."


@contextmanager
def _quietly() -> Iterator[None]:
    """Within the block diffusers and transformers log nothing: what is wrong is raised, and the rest only alarms."""
    loggings = [library.utils.logging for library in (diffusers, transformers)]
    before = [logging.get_verbosity() for logging in loggings]
    try:
        for logging in loggings:
            logging.disable_progress_bar()  # ours is the only one; for good
            logging.set_verbosity(logging.CRITICAL)
        yield
    finally:
        for logging, level in zip(loggings, before, strict=True):
            logging.set_verbosity(level)


def forget() -> None:
    """Let loaded models go."""
    _loaded.clear()
    skeleton.cache_clear()


@lru_cache(maxsize=2)
def skeleton(family: str) -> Mapping[str, nn.Module]:
    """Layer name -> layer of a family of base models, for their shapes: no weights are needed where it is not here."""
    if family == "storybook":
        return load(family).layers
    with torch.device("meta"):
        return Backbone(bases.find(family), sd15.random_pipeline()).layers


def text_width(family: str) -> int:
    """How wide the text states of a family of base models are, and so the learned tokens for it."""
    layers = skeleton(family)
    return next(weight(layer).shape[1] for name, layer in layers.items() if name.endswith("self_attn.q_proj"))
