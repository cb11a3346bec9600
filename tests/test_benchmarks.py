"""The benchmarks measure what they say: the ways compared agree, and memory is counted. No time is asserted."""

import csv
import json
import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from iteris_sd import limits, sd15
from iteris_sd.benchmarks import authors, composing, measuring, merging, problems, rendering
from iteris_sd.benchmarks.problems import KV_WIDTHS, Size
from iteris_sd.cli import app
from iteris_sd.errors import UserError
from iteris_sd.sd15 import UNET

TINY = Size(samples=6, rank=2, layers=2, width=32, positions=9, kv_widths=(24, 40), latents=8)


def test_the_shapes_are_stable_diffusions() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    widths = [m.out_features for name, m in unet.named_modules() if name.endswith("attn2.to_k")]
    assert sorted(widths) == sorted(KV_WIDTHS) and 12 * 4 + 2 * len(KV_WIDTHS) == 80
    problem = problems.build(TINY)
    assert [n for n in problem.modules if n.startswith("unet.")] == [
        f"unet.blocks.{k}.attn2.{kind}" for k in range(2) for kind in ("to_k", "to_v")
    ]
    per_layer = 4 * 32 * 32 + 2 * 32 * 128
    assert problem.macs == 2 * per_layer * 9


def test_all_ways_lead_to_the_same_merge() -> None:
    result = merging.run(TINY, alpha=1e-3, sweeps=2, peaks=False)
    assert result.iterations == 5 and len(result.authors_solves) == 6 and len(result.sweep) == 2
    assert set(result.differences) == {"sweep", "iterations=20"}
    assert max(result.differences.values()) < 1e-4
    early = next(authors.solves(problems.build(TINY), 1e-3))
    converged = merging._merged(problems.build(TINY), 1e-3).lora
    assert merging._difference(converged, early) > 1e-3
    assert result.floor > 0 and result.condition > 1
    told = dict(merging.lines(result))
    assert told["problem"] == "text: 12 layers, 2 LoRAs of rank 2, 6 samples each, α = 0.001"
    assert json.loads(json.dumps(merging.described(result)))["size"]["width"] == 32


def short_of_memory(*_: object) -> Generator[dict]:
    raise torch.OutOfMemoryError("CUDA out of memory")
    yield {}


