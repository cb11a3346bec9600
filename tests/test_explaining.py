"""Why a merge came out as it did: numbers against direct computations, and figures that say them."""

import json
import threading
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from iteris_sd import calibration, diagnostics, explaining, limits, merger
from iteris_sd.backbone import Backbone
from iteris_sd.calibration import LayerReport, Merged, finish
from iteris_sd.concepts import Library
from iteris_sd.errors import MemoryShort, UserError
from iteris_sd.events import MergeDone, Progress
from iteris_sd.explaining import Explanation
from iteris_sd.lora import LoRA
from iteris_sd.merging import METHODS
from iteris_sd.recipe import MethodUse, Recipe
from tests import toybook
from tests.toys import attention_stack, problem, text_encoder

TEXT_ONLY = {"down": 0, "mid": 0, "up": 0}
PICTURE_ONLY = {"text_encoder": 0}


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    merger.forget()


def asked(**changes: object) -> Recipe:
    data = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0}",
        "methods": [{"name": "base"}, {"name": "linear"}, {"name": "iteris"}],
        "seeds": [1],
        "calibration": {"samples": 6, "steps": 2},
    }
    return Recipe.of(data | changes)


def explained(recipe: Recipe, iterations: int = 3) -> Explanation:
    return calibration.finish(explaining.explain(recipe, Library.shipped(), iterations))


# Changes


@pytest.mark.parametrize("toy", [text_encoder(), attention_stack()], ids=["text encoder", "attention stack"])
def test_changes_are_those_from_one_iteration_to_the_next(toy) -> None:
    loras, batches = problem(toy, (2, 3))

    def merged(**parameters) -> Merged:
        return calibration.finish(
            calibration.merge(toy.modules, loras, toy.samples(batches), "iteris", parameters)
        )

    ran = [merged(iterations=k) for k in range(5)]
    assert [len(one.changes) for one in ran] == [0, 1, 2, 3, 4]
    for k in range(1, 5):
        before, after = ran[k - 1].lora, ran[k].lora
        apart = torch.stack(
            [(after[n].delta() - before[n].delta()).norm() / after[n].delta().norm() for n in after]
        )
        told = ran[4].changes[k - 1]
        assert told.largest == pytest.approx(float(apart.max()), rel=1e-5, abs=1e-7)
        assert told.median == pytest.approx(float(apart.quantile(0.5)), rel=1e-5, abs=1e-7)
    early = merged(iterations=30, tolerance=1e-3)
    assert len(early.changes) == early.passes - 1 < 30
    assert early.changes[-1].largest < 1e-3 <= early.changes[-2].largest
    assert merged().changes == ()


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_methods_that_do_not_iterate_change_nothing(method: str) -> None:
    toy = text_encoder()
    loras, batches = problem(toy, (2, 3))
    found = calibration.finish(calibration.merge(toy.modules, loras, toy.samples(batches), method))
    assert found.changes == ()


# An explanation


def test_the_methods_of_the_paper_and_of_the_recipe_are_measured_alike(backbone: Backbone) -> None:
    recipe = asked(
        methods=[{"name": "base"}, {"name": "ties"}, {"name": "iteris", "parameters": {"alpha": 0.01}}]
    )
    found = explained(recipe)
    assert found.recipe == recipe and found.concepts == ("dog", "barn")
    assert list(found.merged) == ["iteris", "regmean", "linear", "ties"]
    assert found.merged["iteris"].parameters["alpha"] == 0.01
    for one, served in zip(found.merged.values(), found.served, strict=True):
        residuals = [report.residual or 0.0 for report in one.reports]
        assert served.residual == pytest.approx(sum(residuals) / len(residuals))
        assert served.discrepancy is not None and served.discrepancy > 0
        misses = torch.tensor([report.balance for report in one.reports], dtype=torch.float64).sum(dim=0)
        assert served.shares == pytest.approx(
            dict(zip(("dog", "barn"), (misses / misses.sum()).tolist(), strict=True))
        )
    assert min(found.served, key=lambda served: served.residual or 9.0).method == "iteris"


