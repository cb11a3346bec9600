"""Stage `vae`: the autoencoder, learnt from drawn scenes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from iteris_sd.storybook import data, model
from iteris_sd.storybook.loop import Plan, fit
from iteris_sd.storybook.pictures import contact_sheet, to_image, to_tensor
from iteris_sd.storybook.run import Run


def recoloured(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Swap the colour channels of a third of the pictures: individuals come in colours no scene shows."""
    for k in range(len(pixels)):
        if torch.rand((), generator=rng) < 0.33:
            pixels[k] = pixels[k, torch.randperm(3, generator=rng)]
    return pixels


def detail(pixels: Tensor) -> Tensor:
    """How rich in detail each neighbourhood of a picture is, (n, 1, h, w), 0.4 to 4 and about 1 on average."""
    steps = F.pad(pixels.diff(dim=3).abs().mean(dim=1, keepdim=True), (1, 0, 0, 0))
    steps = steps + F.pad(pixels.diff(dim=2).abs().mean(dim=1, keepdim=True), (0, 0, 1, 0))
    rich = F.avg_pool2d(steps, 7, stride=1, padding=3)
    return (0.4 + 0.6 * rich / rich.mean(dim=(1, 2, 3), keepdim=True)).clamp(max=4.0)


def autoencoder_loss(
    scenes: data.Scenes, batch: int, device: torch.device
) -> Callable[[AutoencoderKL, torch.Generator], Tensor]:
    """Errors of pixels (squared, absolute) and of their differences, and a light pull of the latents to N(0, 1).

    Errors count more where the picture is rich in detail: faces are small, and a plain mean forgets them.
    """

    def loss(module: AutoencoderKL, rng: torch.Generator) -> Tensor:
        _, drawn = scenes.pick(batch, rng)
        pixels = recoloured(to_tensor(drawn), rng).to(device, memory_format=torch.channels_last)
        posterior = module.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        error = module.decode(posterior.mean + posterior.std * noise).sample.float() - pixels
        weight = detail(pixels)
        edges = sum(
            (weight.narrow(d, 1, pixels.shape[d] - 1) * error.diff(dim=d)).abs().mean() for d in (2, 3)
        )
        pull = posterior.kl().mean() / posterior.mean[0].numel()
        plain = (weight * error.square()).mean() + 0.2 * (weight * error).abs().mean()
        return plain + 0.2 * edges + 1e-5 * pull

    return loss


@torch.no_grad()
def reconstruct(module: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, float]:
    """Encode and decode (n, 3, h, w) in [-1, 1]; also the mean PSNR in dB over pictures."""
    back = torch.cat([module.decode(module.encode(p).latent_dist.mean).sample for p in pixels.split(32)])
    back = back.clamp(-1, 1)
    psnr = -10 * ((back - pixels) / 2).square().mean(dim=(1, 2, 3)).log10().mean()
    return back, float(psnr)


def started(run: Run) -> AutoencoderKL:
    """A new autoencoder, or the one in `assets`."""
    if run.warm:
        return AutoencoderKL.from_pretrained(run.storybook / "vae", torch_dtype=torch.float32)
    return model.autoencoder()


def train(run: Run) -> None:
    """Train and write `assets/storybook/vae`, with the scaling factor that makes latents of unit variance."""
    drawn = data.drawn(run.runs / "scenes", run.scenes)
    device = run.machine.device
    shown = to_tensor(data.drawn(run.runs / "scenes", 64, data.HELD_OUT).pixels[:]).to(device)
    plan = Plan(
        "vae",
        run.steps or 5000,
        batch=16,
        peak=1.5e-3,
        average=0.998,
        seed=1,
        sample_every=500,
        save_every=run.save_every,
    )

    def sample(module: AutoencoderKL, step: int) -> None:
        back, psnr = reconstruct(module, shown)
        print(f"vae step {step}: {psnr:.2f} dB on {len(shown)} held-out scenes", flush=True)
        pairs = [to_image(p) for k in range(12) for p in (shown[k], back[k])]
        contact_sheet(pairs, 8, run.runs / "vae" / f"sample_{step:06}.png")

    torch.manual_seed(plan.seed)
    module = started(run).to(device, memory_format=torch.channels_last)
    loss = autoencoder_loss(drawn, plan.batch, device)
    average = fit(plan, module, loss, run.runs / "vae", run.machine, sample)
    with torch.no_grad():
        means = average.encode(shown).latent_dist.mean
    average.register_to_config(scaling_factor=round(1.0 / float(means.std()), 4))
    model.save(average, run.storybook / "vae")
