"""The terminal: what it prints, what it writes, and that bad input costs one sentence and nothing else."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from iteris_sd import bases, composer, export, formats, ui
from iteris_sd.cli import app
from iteris_sd.kept import Kept
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.merging import METHODS

LORA = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
QUICK = ("--steps", "3", "--samples", "6")
PROMPT = ("--prompt", "a {0} next to a {1}")


@pytest.fixture(autouse=True)
def place(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def done(*words: str) -> str:
    """Run to a good end; what was printed."""
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_concepts() -> None:
    listed = json.loads(done("concepts", "--json"))
    assert [concept["name"] for concept in listed] == ["barn", "cat", "dog"]
    assert "<rex> dog" in done("concepts")


def test_no_name_is_cut_off_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert all(f"│ {name} " in done("concepts") for name in ("barn", "cat", "dog"))
    listed = done("methods")
    assert all(f"│ {name} " in listed for name in METHODS)
    assert "…" not in listed


def test_methods() -> None:
    listed = {method["name"]: method for method in json.loads(done("methods", "--json"))}
    assert list(listed) == list(METHODS)
    assert listed["knots"]["invariances"] == ["batches", "device", "duplicate", "order", "scaling"]
    alpha = listed["iteris"]["parameters"][0]
    assert (alpha["name"], alpha["default"], alpha["high"]) == ("alpha", 1e-4, 1.0)
    printed = done("methods")
    assert "iteris.alpha" in printed and "base" in printed


def test_compose_and_its_recipe_again(place: Path) -> None:
    methods = ("--methods", "base,linear,iteris", "--seeds", "0,7", "--param", "iteris.alpha=1e-5")
    printed = done(
        "compose", "dog", "barn", *PROMPT, *methods, *QUICK, "--weights", "1,0.8", "--output", "one"
    )
    assert "IterIS" in printed and "toy scorer" in printed and "Written to one." in printed
    assert list(place.iterdir()) == [place / "one"]
    recipe = json.loads((place / "one" / "recipe.json").read_text())
    assert [(use["name"], use["weight"]) for use in recipe["concepts"]] == [("dog", 1.0), ("barn", 0.8)]
    assert recipe["methods"][2] == {"name": "iteris", "parameters": {"alpha": 1e-5}}

    done("compose", "--recipe", "one/recipe.json", "--output", "two")
    pictures = sorted(path.relative_to("one") for path in Path("one").rglob("*.png"))
    assert len(pictures) == 7
    for picture in pictures:
        assert np.array_equal(pixels(Path("two") / picture), pixels(Path("one") / picture))
    assert (place / "two" / "recipe.json").read_text() == (place / "one" / "recipe.json").read_text()

    done("compose", "--recipe", "one/recipe.json", "--methods", "iteris", "--seeds", "7", "--output", "three")
    assert {path.name for path in Path("three").glob("*.png")} == {"grid.png", "iteris_seed7.png"}
    assert np.array_equal(pixels(Path("three/iteris_seed7.png")), pixels(Path("one/iteris_seed7.png")))


def test_merge(place: Path) -> None:
    printed = done("merge", "dog", "barn", "--method", "linear", "--output", "sub/dog+barn.safetensors")
    assert printed.count("Written: ") == 3
    read = formats.read(place / "sub" / "dog+barn.safetensors")
    assert read.metadata["method"] == "linear" and len(read.lora) == 40
    tokens = [
        token for path in Path("sub/dog+barn.embeddings").iterdir() for token in formats.read_embeddings(path)
    ]
    assert sorted(tokens) == ["<lucky>", "<rex>"]
    done(
        "merge",
        "dog",
        "barn",
        "--output",
        "x.safetensors",
        "--samples",
        "4",
        "--param",
        "iteris.iterations=1",
    )
    assert json.loads(formats.read(place / "x.safetensors").metadata["parameters"])["iterations"] == 1


def test_merge_writes_every_layout(place: Path) -> None:
    plain = ("merge", "dog", "barn", "--method", "linear")
    done(*plain, "--layout", "kohya", "--bundle-tokens", "--precision", "fp16", "--output", "k.safetensors")
    read = formats.read(place / "k.safetensors")
    assert read.dialect == "kohya" and sorted(read.tokens) == ["<lucky>", "<rex>"]
    done(*plain, "--layout", "peft", "--output", "folder")
    assert len(formats.read(place / "folder").lora) == 40
    for layout, message in (("peft", "PEFT's layout is a folder"), ("a1111", "no layout 'a1111'")):
        told = run(*plain, "--layout", layout, "--output", "x.safetensors")
        assert told.exit_code == 2 and message in told.stderr


def test_concepts_may_be_folders_and_files(toy: Path, place: Path) -> None:
    shutil.copytree(toy / "concepts" / "dog", place / "my-dog")
    shutil.copy(toy / "concepts" / "barn" / "lora.safetensors", place / "hut.safetensors")
    done("merge", "./my-dog", "hut.safetensors", "--method", "linear", "--output", "out.safetensors")
    sources = json.loads(formats.read(place / "out.safetensors").metadata["sources"])
    assert [(s["name"], s["trigger"]) for s in sources] == [("dog", "<rex> dog"), ("hut", "hut")]


def test_tokens_are_kept_with_a_concept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERIS_SD_DATA", str(place / "data"))
    formats.write(place / "fox.safetensors", LoRA({LORA: LowRank(torch.ones(2, 768), torch.ones(320, 2))}))
    for name in ("red", "fur", "tail"):
        formats.write_embedding(place / f"{name}.safetensors", f"<{name}>", torch.ones(1, 768))
    done("concepts", "add", "fox.safetensors", "--token", "red.safetensors", "--token", "fur.safetensors")
    assert Kept.usual().library().find("fox").load().tokens.keys() == {"<red>", "<fur>"}
    done("concepts", "edit", "fox", "--token", "tail.safetensors", "--title", "Fox")
    fox = Kept.usual().library().find("fox")
    assert fox.title == "Fox" and fox.load().tokens.keys() == {"<red>", "<fur>", "<tail>"}
    with zipfile.ZipFile(place / "plain.zip", "w") as archive:
        for name in ("fox", "red"):
            archive.write(place / f"{name}.safetensors", f"{name}.safetensors")
    assert done("concepts", "add", "plain.zip", "--trigger", "sks") == (
        "Kept fox-2: trigger 'sks', class noun 'fox', for Stable Diffusion v1.5.\n"
    )
    refused = run("concepts", "add", "tail.safetensors")
    assert refused.exit_code == 2 and "tail.safetensors holds learned tokens and no LoRA" in refused.stderr


@pytest.mark.parametrize("named", ["mine", "storybook"])
def test_the_page_begins_with_a_base_model_at_a_path(
    toy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """It is offered by its file's name, which takes no other model's place and does not say where it lies."""
    shutil.copytree(toy / "storybook", place / named)
    config = place / named / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 128}))
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    launched: list[str] = []
    monkeypatch.setattr(ui, "launch", lambda **told: launched.append(told["base"]))
    done("app", "--base", f"./{named}")
    expected = "mine" if named == "mine" else "storybook (another)"
    assert launched == [expected] and bases.everyone()[len(bases.BASES) - 1].name == expected
    assert bases.find(expected).source == str(place / named)
    assert not any(str(place) in name for name in bases.BASES)
    assert bases.find("storybook").source == str(toy / "storybook")


@pytest.mark.parametrize(
    ("text", "told"),
    [("sd15", "sd15"), ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"), (None, None)],
)
def test_the_page_begins_with_a_known_base_model(
    monkeypatch: pytest.MonkeyPatch, text: str | None, told: str | None
) -> None:
    launched: list[str | None] = []
    monkeypatch.setattr(ui, "launch", lambda **given: launched.append(given["base"]))
    done("app", *([] if text is None else ["--base", text]))
    assert launched == [told]


def test_a_base_model_that_is_none_opens_no_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "launch", lambda **_: pytest.fail("the page was opened"))
    (place / "empty").mkdir()
    for text, told in (
        ("empty", "no base model in diffusers' layout"),
        ("sdxl", "There is no base model 'sdxl'"),
    ):
        refused = run("app", "--base", text)
        assert refused.exit_code == 2 and told in refused.stderr


def asked(*words: str) -> tuple[str, ...]:
    return ("compose", *words, "--output", "out")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (asked("wolf", "barn", *PROMPT), "There is no concept 'wolf'; choose from barn, cat, dog."),
        (asked(*PROMPT), "Choose between 1 and 6 concepts, not 0."),
        (asked("a", "b", "c", "d", "e", "f", "g", *PROMPT), "Choose between 1 and 6 concepts, not 7."),
        (asked("dog", "dog", *PROMPT), "The concept dog is given twice; give each concept once."),
        (asked("dog", "twin", *PROMPT), "dog and twin have the same trigger, '<rex> dog'"),
        (asked("dog", "barn"), "The prompt is empty; say what the picture should show."),
        (asked("dog", "barn", "--prompt", " "), "The prompt is empty; say what the picture should show."),
        (
            asked("dog", "barn", "--prompt", "a {2}"),
            "The prompt speaks of {2}, but only 2 concepts are picked",
        ),
        (
            asked("dog", "barn", *PROMPT, "--seeds", ",".join(map(str, range(17)))),
            "between 1 and 16 seeds, not 17.",
        ),
        (
            asked("dog", "barn", *PROMPT, "--seeds", "1,two"),
            "--seeds takes whole numbers with commas between them",
        ),
        (
            asked("dog", "barn", *PROMPT, "--methods", "base,magic"),
            "There is no method 'magic'; choose from base",
        ),
        (
            asked("dog", "barn", *PROMPT, "--weights", "1"),
            "--weights needs one number per concept, 2, not 1.",
        ),
        (asked("dog", "barn", *PROMPT, "--weights", "1,-1"), "greater than 0"),
        (asked("dog", "barn", *PROMPT, "--steps", "1000"), "less than or equal to 100, not 1000."),
        (
            asked("dog", "barn", *PROMPT, "--sampler", "euler"),
            "'ddim', 'dpm++', 'ddpm', 'euler a', 'unipc' or 'lcm', not 'euler'.",
        ),
        (
            asked("dog", "barn", *PROMPT, "--base", "sdxl"),
            f"There is no base model 'sdxl'; choose one of {', '.join([*bases.BASES, *bases.ALLOWED])}.",
        ),
        (
            asked("dog", "barn", *PROMPT, "--param", "iteris.alpha=high"),
            "alpha must be a number, not 'high'.",
        ),
        (
            asked("dog", "barn", *PROMPT, "--param", "iteris.alpha=-1"),
            "alpha must lie between 0 and 1, not -1.0.",
        ),
        (asked("dog", "barn", *PROMPT, "--param", "iteris.beta=1"), "IterIS has no parameter 'beta'"),
        (asked("dog", "barn", *PROMPT, "--param", "regmean.factor=1"), "not among the methods asked for."),
        (asked("dog", "barn", *PROMPT, "--param", "alpha"), "--param takes METHOD.NAME=VALUE"),
        (
            asked("dog", "barn", *PROMPT, "--param", "iteris.coefficients=1,2,3"),
            "coefficients needs one number per concept, 2, not 3.",
        ),
        (asked("dog", "text.safetensors", *PROMPT), "text.safetensors cannot be used: "),
        (
            asked("dog", "pickle.safetensors", *PROMPT),
            "pickle.safetensors cannot be used: it is ",
        ),
        (asked("dog", "none.safetensors", *PROMPT), "no concept and no file 'none.safetensors'"),
        (
            asked("dog", "wide.safetensors", *PROMPT),
            f"The LoRA wide.safetensors does not fit {LORA}: it is 8 × 768",
        ),
        (
            asked("dog", "foreign.safetensors", *PROMPT),
            "touches unet.no.such.layer, which this model does not have",
        ),
        (asked("--recipe", "none.json"), "The recipe none.json cannot be read: No such file or directory."),
        (asked("--recipe", "text.safetensors"), "is no recipe: it is not valid JSON."),
        (("compose", "dog", "barn", *PROMPT, "--output", "text.safetensors"), "is a file; choose a folder"),
        (
            ("merge", "dog", "barn", "--method", "base", "--output", "x.safetensors"),
            "no merging method 'base'",
        ),
        (("merge", "dog", "barn", "--output", "x.bin"), "give it a name that ends in .safetensors."),
        (("merge", "dog", "wolf", "--output", "x.safetensors"), "There is no concept 'wolf'"),
        (asked("dog", "barn", *PROMPT, "--stepps", "3"), "No such option"),
        (("merge", "dog", "barn"), "Missing option"),
        (("bake",), "No such command"),
    ],
)
def test_bad_input(toy: Path, place: Path, words: tuple[str, ...], sentence: str) -> None:
    (place / "text.safetensors").write_text("hello, I am a text and not a LoRA at all")
    (place / "pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    formats.write(place / "wide.safetensors", LoRA({LORA: LowRank(torch.zeros(2, 768), torch.zeros(8, 2))}))
    foreign = LoRA({"unet.no.such.layer": LowRank(torch.zeros(2, 8), torch.zeros(8, 2))})
    formats.write(place / "foreign.safetensors", foreign)
    if "twin" in words:
        shutil.copytree(toy / "concepts" / "dog", place / "twin")
        told = json.loads((place / "twin" / "concept.json").read_text())
        (place / "twin" / "concept.json").write_text(json.dumps({**told, "name": "twin"}))
    before = sorted(place.rglob("*"))
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    if not sentence.startswith(("No such", "Missing")):  # those are typer's own, with a usage line
        assert result.stderr.count("\n") == 1 and result.stderr.endswith(".\n")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_ctrl_c_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((composer, "_draw", stop) if when == "drawing" else (export, "picture_png", stop)))
    result = run(*asked("dog", "barn", *PROMPT, "--methods", "base,linear", "--seeds", "1", "--steps", "1"))
    assert result.exit_code == 130
    assert result.stderr == "Stopped.\n"
    assert not list(place.iterdir())


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": str(root)} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, env=env)


def test_a_real_process_answers() -> None:
    answer = python("-m", "iteris_sd", "concepts", "--json")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert isinstance(json.loads(answer.stdout), list)
    other = python("-m", "iteris_sd", "methods", "--json", PYTHONIOENCODING="ascii")  # it has no λ
    assert (other.returncode, other.stderr) == (0, "")
    assert json.loads(other.stdout) == json.loads(done("methods", "--json"))
    assert python("-m", "iteris_sd", "methods", PYTHONIOENCODING="ascii").returncode == 0
    refused = python("-m", "iteris_sd", "compose", "wolf", "--prompt", "a wolf", "--output", "out")
    assert refused.returncode == 2 and refused.stderr.startswith("There is no concept 'wolf'")


@pytest.mark.parametrize("words", [["concepts"], ["methods", "--json"], ["--help"], ["compose", "--help"]])
def test_quick_answers_do_not_wait_for_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom iteris_sd.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("method", ["linear", "iteris"])
def test_diagnostics_are_alike_for_all_methods(place: Path, method: str) -> None:
    told = done(
        "merge", "dog", "barn", "--method", method, "--samples", "6", "--unconditional", "2",
        "--output", "pair.safetensors", "--diagnostics", "told",
    )  # fmt: skip
    names = ["layers.csv", "residual.png", "discrepancy.png", "balance.png"]
    assert sorted(f.name for f in (place / "told").iterdir()) == sorted(names)
    assert all(f"Written: told/{name}" in told for name in names)
    with (place / "told" / "layers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {method}
    assert {row["concepts"] for row in rows} == {"dog + barn"}
    for row in rows:
        assert float(row["residual"]) > 0 and float(row["discrepancy"]) >= 0 and int(row["rows"]) > 0
        assert float(row["miss dog"]) > 0 and float(row["lambda barn"]) > 0
        assert bool(row["condition"]) == (method == "iteris")
        assert row["site"] in {other["layer"] for other in rows}
    with Image.open(place / "told" / "residual.png") as figure:
        assert figure.width > 600


def test_diagnostics_that_cannot_be_written_are_refused_before_the_work(place: Path) -> None:
    (place / "told").write_text("")
    result = run("merge", "dog", "barn", "--output", "pair.safetensors", "--diagnostics", "told")
    assert result.exit_code == 2 and "is a file; choose a folder" in result.output
    assert not (place / "pair.safetensors").exists()
