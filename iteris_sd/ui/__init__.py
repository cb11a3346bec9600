"""The page: widgets and wording on Gradio; no mathematics, and no torch before the first request."""

from iteris_sd.ui.page import build, launch

__all__ = ["build", "launch"]
