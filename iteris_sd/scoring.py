"""CLIP text and image alignment of pictures, by open_clip.

Text alignment is `2.5 · max(cos, 0)` (arXiv 2104.08718, eq. 1); the raw cosine stands beside it.  Image alignment
is the mean cosine between a picture and a concept's reference pictures: one number per concept, and the minimum
beside the mean, because a mean hides a concept that vanished.  Since a whole picture of several things is like none of
them, the same is also asked of every window of it, and the best window counts.  Where DINO takes part, image alignment
is measured by it, too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from iteris_sd import dino as dinos
from iteris_sd import memory
from iteris_sd.errors import UserError

if TYPE_CHECKING:
    from open_clip.model import CLIP

TEXT_FACTOR = 2.5
_BATCH = 16  # pictures or texts at once: ViT-L/14 fits in two gigabytes
_ROOM = 2 * 1024**3  # bytes that it then takes of a GPU

# Corners of windows (left, top, right, bottom) in quarters of a picture's sides: the whole first, then those of three
# quarters and of half its side, each a quarter from the next. So whatever takes half the side is seen to at least three
# quarters of its width and height in one that is no larger.
WINDOWS = tuple(
    (x, y, x + side, y + side) for side in (4, 3, 2) for y in range(5 - side) for x in range(5 - side)
)
_LARGE = 5  # the whole and the windows of three quarters


@dataclass(frozen=True)
class Source:
    """Where a scorer comes from: its name for people, and what open_clip is asked for.

    `photographic`: whether it is for pictures like photographs, which DINO knows, too. `on_cpu`: how many of `WINDOWS`
    it looks at where there is no GPU.
    """

    title: str
    model: str
    pretrained: str | None
    advice: str  # what to do when it cannot be loaded
    photographic: bool = True
    on_cpu: int = len(WINDOWS)


_STORYBOOK = Path(__file__).resolve().parents[1] / "assets" / "scorer"

SCORERS: Mapping[str, Source] = {
    "storybook": Source(
        "Storybook CLIP (small ResNet, 96 px; not comparable with ViT-L/14)",
        f"local-dir:{_STORYBOOK}",
        None,
        "Its files belong in assets/scorer; `python -m iteris_sd.storybook.train --stage clip` makes them anew.",
        photographic=False,
    ),
    "vit-l-14": Source(
        "CLIP ViT-L/14 (OpenAI, 224 px)",
        "ViT-L-14-quickgelu",
        "openai",
        "It is downloaded once, 1.7 GB: connect to the internet and try again.",
        on_cpu=_LARGE,  # two cores take more than a second for each
    ),
}


# ---------------------------------------------------------------- one picture


@dataclass(frozen=True)
class Score:
    """How well one picture fits its prompt and its concepts.

    `text` = 2.5 · max(`text_cosine`, 0). `images`: concept name -> mean cosine with its reference pictures. `minimum`,
    `mean`: of these over the concepts, None when there are none. `crops`: concept name -> the same cosine of the
    window that has the largest (`WINDOWS`). `dino`: concept name -> the same cosine of the whole picture by DINO; empty
    where it took no part. A picture that was not scored has None and empty maps.
    """

    text: float | None
    text_cosine: float | None
    images: Mapping[str, float]
    minimum: float | None
    mean: float | None
    crops: Mapping[str, float] = field(default_factory=dict)
    dino: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        text_cosine: float,
        images: Mapping[str, float],
        crops: Mapping[str, float] = {},
        dino: Mapping[str, float] = {},
    ) -> Score:
        """The score that follows from the cosines."""
        values = list(images.values())
        return Score(
            text=TEXT_FACTOR * max(text_cosine, 0.0),
            text_cosine=text_cosine,
            images=dict(images),
            minimum=min(values, default=None),
            mean=sum(values) / len(values) if values else None,
            crops=dict(crops),
            dino=dict(dino),
        )


UNSCORED = Score(None, None, {}, None, None)


@dataclass(frozen=True)
class NoScorer:
    """Scores nothing; `name` says so, and why."""

    name: str
    encoders: tuple[str, ...] = ()

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
    """An open_clip model, ready to embed, and perhaps DINO beside it.

    `name` names CLIP's backbone, for people. `windows`: how many of `WINDOWS` are looked at, from the first.
    """

    name: str
    model: CLIP
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    dino: dinos.Dino | None = None
    windows: int = len(WINDOWS)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The image encoders that take part, by their names for people."""
        return (self.name,) if self.dino is None else (self.name, dinos.TITLE)

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """CLIP's normalised embeddings of pictures, (n, d) float32 on the CPU."""
        return _joined([self._seen(pictures[k : k + _BATCH]) for k in range(0, len(pictures), _BATCH)])

    def _seen(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of a few pictures; where memory does not suffice, of one after the other."""
        pixels = torch.stack([self.preprocess(picture.convert("RGB")) for picture in pictures])
        try:
            return self.model.encode_image(pixels.to(self.device), normalize=True)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        memory.tidy()
        if len(pictures) == 1:
            raise UserError(
                f"Memory ran out while {self.name} looked at one picture. Close other programs that use the device, or "
                "choose no scorer."
            )
        return torch.cat([self._seen([picture]) for picture in pictures])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts, (n, d) float32 on the CPU."""
        blocks = [self.tokenizer(list(texts[k : k + _BATCH])) for k in range(0, len(texts), _BATCH)]
        return _joined([self.model.encode_text(b.to(self.device), normalize=True) for b in blocks])

    def reference(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of a concept's reference pictures, to be kept and given to `score`.

        (n, d) by CLIP; where DINO takes part, (n, d + e) with its embeddings beside them. Raises UserError when there
        are no pictures.
        """
        if not pictures:
            raise UserError("Image alignment needs reference pictures and found none; give at least one.")
        seen = self.embed_images(pictures)
        return seen if self.dino is None else torch.cat([seen, self.dino.embed(pictures)], dim=1)

    def score(
        self, pictures: Sequence[Image.Image], prompt: str, references: Mapping[str, Tensor]
    ) -> list[Score]:
        """Score pictures of one prompt against each concept's references, `{name: reference(pictures)}`.

        CLIP knows no learned tokens: give the prompt with class nouns in place of triggers.
        """
        if not pictures:
            return []
        count = self.windows if references else 1
        shown = [window for picture in pictures for window in windows(picture, count)]
        seen = self.embed_images(shown).unflatten(0, (len(pictures), -1))  # (pictures, windows, d)
        texts = seen[:, 0] @ self.embed_texts([prompt])[0]
        width = seen.shape[-1]
        found = {name: _cosines(seen, own[:, :width]) for name, own in references.items()}
        by_dino = {}
        if self.dino is not None and references:
            also = self.dino.embed(pictures)
            by_dino = {name: _cosines(also, own[:, width:]) for name, own in references.items()}
        return [
            Score.of(
                float(text),
                {name: float(cosines[k, 0]) for name, cosines in found.items()},
                {name: float(cosines[k].max()) for name, cosines in found.items()},
                {name: float(cosines[k]) for name, cosines in by_dino.items()},
            )
            for k, text in enumerate(texts)
        ]


def windows(picture: Image.Image, count: int = len(WINDOWS)) -> list[Image.Image]:
    """The first `count` windows of a picture; where quarters of its sides are no whole pixels, a little larger."""
    w, h = picture.size
    return [
        picture.crop((left * w // 4, top * h // 4, -(-right * w // 4), -(-bottom * h // 4)))
        for left, top, right, bottom in WINDOWS[:count]
    ]


def _cosines(seen: Tensor, references: Tensor) -> Tensor:
    """The mean cosine of each of (…, d) embeddings with (n, d) references: (…)."""
    return (seen @ references.T).mean(dim=-1)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block.float().cpu() for block in blocks])


# ---------------------------------------------------------------- loading


@lru_cache(maxsize=1)
def load(name: str, device: str | torch.device | None = None) -> Scorer:
    """Load the scorer called `name`, a key of `SCORERS`, once per process; on a GPU if there is one with room for it.

    DINO joins in where its weights are in the Hub's cache, though not beside Storybook's own scorer: what DINO makes of
    small drawn pictures nobody has measured. ITERIS_SD_DINO=on or off decides otherwise (`dino.load`). On a CPU the
    large ViT looks at the whole picture and the four larger windows only: all 14 would take it twelve times as long as
    the whole. So its `crops` there are as a rule lower than a GPU's; do not compare the two. Raises UserError for an
    unknown name, and when the weights are not there and cannot be had.
    """
    if name not in SCORERS:
        raise UserError(f"There is no scorer {name!r}; choose one of {', '.join(SCORERS)}.")
    source = SCORERS[name]
    where = torch.device(device or _place())
    dino = dinos.load(where, usual=source.photographic)
    try:
        with _quiet():
            model, preprocess, tokenizer = _open(source, where)
    except Exception as error:  # a missing file, no network, a broken download: each library raises its own
        raise UserError(
            f"The scorer {source.title} could not be loaded: {_root(error)}. {source.advice}"
        ) from error
    count = source.on_cpu if where.type == "cpu" else len(WINDOWS)
    return Scorer(source.title, model.eval().requires_grad_(False), preprocess, tokenizer, where, dino, count)


def _place() -> str:
    """A GPU that has room for a scorer and for drawing, else the CPU."""
    roomy = torch.cuda.is_available() and memory.free(torch.device("cuda")) >= memory.WORK + _ROOM
    return "cuda" if roomy else "cpu"


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
    def seed(self) -> int:
        """The seed that it was drawn from."""

    @property
    def score(self) -> Score:
        """The score of the picture."""


def measures(score: Score) -> dict[str, float]:
    """The numbers of a score by name, always in this order; what is None is left out.

    "text", "text_cosine", "image:<concept>" for each, "minimum", "mean", "crop:<concept>" for each, "crop_minimum" (the
    least of these), "dino:<concept>" for each.
    """
    every = {
        "text": score.text,
        "text_cosine": score.text_cosine,
        **{f"image:{name}": value for name, value in score.images.items()},
        "minimum": score.minimum,
        "mean": score.mean,
        **{f"crop:{name}": value for name, value in score.crops.items()},
        "crop_minimum": min(score.crops.values(), default=None),
        **{f"dino:{name}": value for name, value in score.dino.items()},
    }
    return {name: value for name, value in every.items() if value is not None}


def encoders(scorer: str, pictures: Iterable[Scored]) -> list[str]:
    """The image encoders that scores of pictures came from, by their names for people; `scorer`: that of the CLIP."""
    scores = [picture.score for picture in pictures]
    by_clip = [scorer] if any(score.images for score in scores) else []
    return by_clip + ([dinos.TITLE] if any(score.dino for score in scores) else [])
