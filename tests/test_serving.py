"""The app over time and for other programs: tools for language models, and a hundred compositions in a row."""

from __future__ import annotations

import asyncio
import os
import re
import zipfile
from pathlib import Path

import pytest
from gradio_client import Client

from iteris_sd import bases
from iteris_sd.errors import UserError
from iteris_sd.ui import api
from tests.browser import ROOT, running

pytestmark = pytest.mark.skipif(
    not (bases.ASSETS / "concepts" / "dog" / "concept.json").exists(),
    reason="the shipped concepts are not there",
)
LITTLE = {"methods": ["linear"], "steps": 2, "samples": 2}


def test_what_a_call_leaves_out_is_as_suits_its_base_model() -> None:
    given = {"sampler": None, "steps": 7, "guidance": None}
    assert api._drawing("sd15", given) == {"sampler": "dpm++", "steps": 7, "guidance": 7.5}
    assert api._drawing("storybook", {}) == bases.find("storybook").drawing
    with pytest.raises(UserError, match="5"):
        api._drawing(5, {})


def test_compose_and_merge_are_tools_of_a_language_model(tmp_path: Path) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def unheard(progress: float, total: float | None, message: str | None) -> None:
        pass

    async def ask(url: str) -> tuple[dict[str, str], str, list[str]]:
        async with (
            streamable_http_client(f"{url}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            listed = (await session.list_tools()).tools
            tools = {tool.name: f"{tool.description} {tool.inputSchema}" for tool in listed}
            arguments = {"concepts": ["dog", "barn"], "method": "linear", "layout": "kohya"}
            answer = await session.call_tool("merge", arguments)
            little = {**LITTLE, "prompt": "a {0} next to a {1}", "seeds": "0"}
            told = {"concepts": ["dog", "barn"], **little}
            # Gradio sends outputs apart to those who ask for progress, as programs for people do; else as one text.
            seen = await session.call_tool("compose", told, progress_callback=unheard)
            return tools, str(answer.content), [part.type for part in seen.content]

    with running(tmp_path / "app", "-m", "iteris_sd", "app", "--mcp") as (url, _):
        tools, answer, seen = asyncio.run(ask(url))
    assert set(tools) == {"compose", "merge"}
    assert "draw the same seeds with each" in tools["compose"]
    assert "dog-barn-linear-kohya.zip" in answer
    assert "alone, linear, task_arithmetic" in tools["compose"]
    assert seen[0] == "image"


def _resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_a_hundred_compositions_take_no_more_memory_and_disk_than_twenty(tmp_path: Path) -> None:
    """Of one visitor, who sees the last result only; the history keeps small pictures, and is bounded elsewhere."""
    memory, disk = {}, {}
    with running(tmp_path / "app") as (url, app):
        client = Client(url, verbose=False, download_files=False)
        for k in range(1, 101):
            client.predict(["dog", "barn"], "a {0} next to a {1}", seeds=[k], **LITTLE, api_name="/compose")
            if k in (20, 100):
                memory[k] = _resident(app.pid)
                kept = tmp_path / "app" / "data"
                disk[k] = _stored(tmp_path / "app") - _stored(kept)
    print(f"memory {memory[20] / 2**20:.0f} MiB, then {memory[100] / 2**20:.0f} MiB; files {disk}")
    assert memory[100] < 1.05 * memory[20]
    assert disk[100] < 1.5 * disk[20] + 2**20


def test_a_merge_can_be_had_without_pictures(tmp_path: Path) -> None:
    with running(tmp_path / "app") as (url, _):
        client = Client(url, verbose=False, download_files=str(tmp_path))
        for layout, name in (
            ("diffusers", "dog-barn-linear.safetensors"),
            ("peft", "adapter_config.json"),
        ):
            path = client.predict(["dog", "barn"], "linear", layout, api_name="/merge")
            assert any(name in inside for inside in zipfile.ZipFile(path).namelist())
        with pytest.raises(Exception, match="There is no layout 'lycoris'"):
            client.predict(["dog", "barn"], "linear", "lycoris", api_name="/merge")


def test_the_example_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gradio_client" in block
    )
    with running(tmp_path / "app") as (url, _):
        exec(compile(code.replace("http://127.0.0.1:7860", url), "README.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"iteris minimum -?\d\.\d+ n = 2", line) for line in told)
    assert told[-1].endswith("cat-barn-iteris-kohya.zip")
