"""What looks like a LoRA and is none that can be merged, by its keys, shapes and metadata; each with what to do."""

import re
from collections.abc import Iterable, Mapping

from iteris_sd.bases import STRANGERS
from iteris_sd.errors import UserError
from iteris_sd.formats import base_model

_ONLY = "only plain LoRA can be merged; ask its author for a LoRA, or extract one of small rank"
_XL = "Stable Diffusion XL"
_SD1 = "this project composes LoRAs of Stable Diffusion 1"
_TRANSFORMER = (
    f"made for a transformer model (Flux, Stable Diffusion 3, Qwen-Image, PixArt, Wan and the like); {_SD1}"
)
_ROOT = r"^(base_model[._]model[._]|lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.)*"

# The first that is found is told: other models before other adapters, as both may be true, and parts of models last.
_KINDS = (
    (
        r"motion_modules",
        "made for AnimateDiff: it makes pictures move, and those here stand still; leave it out",
    ),
    (
        r"(temp_attentions|temp_convs|temporal_transformer_blocks|time_stack)",
        f"made for a model of videos (ModelScope, Stable Video Diffusion and the like); {_SD1}",
    ),
    (
        r"(lora_te2_|text_encoder_2\.|lora_unet_label_emb|^(text_encoders\.)?clip_g\.)",
        f"made for {_XL}; {_SD1}",
    ),
    (r"^lora_prior_", f"made for Stable Cascade; {_SD1}"),
    (r"^base_model\.model\.(model\.)?layers\.\d+\.(self_attn|mlp)\.", f"made for a language model; {_SD1}"),
    (
        r"((double|single|joint)_(stream_)?blocks|(single|joint)_transformer_blocks"
        rf"|{_ROOT}(transformer_)?(blocks|layers)[._]\d|^(lora_)?transformer[._]|^(text_encoders\.)?t5|^lora_te3_)",
        _TRANSFORMER,
    ),
    (
        r"((down|up|input|output)_blocks|mid(dle)?_block)[._].*transformer_blocks[._][1-9]|add_embedding[._]linear",
        f"made for {_XL}; {_SD1}",
    ),
    (r"^(lora_te_|text_encoder\.).*layers[._](1[2-9]|2\d)[._]", f"made for Stable Diffusion 2; {_SD1}"),
    (r"\.hada_(w|t)\d", f"a LoHa (Hadamard products); {_ONLY}"),
    (r"\.lokr_(w|t)\d", f"a LoKr (Kronecker products); {_ONLY}"),
    (r"(\.dora_scale$|lora_magnitude_vector)", f"a DoRA (a LoRA with magnitudes); {_ONLY}"),
    (r"(\.ia3_|\.on_input$)", f"an IA³ adapter (it scales activations); {_ONLY}"),
    (r"(\.oft_(blocks|diag|R)|\.boft_|\.oft_r\.)", f"an OFT adapter (it rotates weights); {_ONLY}"),
    (r"\.(a1|b1|a2|b2)\.weight$", f"a GLoRA; {_ONLY}"),
    (r"(\.|^base_model\.)vera_", f"a VeRA (its factors are shared and scaled); {_ONLY}"),
    (r"_custom_diffusion\.", f"of Custom Diffusion (whole key and value weights); {_ONLY}"),
    (
        r"^(diffusion_model|unet|text_encoders|clip_l)\..*\.diff(_b)?$",
        "a LoRA with changes of biases and norms, which cannot be merged; save it again with bias_diff off",
    ),
    (
        r"(text_projection|(token|position)_embedding)\.(lora_\w+|diff)\b",
        "a LoRA that also changes the text encoder's embeddings or projection, which cannot be merged; train or "
        "extract it again without them",
    ),
    (r"\.bias_(indices|values|size)$", f"a LoRA with biases; {_ONLY}"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", f"an adapter that carries full weights; {_ONLY}"),
    (r"\.lora_(A|B|up|down)(\.[\w-]+)?\.bias$", f"a LoRA with biases; {_ONLY}"),
    (
        r"(\.modules_to_save\.|^(base_model\.model|unet|text_encoder)\..*\.bias$)",
        "a LoRA that came with whole layers or biases, which cannot be merged; train it again with PEFT's bias='none' "
        "and without modules_to_save",
    ),
    (
        r"^(control_model\.|controlnet|lora_controlnet|lllite_|input_hint_block)",
        "a ControlNet, not a LoRA; it steers pictures by other pictures, which nothing here does: leave it out",
    ),
    (
        r"^(image_proj|ip_adapter)\.",
        "an IP-Adapter, not a LoRA; it draws after a picture, which nothing here does: train a LoRA on the picture",
    ),
    (
        r"^(adapter\.(body|conv_in)|body\.\d+\.(in_conv|block\d|resnets))\.",
        "a T2I-Adapter, not a LoRA; it steers pictures by other pictures, which nothing here does: leave it out",
    ),
    (
        r"(^model\.\d+\.(weight|bias|sub)|\.(rdb|RDB)\d|^(conv_first|upconv1)\.)",
        "an upscaler (ESRGAN and the like), not a LoRA; enlarge finished pictures with it in another tool",
    ),
    (r"^\d+\.\d\.linear\.", f"a hypernetwork, not a LoRA; {_ONLY}"),
    (r"^conditioner\.embedders", f"a whole checkpoint of {_XL}, not a LoRA; {_SD1}"),
    (
        r"^(model\.diffusion_model\.|cond_stage_model\.|first_stage_model\.)",
        "a whole checkpoint, not a LoRA; load it as the base model, or extract a LoRA from it",
    ),
    (
        r"^(diffusion_model\.)?(down_blocks|up_blocks|mid_block|conv_in|text_model|vision_model|encoder|decoder"
        r"|input_blocks|middle_block|output_blocks)\.(?!.*lora).*\.(weight|bias|position_ids)$",
        "a part of a whole model, not a LoRA; load the folder it belongs to as the base model",
    ),
    (
        r"^(em[bp]_params|string_to_param(\.\*)?|\*|clip_l|clip_g|t5|t5xxl|text_encoders_\d)(_out)?$",
        "a learned token (textual inversion), not a LoRA; add it to a concept as its token",
    ),
)
_READS_TEXT = re.compile(r"unet\..*attn2\.to_[kv]|text_encoder\..*self_attn\.[qkv]_proj")


def check(keys: Iterable[str]) -> None:
    """Raise UserError, "it is …", when the keys are those of something else than a LoRA for this family."""
    keys = list(keys)
    for pattern, what in _KINDS:
        key = next(filter(re.compile(pattern).search, keys), None)
        if key is not None:
            raise UserError(f"it is {what} (it holds {key!r}).")


def check_family(widths: Mapping[str, int], metadata: Mapping[str, str]) -> None:
    """Raise UserError when a LoRA is made for another family of base models.

    ``widths``: how wide the inputs of each layer are, by its canonical name. Metadata are believed where no layer of
    the U-Net tells.
    """
    read = {name: width for name, width in widths.items() if _READS_TEXT.fullmatch(name)}
    for name, width in read.items():
        if width in STRANGERS:
            raise UserError(
                f"it is made for {STRANGERS[width]}, whose text states are {width} wide (at {name}); {_SD1}, where "
                "they are 768."
            )
    told = base_model.named(metadata)
    if told in base_model.STRANGERS and not any(name.startswith("unet.") for name in read):
        raise UserError(f"it is made for {told}, as its metadata say; {_SD1}.")
