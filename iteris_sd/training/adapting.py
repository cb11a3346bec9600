"""Put trainable parts into a pipeline's modules for a while, and take them out without a trace.

The base weights are never written to: a learned token lives in a module around the token embedding, a LoRA
in PEFT's layers around the linear ones, and leaving the context puts the original modules back.
"""

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTextModel

from iteris_sd.errors import UserError
from iteris_sd.formats.naming import canonical
from iteris_sd.lora import LoRA, LowRank

TARGETS = {
    "attention": {
        "unet": r".+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "text_encoder": r".+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    },
    "transformer": {
        "unet": r".+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
        "text_encoder": r".+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.fc[12])",
    },
}  # by what `Settings.layers` may be, and by component
_ADAPTER = "iteris"


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Generator[None]:
    """No gradients and evaluation mode; every flag is as before afterwards."""
    modules = list(modules)
    gradients = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.requires_grad_(False).eval()
        yield
    finally:
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for part, flag in modes:
            part.training = flag


class WithToken(nn.Module):
    """A token embedding that knows one token more: ``vector`` (1, dim) is its only trainable weight."""

    def __init__(self, base: nn.Embedding, token_id: int, vector: Tensor) -> None:
        super().__init__()
        self.base, self.token_id = base, token_id
        self.vector = nn.Parameter(vector.clone())

    def forward(self, ids: Tensor) -> Tensor:
        """(…) token ids to (…, dim)."""
        known = self.base(ids.clamp(max=self.base.num_embeddings - 1))
        return torch.where((ids == self.token_id)[..., None], self.vector[0], known)


@contextmanager
def learned_token(text_encoder: CLIPTextModel, token_id: int, vector: Tensor) -> Generator[nn.Parameter]:
    """Let the text encoder know ``token_id``, and yield the token's trainable vector (1, dim)."""
    base = cast(nn.Embedding, text_encoder.get_input_embeddings())
    extended = WithToken(base, token_id, vector)
    try:
        text_encoder.set_input_embeddings(extended)
        yield extended.vector
    finally:
        text_encoder.set_input_embeddings(base)


@contextmanager
def adapted(
    model: nn.Module, component: str, rank: int, rng: torch.Generator, layers: str = "attention"
) -> Generator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Inject a LoRA into ``layers`` of ``unet`` or ``text_encoder``, down random and up zero, scale 1.

    Yields layer name -> (down, up), the trainable factors. Raises UserError when adapters are there already
    or the model has no attention layer that is known.
    """
    if hasattr(model, "peft_config"):
        raise UserError(f"The {component} carries an adapter already; unload it before training.")
    wanted = TARGETS[layers][component]
    targets = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(wanted, path)
    }
    if not targets:
        raise UserError(f"The {component} has no attention layer to adapt; it is of an unknown kind.")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with (
            torch.random.fork_rng()
        ):  # PEFT draws initial values from the global generator; ours replace them
            inject_adapter_in_model(config, model, _ADAPTER)
        for parameter, flag in flags:  # PEFT freezes all but its own, a learned token too
            parameter.requires_grad_(flag)
        yield {canonical(component, path): _factors(model.get_submodule(path), rng) for path in targets}
    finally:
        for path, module in targets.items():
            model.set_submodule(path, module)
        model.__dict__.pop("peft_config", None)


def _factors(layer: Any, rng: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    with torch.no_grad():
        down.copy_(torch.randn(down.shape, generator=rng) / down.shape[0])
        up.zero_()
    return down, up


def exported(factors: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> LoRA:
    """The LoRA's value now, on the CPU."""
    return LoRA(
        {
            name: LowRank(*(factor.detach().to("cpu", copy=True) for factor in pair))
            for name, pair in factors.items()
        }
    )