def test_changes_are_of_the_recipes_own_iteris(backbone: Backbone) -> None:
    own = {"alpha": 0.01, "weights": "uniform"}
    found = explained(asked(methods=[{"name": "iteris", "parameters": own}]), iterations=4)
    again = asked(methods=[{"name": "iteris", "parameters": own | {"iterations": 4}}])
    wanted = calibration.finish(merger.merge_all(again, Library.shipped()))[1]["iteris"].changes
    assert len(found.changes) == 4 and found.changes == wanted
    assert found.merged["iteris"].changes == ()


def test_what_each_lora_touches(backbone: Backbone) -> None:
    found = explained(asked(concepts=[{"name": "dog", "weight": 2.0}, {"name": "barn"}]))
    for name, weight in (("dog", 2.0), ("barn", 1.0)):
        lora = Library.shipped().find(name).load().lora
        layers = Counter(diagnostics.block(layer) for layer in lora)
        touched = {touch.block: touch for touch in found.touched if touch.concept == name}
        assert {block: touch.layers for block, touch in touched.items()} == layers
        assert list(touched) == ["text_encoder", "unet.down_blocks.0", "unet.mid_block", "unet.up_blocks.1"]
        for block, touch in touched.items():
            deltas = [a.delta() for layer, a in lora.items() if diagnostics.block(layer) == block]
            wanted = weight * torch.cat([delta.flatten() for delta in deltas]).norm()
            assert touch.norm == pytest.approx(float(wanted), rel=1e-5)
            assert touch.ranks == tuple(sorted({lora[n].rank for n in lora if diagnostics.block(n) == block}))


def test_how_each_layer_was_calibrated(backbone: Backbone) -> None:
    methods = [
        {"name": "iteris", "parameters": {"targets": "text_encoder", "coefficients": [1, 0]}},
        {"name": "custom_diffusion"},
    ]
    found = explained(
        asked(methods=methods, concepts=[{"name": "dog"}, {"name": "barn", "blocks": {"mid": 0}}])
    )
    told, layers = found.calibrated, found.merged["iteris"].lora
    mid = sum(diagnostics.block(name) == "unet.mid_block" for name in layers)
    text = sum(name.startswith("text_encoder.") for name in layers)
    assert mid and found.layers == len(layers) and len(found.shared) == len(layers) - mid
    for one in told.values():
        assert one.solved + one.combined + one.averaged + one.kept == found.layers and one.kept == mid
    assert (told["iteris"].solved, told["iteris"].averaged) == (text, found.layers - text - mid)
    assert told["iteris"].left_out == {"barn: its coefficient is 0": found.layers - mid}
    assert (told["regmean"].solved, told["linear"].combined) == (found.layers - mid,) * 2
    assert (told["linear"].rows, told["linear"].sites) == (0, 0)
    positions = backbone.tokenise([""]).shape[1]
    assert told["iteris"].rows == told["iteris"].sites * 2 * 6 * positions
    assert 0 < told["iteris"].sites < text
    assert f"; the other {mid} by one of them only." in found.summary
    words = told["custom_diffusion"]
    assert (words.sites, words.solved) == (1, sum(".attn2.to_" in n and n[-1] in "kv" for n in found.shared))
    assert 0 < words.rows < 6 * positions


