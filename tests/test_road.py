"""The whole road on Stable Diffusion v1.5's true shapes, with the LoRA files that people have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import road

ROOT = Path(__file__).resolve().parents[1]
LORAS = ROOT.parent / "shared" / "loras"


@pytest.mark.slow
def test_two_real_files_become_one_picture_within_16_gib(tmp_path: Path) -> None:
    files = [LORAS / "analog_svd_rank4.safetensors", LORAS / "weapons_attn_procs.safetensors"]
    if not all(file.is_file() for file in files):
        pytest.skip("the LoRA files are not here")
    road.saved_model(tmp_path / "model")
    command = [sys.executable, "-m", "tests.road", str(tmp_path), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == found["read again"] >= 192
    assert found["apart"] < 1e-5
    assert found["size"] == [256, 256]
    assert -1 <= found["text"] <= 1
    assert found["peak"] < 16 * 2**30
    print(found)
