"""Builds the page and launches it; the entry point of the Hugging Face Space."""

from iteris_sd.ui import launch, prepare

prepare()

if __name__ == "__main__":
    launch()