def test_time_counts_for_the_stage_that_was_announced(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(explaining, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    work = explaining.explain(asked(), Library.shipped(), 2)
    events = []
    while True:
        try:
            events.append(next(work))
        except StopIteration as stop:
            found = stop.value
            break
    assert sum(found.seconds.values()) == len(events) + 2  # one tick before each event, and before each end
    assert found.seconds["measuring"] == sum(
        isinstance(e, Progress) and "Measuring" in e.stage for e in events
    )
    assert found.seconds["sampling"] == sum(isinstance(e, Progress) and "Sampling" in e.stage for e in events)
    of_iteris = [e for e in events if isinstance(e, Progress) and e.stage.startswith("Merging by IterIS")]
    iterated = [e for e in of_iteris if "refinement" in e.stage or "first solve" in e.stage]
    told = found.seconds["merging by IterIS"], found.seconds["merging by IterIS, 2 iterations"]
    # The iterated run is announced once more, and its end counts for it, too.
    assert told == (len(of_iteris) - len(iterated) - 1, len(iterated) + 2)
    assert found.seconds["merging by Linear"] >= 1 and not found.remembered
    assert [e.method for e in events if isinstance(e, MergeDone)] == ["iteris", "regmean", "linear", "iteris"]
    assert set(explained(asked(), 2).remembered) == {"iteris", "regmean", "linear", "iteris, 2 iterations"}


def test_bounds_on_pictures_and_methods_do_not_stand_in_the_way(backbone: Backbone) -> None:
    many = [name for name in METHODS if METHODS[name].needs == "none" and name != "linear"][
        : limits.MAX_METHODS
    ]
    recipe = asked(methods=[{"name": name} for name in many], seeds=list(range(8)))
    found = explaining._asked(recipe)
    assert [use.name for use in found.methods] == ["iteris", "regmean", "linear", *many][: limits.MAX_METHODS]
    with pytest.raises(UserError, match="iterations must lie between 0 and"):
        explained(asked(), iterations=limits.MAX_ITERATIONS + 1)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([{"name": "dog"}], "Only one concept is picked, so there is nothing to merge"),
        (
            [{"name": "dog", "blocks": TEXT_ONLY}, {"name": "barn", "blocks": PICTURE_ONLY}],
            "No layer is touched by two",
        ),
    ],
)
def test_where_nothing_is_shared_it_says_so(
    backbone: Backbone, tmp_path: Path, concepts: list[dict], words: str
) -> None:
    found = explained(asked(concepts=concepts))
    assert found.summary.startswith(words) and not found.shared and found.changes == ()
    assert {one.kept for one in found.calibrated.values()} == {found.layers}
    assert all(one.residual is None and not one.shares for one in found.served)
    assert sum(touch.layers for touch in found.touched) == found.layers
    assert found.figures(tmp_path) == {}


def test_it_can_be_shown_as_plain_values(backbone: Backbone) -> None:
    found = explained(asked())
    told = json.loads(json.dumps(found.described()))
    assert told["summary"] == f"All {found.layers} layers are touched by both LoRAs and have to be merged."
    assert told["changes"][2] == {
        "iteration": 3, "median": found.changes[2].median, "largest": found.changes[2].largest,
    }  # fmt: skip
    assert told["methods"] == {"iteris": "IterIS", "regmean": "RegMean", "linear": "Linear"}
    assert [one["method"] for one in told["served"]] == list(told["methods"])
    assert sum(one["layers"] for one in told["touched"]) == 2 * found.layers


