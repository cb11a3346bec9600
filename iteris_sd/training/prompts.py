"""Captions for photos that come without: templates with a place for the concept's trigger."""

from collections.abc import Sequence

# After Textual Inversion (arXiv 2208.01618), those that say nothing of how the photo was made.
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "a photo of the {}",
    "a close-up photo of a {}",
    "a good photo of a {}",
    "a rendering of a {}",
    "a depiction of a {}",
    "a photo of one {}",
)


def filled(trigger: str, templates: Sequence[str] = TEMPLATES) -> tuple[str, ...]:
    """The templates with ``trigger`` in their place."""
    return tuple(template.format(trigger) for template in templates)
