"""IterIS for Stable Diffusion: several concept LoRAs merged into one by inference-solving alignment."""

__version__ = "0.1.0"