def test_what_was_merged_for_a_composition_is_only_measured(backbone: Backbone) -> None:
    finish(merger.merge_all(asked(), Library.shipped()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merger, "merge", lambda *_: pytest.fail("it is merged already"))
        _, found = finish(merger.merge_all(asked(), Library.shipped(), measured=True))
    assert all(report.residual is not None for one in found.values() for report in one.reports)


def test_only_want_of_memory_is_passed_over(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    merging = merger.merge

    def failing(error: type[UserError]) -> explaining.Explanation:
        def merge(backbone: Backbone, recipe: Recipe, picked: Any, method: MethodUse, inputs: Any) -> Any:
            if "iterations" in method.parameters:
                raise error("There is something.")
            return merging(backbone, recipe, picked, method, inputs)

        monkeypatch.setattr(merger, "merge", merge)
        return finish(explaining.explain(asked(), Library.shipped(), 2))

    assert failing(MemoryShort).changes == ()
    with pytest.raises(UserError, match="There is something"):
        failing(UserError)


def test_stopping_anywhere_leaves_no_trace(backbone: Backbone) -> None:
    before = toybook.trace(backbone)
    events = len(list(explaining.explain(asked(), Library.shipped(), 2)))
    assert toybook.trace(backbone) == before
    for stop in (1, 4, events // 2, events - 3):
        merger.forget()
        work = explaining.explain(asked(), Library.shipped(), 2)
        for _ in range(stop):
            next(work)
        work.close()
        assert toybook.trace(backbone) == before


# Figures


def test_figures_are_drawn_in_any_thread(backbone: Backbone, tmp_path: Path) -> None:
    found, drawn = explained(asked(methods=[{"name": "ties"}])), {}
    threads = [
        threading.Thread(target=lambda n=n: drawn.update({n: found.figures(tmp_path / n, n)}))
        for n in found.merged
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(drawn) == {"iteris", "regmean", "linear", "ties"}
    for files in drawn.values():
        assert list(files) == ["discrepancy", "residual", "balance", "change"] == list(diagnostics.TITLES)
        for file in files.values():
            with Image.open(file) as picture:
                assert picture.width == 1440 and len(set(picture.convert("L").tobytes())) > 20
    with pytest.raises(UserError, match="Nothing was merged by 'tsv' here; choose one of iteris, regmean"):
        found.figures(tmp_path, "tsv")


def test_figures_can_be_read_without_colours(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explained(asked())
    monkeypatch.setattr(diagnostics, "_COLOURS", ("black",) * 8)
    monkeypatch.setattr(diagnostics, "_FILLS", ("white",) * 6)
    for figure in (
        diagnostics._discrepancy(found.reports, found.merged),
        diagnostics._residual(found.reports),
    ):
        (axes,) = panels(figure)
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in lines] == ["IterIS", "RegMean", "Linear"]
        assert len({line.get_marker() for line in lines}) == 3
    assert len({line.get_linestyle() for line in panels(diagnostics._change(found.changes))[0].lines}) == 2
    for axes in panels(diagnostics._balance(found.reports, found.concepts)):
        assert {bars.patches[0].get_hatch() for bars in axes.containers} == {"", "////"}


def panels(figure: Figure | None) -> list[Any]:
    assert figure is not None
    return figure.axes


def test_figures_say_the_numbers(backbone: Backbone) -> None:
    found = explained(asked())
    (axes,) = panels(diagnostics._change(found.changes))
    largest, median = (line.get_ydata().tolist() for line in axes.lines)
    assert largest == [change.largest for change in found.changes]
    assert median == [change.median for change in found.changes] and axes.get_yscale() == "log"
    (axes,) = panels(diagnostics._discrepancy(found.reports, found.merged))
    for line, reports in zip(axes.lines, found.reports.values(), strict=False):
        wanted = {report.site: report.discrepancy or 0.0 for report in reports}
        assert sorted(line.get_ydata()) == pytest.approx(sorted(wanted.values()))
    panel = panels(diagnostics._balance(found.reports, found.concepts))[0]
    of_text = [r for r in found.reports["iteris"] if r.name.startswith("text_encoder.")]
    share = sum(r.balance[0] for r in of_text) / sum(sum(r.balance) for r in of_text)
    assert panel.containers[0].patches[0].get_width() == pytest.approx(share)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["text", "down 0", "mid", "up 1"]


def test_layers_come_as_the_model_meets_them() -> None:
    names = [
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.10.self_attn.q_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder.encoder.layers.2.self_attn.q_proj",
    ]
    assert sorted(names, key=diagnostics._from_the_input_on) == [names[k] for k in (5, 1, 4, 3, 2, 0)]
    assert [diagnostics.block(name) for name in names[:3]] == [
        "unet.up_blocks.1",
        "text_encoder",
        "unet.mid_block",
    ]
    assert diagnostics.block("unet.conv_in") == "unet.conv_in"


def test_measures_are_told_to_the_concepts_that_they_are_of() -> None:
    solved = LayerReport("a", (0, 1, 2), "iteris", site="b", rows=7, balance=(1.0, 1.0, 1.0))
    plain = LayerReport("a", (0, 2), "linear")
    measured = LayerReport("a", (0, 2), "measured", "a", 5, residual=0.5, discrepancy=0.1, balance=(2.0, 3.0))
    found = [
        diagnostics.with_measures(Merged(LoRA({}), "iteris", {}, (report,), 1), [measured]).reports[0]
        for report in (solved, plain)
    ]
    assert [report.balance for report in found] == [(2.0, 0.0, 3.0), (2.0, 3.0)]
    assert [(report.site, report.rows) for report in found] == [("b", 7), ("a", 5)]
    assert {report.residual for report in found} == {0.5}
