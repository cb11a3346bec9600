"""The page: widgets and wording on Gradio; no mathematics, and no torch before the first request."""

from iteris_sd.ui.page import build, launch
from iteris_sd.ui.space import prepare

__all__ = ["build", "launch", "prepare"]
