"""CLIP text and image alignment of pictures, by open_clip, and their summary by method.

Text alignment is `2.5 · max(cos, 0)` (arXiv 2104.08718, eq. 1); the raw cosine stands beside it.  Image alignment
is the mean cosine between a picture and a concept's reference pictures: one number per concept, and the minimum
beside the mean, because a mean hides a concept that vanished.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from iteris_sd.errors import UserError

if TYPE_CHECKING:
    from open_clip.model import CLIP

TEXT_FACTOR = 2.5
INTERVAL = "95 % interval of the mean (Student's t over pictures)"
_BATCH = 16  # pictures or texts at once: ViT-L/14 fits in two gigabytes


@dataclass(frozen=True)
class Source:
    """Where a scorer comes from: its name for people, and what open_clip is asked for."""

    title: str
    model: str
    pretrained: str | None
    advice: str  # what to do when it cannot be loaded


_STORYBOOK = Path(__file__).resolve().parents[1] / "assets" / "scorer"

SCORERS: Mapping[str, Source] = {
    "storybook": Source(
        "Storybook CLIP (small ResNet, 96 px; not comparable with ViT-L/14)",
        f"local-dir:{_STORYBOOK}",
        None,
        "Its files belong in assets/scorer; `python -m iteris_sd.storybook.train --stage clip` makes them anew.",
    ),
    "vit-l-14": Source(
        "CLIP ViT-L/14 (OpenAI, 224 px)",
        "ViT-L-14-quickgelu",
        "openai",
        "It is downloaded once, 1.7 GB: connect to the internet and try again.",
    ),
}


# ---------------------------------------------------------------- one picture


@dataclass(frozen=True)
class Score:
    """How well one picture fits its prompt and its concepts.

    `text` = 2.5 · max(`text_cosine`, 0). `images`: concept name -> mean cosine with its reference pictures.
    `minimum`, `mean`: over the concepts, None when there are none. A picture that was not scored has None throughout.
    """

    text: float | None
    text_cosine: float | None
    images: Mapping[str, float]
    minimum: float | None
    mean: float | None

    @staticmethod
    def of(text_cosine: float, images: Mapping[str, float]) -> Score:
        """The score that follows from the cosines."""
        values = list(images.values())
        return Score(
            text=TEXT_FACTOR * max(text_cosine, 0.0),
            text_cosine=text_cosine,
            images=dict(images),
            minimum=min(values, default=None),
            mean=sum(values) / len(values) if values else None,
        )


UNSCORED = Score(None, None, {}, None, None)


@dataclass(frozen=True)
class NoScorer:
    """Scores nothing; `name` says so, and why."""

    name: str

    def reference(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Nothing is kept of reference pictures: (0,)."""
        return torch.empty(0)

    def score(
        self, pictures: Sequence[Image.Image], prompt: str, references: Mapping[str, Tensor]
    ) -> list[Score]:
        """No scores, one for each picture."""
        return [UNSCORED] * len(pictures)


