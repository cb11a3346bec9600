"""The app as it runs where a GPU is lent, with Hugging Face's own package `spaces`; a program of its own.

Real are the pretended GPU of the main process, the forked workers, and the queues between them. There is no GPU, and
nobody to lend one: a worker takes the models to the CPU, and every request is granted.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

os.environ.update(
    SPACES_ZERO_GPU="true",
    SPACES_ZERO_DEVICE_API_URL="http://127.0.0.1:9",  # nobody is there
    SPACE_ID="someone/iteris",
    HOME=(home := tempfile.mkdtemp(prefix="iteris-sd-lent-")),
    HF_HUB_CACHE=f"{home}/hub",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # threads do not come along when a process is forked
)

import app  # noqa: F401  # as a Space does: it loads the models
from iteris_sd.concepts import Library
from iteris_sd.history import History
from iteris_sd.recipe import Recipe
from iteris_sd.ui import jobs, space

FOLDER = Path(home)


def pretend() -> None:
    """Let every request be granted, and workers do without a GPU."""
    from spaces.zero import client
    from spaces.zero import torch as emulated
    from spaces.zero.api import ScheduleResponse
    from spaces.zero.torch import patching

    def move(callback: Any = None) -> None:
        for fake, original in list(patching.cuda_aliases.items()):
            if original is not None:
                fake.data = original

    granted = ScheduleResponse(idle=False, nvidiaIndex=0, nvidiaUUID="none", allowToken="none")
    client.schedule = lambda **asked: granted
    client.allow = client.release = lambda *given, **more: None
    emulated.init, emulated.size, emulated.move = lambda uuid: None, lambda: 0, move


def done(**changes: Any) -> jobs.State:
    """What comes of a composition, in a thread as on the page; its worker is ended, as a lender ends it."""
    told = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "seeds": [0],
        "steps": 2,
        "calibration": {"samples": 2, "steps": 2},
    }
    job = jobs.Job(Recipe.of(told | changes), Library.shipped(), FOLDER, History(FOLDER / "history"))
    job.start()
    assert job.wait(120)
    for worker in active_children():
        worker.terminate()
        worker.join()
    time.sleep(0.5)  # until `spaces` has seen that
    gc.collect()
    return job.state


def main() -> None:
    """Raise AssertionError where something is not as it should be."""
    from iteris_sd import backbone, merger

    assert backbone.load("storybook").unet.conv_in.weight.device.type == "cuda", "not on the pretended GPU"
    assert "Stable Diffusion v1.5 could not be loaded" in space.lacking()
    pretend()
    made = done()
    assert made.phase == "done" and len(made.pictures) == 3, made.message
    assert len(merger._MERGES) == 2, "a worker's merges went with it"
    failed = done(sampler="lcm")
    assert "needs an LCM-LoRA" in failed.message, failed.message
    before = len(os.listdir("/proc/self/fd"))
    for seed in (1, 2):
        assert done(seeds=[seed]).phase == "done"
    assert len(os.listdir("/proc/self/fd")) == before, "files stay open"


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(FOLDER)