def test_where_the_authors_way_does_not_fit_ours_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authors, "solves", short_of_memory)
    small = replace(TINY, scope="everything", samples=2, latents=16)
    monkeypatch.setattr(
        sd15, "UNET", {**UNET, "block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32}
    )
    result = merging.run(small, sweeps=2, peaks=False)
    assert len(result.sweep) == 2 and result.authors_seconds(20) is None
    told = dict(merging.lines(result))
    assert told["authors' way, 20 iterations"] == "did not fit into memory"
    assert float(told["each step of the samples' trajectories, apart"].split()[0]) < 60
    assert result.step is not None and result.step > 0
    assert not any("authors" in name for name in dict(merging.ratios(result)))


def want_of_memory(_: None) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_want_of_memory_in_the_measured_process_is_told() -> None:
    with pytest.raises(MemoryError):
        measuring.peak_bytes(nothing, want_of_memory)


def test_time_is_extrapolated_only_where_it_is_said() -> None:
    result = merging.run(TINY, sweeps=1, peaks=False)
    short = replace(result, authors_solves=(1.0, 2.0), extrapolated=True)
    assert short.authors_seconds(20) == 1.0 + 20 * 2.0
    assert "later ones taken to be like the last" in dict(merging.lines(short))["authors' way, 20 iterations"]
    assert "later ones" not in dict(merging.lines(result))["authors' way, converged (5)"]


def hold(size: int, _: None) -> None:
    torch.ones(size, dtype=torch.uint8).clone()


def nothing() -> None:
    return None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory where there is one")
def test_peak_memory_is_that_of_the_work_alone() -> None:
    few, many = (measuring.peak_bytes(nothing, partial(hold, size)) for size in (1, 200_000_000))
    assert 380_000_000 < many - few < 420_000_000


def test_the_command_refuses_a_scope_that_there_is_not() -> None:
    result = CliRunner().invoke(app, ["bench", "merge", "--scope", "half"])
    assert result.exit_code == 2 and "There is no scope 'half'; choose text or everything." in result.output


def test_pictures_per_second_are_counted(capsys: pytest.CaptureFixture) -> None:
    narrow = {**UNET, "block_out_channels": (32, 32, 32, 32), "attention_head_dim": 4}
    text = {**sd15.TEXT, "num_hidden_layers": 1, "intermediate_size": 32}
    vae = {**sd15.VAE, "block_out_channels": (32, 32, 32, 32)}
    job = rendering.Job(methods=2, seeds=2, steps=2, size=64, rank=2)
    result = rendering.run(job, partial(sd15.random_pipeline, narrow, vae, text))
    assert job.pictures == 4 and result.batch == 1
    assert min(result.ours, result.plain, result.bound) > 0
    told = rendering.described(result)
    assert told["ratio"] == pytest.approx(result.ours / result.plain)
    assert any("plain diffusers loop" in name for name, _ in rendering.lines(result))


def shot(pair: tuple[str, str], method: str, text: float, seed: int = 0, prompt: str = "p") -> composing.Shot:
    return composing.Shot(pair, prompt, seed, method, {"text": text, "minimum": text / 2})


def test_figures_are_means_over_pairs_and_differences_are_taken_picture_by_picture() -> None:
    one, other = ("a", "b"), ("a", "c")
    found = [
        *(shot(one, "linear", value, seed) for seed, value in enumerate((0.2, 0.4))),
        *(shot(one, "iteris", value, seed) for seed, value in enumerate((0.5, 0.5))),
        shot(other, "linear", 0.6),
        shot(other, "iteris", 0.9),
        shot(other, "iteris", 0.7, seed=9),  # with no picture of linear to compare
    ]
    linear, least, iteris, _ = composing.figures(found)
    assert (linear.method, linear.measure, linear.pairs, linear.pictures) == ("linear", "text", 2, 3)
    assert linear.more is None and linear.mean == pytest.approx((0.3 + 0.6) / 2)
    assert least.measure == "minimum" and least.mean == pytest.approx(linear.mean / 2)
    assert iteris.mean == pytest.approx((0.5 + 0.8) / 2) and iteris.pictures == 4
    assert iteris.more is not None and iteris.more == pytest.approx((0.2 + 0.3) / 2)
    reach = 12.706205 * 0.1 / math.sqrt(2) / math.sqrt(2)  # of two pairs, 0.1 apart
    assert iteris.more_high == pytest.approx(iteris.more + reach) and iteris.more_low is not None
    (alone,) = composing.figures([shot(one, "base", 0.5)])[:1]
    assert (alone.low, alone.more) == (None, None)


def test_pairs_are_drawn_as_suits_the_base_model() -> None:
    job = composing.Job(("a", "b"), ("base", "linear"), base="sd15", prompts=1)
    (recipe,) = composing._recipes(job, ("a", "b"))
    assert (recipe.sampler, recipe.steps, recipe.guidance) == ("dpm++", 25, 7.5)


def test_scores_are_in_the_table_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "shots.csv"
    path.write_text("of another day", encoding="utf-8")
    keep = composing.table(path)
    for seed in range(2):
        keep([shot(("a", "b"), "linear", 0.5, seed)])
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["seed"] for row in rows] == ["0", "1"][: seed + 1]
    assert (rows[0]["text"], rows[0]["minimum"], rows[0]["crop_minimum"]) == ("0.5", "0.25", "")
    with pytest.raises(UserError, match="cannot be written"):
        composing.table(tmp_path)


def test_every_pair_is_composed_in_prompts_and_seeds_of_its_own(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_METHODS", 1)  # more are composed in parts
    told = ["--methods", "linear", "--prompts", "2", "--csv", str(tmp_path / "shots.csv"), "--json"]
    result = CliRunner().invoke(app, ["bench", "compose", *told])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["job"]["concepts"] == ["barn", "cat", "dog"] and made["job"]["methods"] == ["base", "linear"]
    assert {(f["pairs"], f["pictures"]) for f in made["figures"]} == {(3, 6)}
    with (tmp_path / "shots.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    assert {(row["one"], row["other"], row["seed"]) for row in rows} == {
        (one, other, seed)
        for one, other in (("barn", "cat"), ("barn", "dog"), ("cat", "dog"))
        for seed in "01"
    }
    refused = CliRunner().invoke(app, ["bench", "compose", "dog"])
    assert refused.exit_code == 2 and "Pairs need two concepts at least" in refused.stderr
