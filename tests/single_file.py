"""Write a Stable Diffusion 1 pipeline as one file with the names of its first publication, as checkpoints have them."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """Write it; returns the path."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        convolved = "mid_block.attentions" in name and tensor.ndim == 2
        tensors["first_stage_model." + vae_name(name)] = tensor[:, :, None, None] if convolved else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors["cond_stage_model.transformer.text_model." + bare] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def unet_name(name: str) -> str:
    """A parameter of the U-Net."""
    module, _, kind = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(\w+)", name):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(\w+)", name):
        return f"output_blocks.{3 * int(found[1]) + 2}.{1 if found[1] == '0' else 2}.conv.{found[2]}"
    found = re.fullmatch(
        r"(down|up|mid)_blocks?(?:\.(\d))?\.(resnets|attentions)\.(\d)\.([\w.]+)\.(\w+)", name
    )
    assert found is not None, name
    where, block, part, number, inner, kind = found.groups()
    place = {
        "down": lambda: f"input_blocks.{3 * int(block) + int(number) + 1}.{int(part == 'attentions')}",
        "up": lambda: f"output_blocks.{3 * int(block) + int(number)}.{int(part == 'attentions')}",
        "mid": lambda: f"middle_block.{1 if part == 'attentions' else 2 * int(number)}",
    }[where]()
    return f"{place}.{_RESNET[inner] if part == 'resnets' else inner}.{kind}"


def vae_name(name: str) -> str:
    """A parameter of the autoencoder."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(
        r"down_blocks\.(\d)\.(?:resnets\.(\d)|(downsample)rs\.0)",
        lambda m: f"down.{m[1]}.{m[3] or f'block.{m[2]}'}",
        name,
    )
    name = re.sub(
        r"up_blocks\.(\d)\.(?:resnets\.(\d)|(upsample)rs\.0)",
        lambda m: f"up.{3 - int(m[1])}.{m[3] or f'block.{m[2]}'}",
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    return re.sub(
        r"mid_block\.attentions\.0\.([\w.]+)\.(\w+)$",
        lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}.{m[2]}",
        name,
    )
