"""How the page looks: a light paper, dark ink, one green; and the same by night."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")

_GREEN = gr.themes.Color(
    name="green",
    c50="#eef6f3",
    c100="#d8ebe4",
    c200="#b3d7cb",
    c300="#85bcab",
    c400="#559c89",
    c500="#34806c",
    c600="#276656",
    c700="#1f5246",
    c800="#1a4239",
    c900="#153630",
    c950="#0b211d",
)


def theme() -> gr.themes.Base:
    """The theme; fonts are those of the system, so that nothing is fetched."""
    return gr.themes.Base(
        primary_hue=_GREEN,
        secondary_hue=_GREEN,
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"],
    ).set(
        body_background_fill="#faf8f4",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_padding="0px",
        block_shadow="none",
        block_label_text_color="*body_text_color",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color_dark="*neutral_700",
    )
