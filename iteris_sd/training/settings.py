"""How a concept is trained: one dataclass, its defaults the paper's settings for Stable Diffusion v1.5."""

from dataclasses import dataclass
from typing import Literal

from iteris_sd import limits
from iteris_sd.errors import UserError


@dataclass(frozen=True)
class Settings:
    """DreamBooth-LoRA with textual inversion first (arXiv 2411.15231, settings of its text-to-image part).

    A step is one update of the weights: ``accumulation`` batches of ``batch`` photos, and beside them
    ``prior_batch`` generic pictures in the second stage if there are any. Rates are those of AdamW; alpha is
    always the rank, so that a LoRA applies at scale 1.
    """

    rank: int = 32
    layers: Literal["attention", "transformer"] = "attention"  # transformer: the feed-forward layers, too
    inversion_steps: int = 800
    inversion_rate: float = 5e-4
    lora_steps: int = 800
    unet_rate: float = 1e-4
    text_encoder_rate: float = 1e-5
    token_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: falls to zero within each stage
    batch: int = 1
    prior_batch: int = 0
    prior_weight: float = 1.0
    accumulation: int = 4
    snr_cap: float | None = None  # min-SNR weighting, arXiv 2303.09556
    clip: float = 1.0  # of the gradient's norm
    decay: float = 1e-2  # weight decay of the LoRA's factors
    initial_word: str | None = None  # what the token starts from, instead of the class noun
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        if not 1 <= self.rank <= limits.MAX_RANK:
            raise UserError(f"The rank is {self.rank}; it must be from 1 to {limits.MAX_RANK}.")
        for name in ("batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"The setting {name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("inversion_steps", "lora_steps", "prior_batch", "prior_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"The setting {name} is {getattr(self, name)}; it must not be negative.")
        if self.layers not in ("attention", "transformer"):
            raise UserError(f"The layers are {self.layers!r}; they must be 'attention' or 'transformer'.")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"The schedule is {self.schedule!r}; it must be 'constant' or 'cosine'.")