@dataclass(frozen=True, eq=False)
class Scorer:
    """An open_clip model, ready to embed.  `name` names the backbone, for people."""

    name: str
    model: CLIP
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings of pictures, (n, d) float32 on the CPU."""
        tensors = [self.preprocess(picture.convert("RGB")) for picture in pictures]
        blocks = [torch.stack(tensors[k : k + _BATCH]) for k in range(0, len(tensors), _BATCH)]
        return _joined([self.model.encode_image(b.to(self.device), normalize=True) for b in blocks])

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts, (n, d) float32 on the CPU."""
        blocks = [self.tokenizer(list(texts[k : k + _BATCH])) for k in range(0, len(texts), _BATCH)]
        return _joined([self.model.encode_text(b.to(self.device), normalize=True) for b in blocks])

    def reference(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of a concept's reference pictures, (n, d), to be kept and given to `score`.

        Raises UserError when there are no pictures.
        """
        if not pictures:
            raise UserError("Image alignment needs reference pictures and found none; give at least one.")
        return self.embed_images(pictures)

    def score(
        self, pictures: Sequence[Image.Image], prompt: str, references: Mapping[str, Tensor]
    ) -> list[Score]:
        """Score pictures of one prompt against each concept's references, `{name: reference(pictures)}`.

        CLIP knows no learned tokens: give the prompt with class nouns in place of triggers.
        """
        seen = self.embed_images(pictures)
        texts = seen @ self.embed_texts([prompt])[0]
        # The mean of cosines is the cosine with the mean, which is not normalised again.
        images = {name: (seen @ own.T).mean(dim=1).tolist() for name, own in references.items()}
        return [
            Score.of(float(text), {name: values[k] for name, values in images.items()})
            for k, text in enumerate(texts)
        ]


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block.float().cpu() for block in blocks])


# ---------------------------------------------------------------- loading


@lru_cache(maxsize=1)
def load(name: str, device: str | torch.device | None = None) -> Scorer:
    """Load the scorer called `name`, a key of `SCORERS`, once per process; the device is a GPU if there is one.

    Raises UserError for an unknown name, and when the weights are not there and cannot be had.
    """
    if name not in SCORERS:
        raise UserError(f"There is no scorer {name!r}; choose one of {', '.join(SCORERS)}.")
    source = SCORERS[name]
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with _quiet():
            model, preprocess, tokenizer = _open(source, where)
    except Exception as error:  # a missing file, no network, a broken download: each library raises its own
        raise UserError(
            f"The scorer {source.title} could not be loaded: {_root(error)}. {source.advice}"
        ) from error
    return Scorer(source.title, model.eval().requires_grad_(False), preprocess, tokenizer, where)


def _open(source: Source, device: torch.device) -> tuple[CLIP, Any, Any]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        source.model, pretrained=source.pretrained, device=device, require_pretrained=True
    )
    return model, preprocess, open_clip.get_tokenizer(source.model)


def _root(error: BaseException) -> str:
    """What lies at the bottom of a chain of errors, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what open_clip and its libraries tell developers.

    open_clip logs through the root logger, which prints unless it has a handler: it gets one that does nothing.
    """
    from huggingface_hub.utils import logging as hub

    root, silent, before = logging.getLogger(), logging.NullHandler(), hub.get_verbosity()
    root.addHandler(silent)
    hub.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(silent)
        hub.set_verbosity(before)


# ---------------------------------------------------------------- many pictures


class Scored(Protocol):
    """Anything with a method and a score, such as the pictures of a composition."""

    @property
    def method(self) -> str:
        """The method's name."""

    @property
    def score(self) -> Score:
        """The score of the picture."""


@dataclass(frozen=True)
class Row:
    """One measure of one method: its mean over `n` pictures and the 95 % interval of it, None for one picture.

    `measure` is "text", "text_cosine", "minimum", "mean", or "image:" and a concept's name.
    """

    method: str
    measure: str
    n: int
    mean: float
    low: float | None
    high: float | None


def summarise(pictures: Iterable[Scored]) -> list[Row]:
    """Mean, n and interval of every measure by method, in the order in which the methods come.

    The interval is `INTERVAL`: it takes the pictures as independent, and says nothing of other prompts or concepts.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for picture in pictures:
        for measure, value in measures(picture.score).items():
            values.setdefault((picture.method, measure), []).append(value)
    methods = dict.fromkeys(method for method, _ in values)
    return [
        Row(method, measure, len(own), *mean_and_interval(own))
        for method in methods
        for (of, measure), own in values.items()
        if of == method
    ]


def measures(score: Score) -> dict[str, float]:
    """The numbers of a score by the names that `Row.measure` has; what is None is left out."""
    images = {f"image:{name}": value for name, value in score.images.items()}
    every = {
        "text": score.text,
        "text_cosine": score.text_cosine,
        **images,
        "minimum": score.minimum,
        "mean": score.mean,
    }
    return {name: value for name, value in every.items() if value is not None}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % t interval; no interval for one value. Raises ValueError for none."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to take a mean of")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    reach = t_quantile(n - 1) * deviation / math.sqrt(n)
    return mean, mean - reach, mean + reach


_NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
_FEW = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 2e-5: a table to ten degrees of freedom, then a series.

    The series is Cornish and Fisher's (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z, v = _NORMAL, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**k for k, term in enumerate(terms, start=1))
