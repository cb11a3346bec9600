"""DreamBooth-LoRA with textual inversion, for any StableDiffusionPipeline.

Stage 1 (textual inversion, arXiv 2208.01618) learns one new token's embedding with all else frozen; stage 2
(DreamBooth, arXiv 2208.12242, on a LoRA) learns the embedding together with a LoRA on the attention of
U-Net and text encoder, generic pictures mixed in so that the class keeps its meaning.

| symbol | shape        | meaning                                                     |
|--------|--------------|-------------------------------------------------------------|
| x_0    | (b, c, h, w) | scaled latents                                              |
| ε      | (b, c, h, w) | noise                                                       |
| t      | (b,)         | timesteps                                                   |
| x_t    | (b, c, h, w) | noisy latents                                               |
| target | (b, c, h, w) | what the U-Net predicts: ε, v or x_0, as the scheduler says |
"""

import copy
import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from iteris_sd import limits
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA
from iteris_sd.training import adapting, prompts
from iteris_sd.training.photos import encode
from iteris_sd.training.settings import Settings


@dataclass(frozen=True, eq=False)
class Examples:
    """Latents (n, c, h, w), scaled for the U-Net, and the wordings of each one's caption."""

    latents: Tensor
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        """Refuse latents without captions."""
        if len(self.latents) != len(self.captions) or not all(self.captions):
            raise UserError(f"{len(self.latents)} pictures have captions for {len(self.captions)} of them.")


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` of a stage ("textual inversion" or "LoRA") are done, the last with this loss."""

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A concept: its LoRA in float32 on the CPU, its token, and the token's embedding (1, dim)."""

    lora: LoRA
    token: str
    embedding: Tensor


def train(
    pipeline: StableDiffusionPipeline,
    photos: Sequence[Image.Image],
    token: str,
    class_noun: str,
    settings: Settings | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    prior: Examples | None = None,
) -> Generator[Progress, None, Trained]:
    """Learn the concept in ``photos``, called "<token> <class noun>"; a generator that returns it.

    ``captions`` gives the wordings of each photo's caption, with the token in them; without, templates are
    used. ``prior`` holds generic pictures for the second stage. The pipeline, in float32, is borrowed: as
    soon as the generator ends, fails or is closed, it is exactly as before.

    Raises UserError when token, photos, captions and pipeline do not fit each other.
    """
    settings = settings or Settings()
    tokenizer = _with_token(pipeline, token)
    texts = captions or [prompts.filled(f"{token} {class_noun}")] * len(photos)
    _check(pipeline, photos, texts, token, prior, settings)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    rng = torch.Generator().manual_seed(settings.seed)
    with ExitStack() as stack:
        stack.enter_context(adapting.frozen((unet, text_encoder, pipeline.vae)))
        size = unet.config.sample_size * pipeline.vae_scale_factor
        own = _Set.of(Examples(encode(pipeline.vae, photos, size), texts), tokenizer)
        loss = _Loss(pipeline, settings, rng)
        start = _initial_vector(pipeline, settings.initial_word or class_noun)
        token_id = tokenizer.get_vocab()[token]
        vector = stack.enter_context(adapting.learned_token(text_encoder, token_id, start))

        groups = [{"params": [vector], "lr": settings.inversion_rate, "weight_decay": 0.0}]
        yield from _fit("textual inversion", settings.inversion_steps, groups, loss, own, None, settings)

        factors = stack.enter_context(adapting.adapted(unet, "unet", settings.rank, rng, settings.layers))
        texts_factors = stack.enter_context(
            adapting.adapted(text_encoder, "text_encoder", settings.rank, rng, settings.layers)
        )
        groups = [
            {"params": [vector], "lr": settings.token_rate, "weight_decay": 0.0},
            {"params": [p for pair in factors.values() for p in pair], "lr": settings.unet_rate},
            {
                "params": [p for pair in texts_factors.values() for p in pair],
                "lr": settings.text_encoder_rate,
            },
        ]
        generic = _Set.of(prior, tokenizer) if prior and settings.prior_batch else None
        yield from _fit("LoRA", settings.lora_steps, groups, loss, own, generic, settings)
        return Trained(
            adapting.exported(factors | texts_factors), token, vector.detach().to("cpu", copy=True)
        )


@dataclass(frozen=True, eq=False)
class _Set:
    """Examples with their captions tokenised: ids[k] is (wordings, positions)."""

    latents: Tensor
    ids: Sequence[Tensor]

    @staticmethod
    def of(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> "_Set":
        def tokenised(wordings: Sequence[str]) -> Tensor:
            found = tokenizer(list(wordings), padding="max_length", truncation=True, return_tensors="pt")
            return found.input_ids

        return _Set(examples.latents, [tokenised(wordings) for wordings in examples.captions])

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents (count, c, h, w), as evenly spread as can be, and a random wording of each."""
        rounds = -(-count // len(self.latents)) if count > len(self.latents) else 1
        rows = torch.cat([torch.randperm(len(self.latents), generator=rng) for _ in range(rounds)])[:count]
        ids = [self.ids[k][int(torch.randint(len(self.ids[k]), (), generator=rng))] for k in rows.tolist()]
        return self.latents[rows.to(self.latents.device)].float(), torch.stack(ids)


class _Loss:
    """The denoising loss of each picture in a batch."""

    def __init__(self, pipeline: StableDiffusionPipeline, settings: Settings, rng: torch.Generator) -> None:
        self._unet, self._text_encoder, self.rng = pipeline.unet, pipeline.text_encoder, rng
        # Samplers differ, the noise they undo does not: training needs no more than its schedule and target.
        self._noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._snr_cap = settings.snr_cap

    def __call__(self, x_0: Tensor, ids: Tensor) -> Tensor:
        """Latents (b, c, h, w) and token ids (b, positions) to losses (b,)."""
        device = self._unet.device
        x_0 = x_0.to(device)
        t = torch.randint(len(self._noise.alphas_cumprod), (len(x_0),), generator=self.rng)
        eps = torch.randn(x_0.shape, generator=self.rng).to(device)
        weight = self._weight(t).to(device)
        t = t.to(device)
        x_t = self._noise.add_noise(x_0, eps, t)
        states = self._text_encoder(ids.to(device))[0]
        predicted = self._unet(x_t, t, states).sample
        error = F.mse_loss(predicted, self._target(x_0, eps, t), reduction="none")
        return error.mean(dim=(1, 2, 3)) * weight

    def _target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        kind = self._noise.config.prediction_type
        if kind == "v_prediction":
            return self._noise.get_velocity(x_0, eps, t)
        return x_0 if kind == "sample" else eps

    def _weight(self, t: Tensor) -> Tensor:
        """min(SNR, cap) as a weight of the error of x_0, written for the target in use."""
        if self._snr_cap is None:
            return torch.ones(len(t))
        kept = self._noise.alphas_cumprod[t]
        ratio = kept / (1 - kept)
        kind = self._noise.config.prediction_type
        scale = {"v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}.get(kind, ratio)
        return ratio.clamp(max=self._snr_cap) / scale.clamp(min=1e-8)


def _fit(
    stage: str,
    steps: int,
    groups: list[dict[str, Any]],
    loss: _Loss,
    own: _Set,
    prior: _Set | None,
    settings: Settings,
) -> Generator[Progress]:
    """Run one stage; yields after every step."""
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _share(step, steps, settings)
        total = 0.0
        with torch.enable_grad():
            for _ in range(settings.accumulation):
                value = _mixed(loss, own, prior, settings) / settings.accumulation
                value.backward()
                total += float(value.detach())
        if not math.isfinite(total):
            raise UserError(f"The loss of {stage} is {total} at step {step + 1}; lower the learning rates.")
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Progress(stage, step + 1, steps, total)


def _mixed(loss: _Loss, own: _Set, prior: _Set | None, settings: Settings) -> Tensor:
    """The mean loss of photos plus the weighted mean loss of generic pictures, in one forward."""
    latents, ids = own.draw(settings.batch, loss.rng)
    if prior is None:
        return loss(latents, ids).mean()
    others, other_ids = prior.draw(settings.prior_batch, loss.rng)
    each = loss(torch.cat([latents, others.to(latents.device)]), torch.cat([ids, other_ids]))
    return each[: settings.batch].mean() + settings.prior_weight * each[settings.batch :].mean()


def _share(step: int, steps: int, settings: Settings) -> float:
    """The share of the learning rates at a step."""
    return 1.0 if settings.schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _with_token(pipeline: StableDiffusionPipeline, token: str) -> PreTrainedTokenizerBase:
    """A copy of the pipeline's tokenizer that knows ``token``; the pipeline's own stays as it is."""
    if not 1 <= len(token) <= limits.MAX_TOKEN_CHARS or not token.isprintable() or " " in token:
        raise UserError(f"The token {token[:40]!r} cannot be used: it must be one word, such as <my-dog>.")
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    if token in tokenizer.get_vocab() or not tokenizer.add_tokens(token):
        raise UserError(f"The tokenizer knows {token!r} already; choose another token, such as <my-dog>.")
    return tokenizer


def _check(
    pipeline: StableDiffusionPipeline,
    photos: Sequence[Image.Image],
    texts: Sequence[Sequence[str]],
    token: str,
    prior: Examples | None,
    settings: Settings,
) -> None:
    if not 1 <= len(photos) <= limits.MAX_PHOTOS:
        raise UserError(f"{len(photos)} photos were given; from 1 to {limits.MAX_PHOTOS} are needed.")
    if len(texts) != len(photos) or not all(texts):
        raise UserError(f"{len(photos)} photos have captions for {len(texts)} of them.")
    missing = next((text for wordings in texts for text in wordings if token not in text), None)
    if missing is not None:
        raise UserError(f"The caption {missing!r} does not name the concept; it must contain {token!r}.")
    if prior is not None and not settings.prior_batch:
        raise UserError("Generic pictures were given but prior_batch is 0; set how many join each batch.")
    if settings.prior_batch and prior is None:
        raise UserError("prior_batch is set but no generic pictures were given.")
    dtypes = {p.dtype for m in (pipeline.unet, pipeline.text_encoder, pipeline.vae) for p in m.parameters()}
    if dtypes != {torch.float32}:
        raise UserError(f"Training needs the pipeline in float32; it is in {sorted(map(str, dtypes))}.")


def _initial_vector(pipeline: StableDiffusionPipeline, words: str) -> Tensor:
    """The mean embedding of the words' tokens, (1, dim)."""
    ids = pipeline.tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0]
    if not len(ids):
        raise UserError("The class noun is empty; say what the concept is, such as 'dog'.")
    table = pipeline.text_encoder.get_input_embeddings().weight
    return table[ids.to(table.device)].detach().mean(dim=0, keepdim=True)
