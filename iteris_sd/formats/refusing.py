"""What looks like a LoRA and is none that can be merged, told by its keys and shapes; each with what to do."""

import re
from collections.abc import Mapping

from iteris_sd.bases import STRANGERS
from iteris_sd.errors import UserError
from iteris_sd.formats.header import Entry

_ONLY = "only plain LoRA can be merged; ask its author for a LoRA, or extract one of small rank"
_XL = "Stable Diffusion XL"
_SD1 = "this project composes LoRAs of Stable Diffusion 1"

_KINDS = (
    (r"\.hada_(w|t)\d", f"a LoHa (Hadamard products); {_ONLY}"),
    (r"\.lokr_(w|t)\d", f"a LoKr (Kronecker products); {_ONLY}"),
    (r"(\.dora_scale$|lora_magnitude_vector)", f"a DoRA (a LoRA with magnitudes); {_ONLY}"),
    (r"(\.ia3_|\.on_input$)", f"an IA³ adapter (it scales activations); {_ONLY}"),
    (r"(\.oft_(blocks|diag|R)|\.boft_|\.oft_r\.)", f"an OFT adapter (it rotates weights); {_ONLY}"),
    (r"\.(a1|b1|a2|b2)\.weight$", f"a GLoRA; {_ONLY}"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", f"an adapter that carries full weights; {_ONLY}"),
    (r"\.lora_(A|B|up|down)(\.default)?\.bias$", f"a LoRA with biases; {_ONLY}"),
    (
        r"(lora_te2_|text_encoder_2\.|lora_unet_label_emb|conditioner\.embedders)",
        f"made for {_XL}; {_SD1}",
    ),
    (r"(double_blocks|single_blocks|single_transformer_blocks)", f"made for Flux; {_SD1}"),
    (
        r"(joint_blocks|joint_transformer_blocks|attn2?\.add_k_proj|add_q_proj)",
        f"made for Stable Diffusion 3; {_SD1}",
    ),
    (
        r"^(model\.diffusion_model\.|cond_stage_model\.|first_stage_model\.)",
        "a whole checkpoint, not a LoRA; load it as the base model, or extract a LoRA from it",
    ),
    (
        r"^(down_blocks|up_blocks|mid_block|conv_in|text_model|encoder|decoder)\.(?!.*lora).*\.(weight|bias)$",
        "a part of a whole model, not a LoRA; load the folder it belongs to as the base model",
    ),
    (
        r"^(emb_params|clip_l|clip_g)$",
        "a learned token (textual inversion), not a LoRA; add it to a concept as its token",
    ),
    (r"^(control_model|controlnet|lllite_|input_hint_block)", f"a ControlNet, not a LoRA; {_ONLY}"),
)
_READS_TEXT = re.compile(r"attn2[._](processor\.)?to_[kv]")


def check(entries: Mapping[str, Entry]) -> None:
    """Raise UserError, "it is …", when the keys or shapes are those of something else than a LoRA for this family."""
    for pattern, what in _KINDS:
        key = next((key for key in entries if re.search(pattern, key)), None)
        if key is not None:
            raise UserError(f"it is {what} (it holds {key!r}).")
    for key, entry in entries.items():
        if _READS_TEXT.search(key) and len(entry.shape) in (2, 4) and ("down" in key or "lora_A" in key):
            width = entry.shape[1]
            if width in STRANGERS:
                raise UserError(
                    f"it is made for {STRANGERS[width]}, whose text states are {width} wide ({key!r}); {_SD1}, where "
                    "they are 768."
                )
