"""What the README tells people to run does run."""

import re
from pathlib import Path

import pytest

from iteris_sd import formats
from iteris_sd.cli import app
from iteris_sd.merging import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = {16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (block for block in blocks("python") if "Samples(" in block)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
    told = capsys.readouterr().out.splitlines()
    found = formats.read(tmp_path / "merged.safetensors")
    layers = formats.read(ROOT / "assets" / "concepts" / "cat" / "lora.safetensors").lora.parts()[
        "text_encoder"
    ]
    assert len(told) == len(found.lora) == len(layers) > 0
    assert all(": residual 0." in line for line in told)
    assert found.metadata["method"] == "iteris"


def test_every_command_is_one_that_there_is() -> None:
    told = set(re.findall(r"python -m iteris_sd (\w+)", README))
    there = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    groups = {str(group.name) for group in app.registered_groups}
    assert told <= there | groups


def test_the_methods_are_counted() -> None:
    assert f"by IterIS and by {WORDS[len(METHODS) - 1]} other methods" in README
