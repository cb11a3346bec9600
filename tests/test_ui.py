"""What the page makes of what stands in its widgets, and of what came of it: without a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iteris_sd import bases, limits, serving
from iteris_sd.concepts import Concept, Library
from iteris_sd.errors import UserError
from iteris_sd.history import History
from iteris_sd.recipe import Recipe
from iteris_sd.ui import (
    asking,
    compose,
    form,
    inline,
    jobs,
    outcome,
    page,
    past,
    picker,
    results,
    room,
    space,
    takeaway,
    visits,
    why,
)
from iteris_sd.ui.picker import Use
from iteris_sd.ui.takeaway import Drawn

LIBRARY = Library(
    {
        name: Concept(name, f"My {name}", f"<{name}> {name}", name, Path("x.safetensors"), weight=weight)
        for name, weight in (("dog", 1.0), ("barn", 0.7), ("cat", 1.0))
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["dog", "barn", "cat"]),
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(st.sampled_from(["name", "on", "weight", "blocks", "down"]), inner)
    ),
    max_leaves=20,
)


def recipe(**changes: Any) -> Recipe:
    told: dict[str, Any] = {
        "concepts": [{"name": "dog"}, {"name": "barn"}],
        "prompt": "a {0} next to a {1}",
        "methods": [{"name": name} for name in ("base", "linear", "iteris")],
        "seeds": [3, 4],
    }
    return Recipe.of(told | changes)


@given(JSON)
def test_whatever_a_browser_sends_only_concepts_that_there_are_are_read(sent: Any) -> None:
    uses = picker.read(sent, LIBRARY)
    names = [use.name for use in uses]
    assert set(names) <= set(LIBRARY.concepts) and len(set(names)) == len(names) <= limits.MAX_CONCEPTS
    for use in uses:
        try:
            Recipe.of({"concepts": [picker.asked(use)], "prompt": "a {0}"})
        except UserError as error:
            assert str(error)


def test_what_the_picker_sends_is_read_as_it_was() -> None:
    uses = [
        Use("barn", True, 0.7),
        Use("dog", False, 2.0, {"text_encoder": 0.0, "down": 1, "mid": 1, "up": 1}),
    ]
    assert picker.read([use.plain() for use in uses], LIBRARY) == uses
    assert picker.asked(uses[0]) == {"name": "barn", "weight": 0.7}
    assert picker.asked(uses[1])["blocks"]["text_encoder"] == 0.0


def test_concepts_begin_with_their_own_weight() -> None:
    assert picker.of_names(["barn", "unicorn"], LIBRARY) == [Use("barn", weight=0.7)]


def test_those_switched_off_become_class_nouns_and_the_others_are_numbered_anew() -> None:
    uses = [Use("dog", on=False), Use("barn"), Use("cat")]
    prompt, on = form._without_those_off("a {0}, a {1} and a {2}", uses, LIBRARY)
    assert prompt == "a dog, a {0} and a {1}" and [use.name for use in on] == ["barn", "cat"]
    with pytest.raises(UserError, match="All picked concepts are switched off"):
        form._without_those_off("a {0}", [Use("dog", on=False)], LIBRARY)
    with pytest.raises(UserError, match="more places than concepts are picked"):
        form._without_those_off("a {7}", uses, LIBRARY)


def test_the_prompt_is_read_with_a_word_on_what_will_not_come_out_as_meant() -> None:
    both = picker.of_names(["dog", "barn"], LIBRARY)
    assert (
        form.read_as("a {0} by a {1}", both, LIBRARY)
        == "<p>Reads: a &lt;dog&gt; dog by a &lt;barn&gt; barn</p>"
    )
    assert "Not in the prompt: My barn." in form.read_as("a {0}", both, LIBRARY)
    assert "pick the LoRA as a concept" in form.read_as("a {0} and a {1} <lora:x:1>", both, LIBRARY)
    assert "more places than concepts" in form.read_as("a {2}", both, LIBRARY)
    same = replace(LIBRARY.concepts["barn"], trigger="<DOG> dog")
    twins = Library({**LIBRARY.concepts, "barn": same})
    assert "Several concepts have the trigger &lt;dog&gt; dog" in form.read_as("a {0} and a {1}", both, twins)
    off = [Use("dog"), Use("barn", on=False)]
    assert form.read_as("a {0} by a {1}", off, LIBRARY) == "<p>Reads: a &lt;dog&gt; dog by a barn</p>"


@pytest.mark.parametrize("prompt", ["<lora:" * 20_000, "{" + "1" * 5000 + "}", "a" * 2_000_000])
def test_a_prompt_of_any_length_is_read_at_once(prompt: str) -> None:
    """A browser's bound is not the server's: whoever sends more freezes nothing and breaks nothing."""
    began = time.process_time()
    read = form.read_as(prompt, picker.of_names(["dog"], LIBRARY), LIBRARY)
    assert time.process_time() - began < 1 and len(read) < 10_000
    assert form._without_those_off(prompt, [Use("dog"), Use("barn", on=False)], LIBRARY)[0] == prompt


def test_what_looks_like_a_lora_is_told_wherever_the_next_one_begins() -> None:
    both = picker.of_names(["dog", "barn"], LIBRARY)
    told = form.read_as("{0} {1} <lora:<lora:x:1>", both, LIBRARY)
    assert '<b class="warning">&lt;lora:x:1&gt; is read as words' in told


@pytest.mark.parametrize("shown", [True, False])
def test_only_what_stands_in_the_dials_of_ticked_methods_is_read(shown: bool) -> None:
    with gr.Blocks():
        tab = compose.layout(visits.Visits(LIBRARY), bases.find("storybook"), gr.HTML())
    asked = tab.form
    values = {widget: getattr(widget, "value", None) for widget in asked.asked}
    values[asked.words.picked] = [use.plain() for use in picker.of_names(["dog", "barn"], LIBRARY)]
    values[asked.columns.dials["iteris", "rank"]] = "abc"
    ticked = ["iteris"] if shown else ["linear"]
    values |= {
        group: [name for name in group.value if name == "base"] + [n for n in ticked if n in names]
        for group, names in zip(asked.columns.groups, asking.METHOD_GROUPS.values(), strict=True)
    }
    if shown:
        with pytest.raises(UserError, match="rank"):
            form.recipe(values, asked, LIBRARY)
    else:
        assert [use.name for use in form.recipe(values, asked, LIBRARY).merging] == ["linear"]


@pytest.mark.parametrize(
    ("many", "told"),
    [
        ({"concepts": ["dog"] * 20_000}, "Choose between 1 and 6 concepts, not 20000"),
        ({"methods": [f"m{k}" for k in range(20_000)]}, "Choose between 1 and 8 methods, not 20000"),
        ({"seeds": list(range(20_000))}, "Choose between 1 and 16 seeds, not 20000"),
    ],
)
def test_lists_are_measured_before_they_are_read(
    many: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "of", None)  # nobody looks into them
    usual: dict[str, Any] = {"concepts": ["dog"], "methods": ["linear"], "seeds": [0], "samples": 2}
    usual |= {"base": "storybook", "prompt": "a {0}", "negative": "", "steps": 2, "guidance": 4}
    with pytest.raises(UserError, match=told):
        asking.recipe(sampler="ddim", **usual | many)


@pytest.mark.parametrize(("kind", "opens"), [("PNG", True), ("WEBP", True), ("GIF", False), ("EPS", False)])
def test_only_pictures_of_the_kinds_that_concepts_have_are_shown_small(
    tmp_path: Path, kind: str, opens: bool
) -> None:
    """Pillow hands some kinds to other programs, whatever a file is called."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path, kind)
    if opens:
        assert inline.thumbnail(path, 0, 4).startswith("data:image/webp;base64,")
    else:
        with pytest.raises(OSError, match="no picture that can be opened"):
            inline.thumbnail(path, 0, 4)


def test_sets_come_with_what_is_lacking() -> None:
    samples = [row[0] for row in form.set_samples(LIBRARY, bases.find("storybook"))]
    assert samples[0] in ("Cat and barn", "Dog and barn") and any(
        "(lacks flower)" in text for text in samples
    )
    lacking = [text for text in samples if "(lacks " in text]
    assert samples[-len(lacking) :] == lacking
    assert all(form.set_named(text) is not None for text in samples)
    assert form.set_named("nonsense") is None


def test_methods_are_all_offered_once() -> None:
    offered = [name for names in asking.METHOD_GROUPS.values() for name in names]
    assert sorted(offered) == sorted(asking.METHOD_CHOICES)


# ---------------------------------------------------------------- results


def drawn(method: str, seed: int, text: float, scene: str = "") -> Drawn:
    return Drawn(scene, method, seed, Path(f"/x/{method} {seed}.png"), {"text": text, "image:dog": 0.5})


def test_a_grid_has_what_is_there_and_previews_of_what_is_not() -> None:
    preview = jobs.Preview("", {("linear", 3): "data:x"})
    shown = results.composition(recipe(), [drawn("base", 3, 0.8)], preview)
    assert [column["id"] for column in shown["columns"]] == ["base", "linear", "iteris"]
    assert [row["title"] for row in shown["rows"]] == ["3", "4"]
    assert shown["cells"]["3|base"]["url"] == "gradio_api/file=/x/base%203.png"
    assert shown["cells"]["3|base"]["alt"].startswith(
        "Base model, seed 3: a dog next to a barn. Alignment: text 0.80"
    )
    assert shown["previews"] == {"3|linear": "data:x"}
    assert results.composition(recipe(), [], jobs.Preview("dog", {("linear", 3): "x"}))["previews"] == {}


def test_retention_has_a_row_for_each_concept_and_seed() -> None:
    asked = recipe(retention=1)
    assert results.retention(recipe(), []) is None
    shown = results.retention(asked, [drawn("alone:dog", 3, 0.8, "dog"), drawn("iteris", 3, 0.7, "barn")])
    assert shown is not None
    assert [column["title"] for column in shown["columns"]] == ["Its own LoRA", "Linear", "IterIS"]
    assert [row["id"] for row in shown["rows"]] == ["dog 3", "barn 3"]
    assert [row["title"] for row in shown["rows"]] == ["dog, seed 3", "barn, seed 3"]
    assert set(shown["cells"]) == {"dog 3|own", "barn 3|iteris"}
    assert shown["cells"]["dog 3|own"]["title"] == "Its own LoRA, seed 3"


def row(method: str, low: float | None, high: float | None) -> dict[str, Any]:
    mean = 0.5 if low is None or high is None else (low + high) / 2
    return {"method": method, "measure": "text", "n": 2, "mean": mean, "low": low, "high": high}


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row("linear", 0.1, 0.3), row("iteris", 0.4, 0.6)], "iteris"),
        ([row("linear", 0.1, 0.4), row("iteris", 0.4, 0.6)], None),
        ([row("linear", 0.1, 0.5), row("iteris", 0.4, 0.6)], None),
        ([row("linear", None, None), row("iteris", None, None)], None),
        ([row("iteris", 0.4, 0.6)], None),
    ],
)
def test_a_method_is_best_only_where_its_interval_meets_no_other(
    rows: list[dict[str, Any]], best: str | None
) -> None:
    assert results._best(rows) == best
    table = results.summary(recipe(), {"scorer": "S", "summary": rows, "paired": []})
    assert table.count("<strong>") == (best is not None)


def test_the_summary_tells_differences_only_where_there_are_some() -> None:
    scores = {"scorer": "S <1>", "summary": [row("linear", 0.1, 0.3)], "paired": []}
    assert "Differences to" not in results.summary(recipe(), scores)
    assert "S &lt;1&gt;" in results.summary(recipe(), scores)
    paired = [row("iteris", -0.1, 0.3) | {"to": "linear"}]
    told = results.summary(recipe(), {**scores, "paired": paired})
    assert "Difference to Linear" in told and "+0.100" in told and "-0.10 to +0.30" in told


@pytest.mark.parametrize("several", [False, True])
def test_intervals_are_spoken_of_only_where_there_are_some(several: bool) -> None:
    ends = (0.1, 0.3) if several else (None, None)
    paired = [row("iteris", *ends) | {"to": "linear"}]
    told = results.summary(
        recipe(),
        {"scorer": "S", "summary": [row("linear", None, None), row("iteris", *ends)], "paired": paired},
    )
    assert ("95 % interval under it" in told) is ("its interval meets no other" in told) is several
    assert ("An interval that does not hold 0" in told) is several
    assert ("without an interval" in told) is ("on one seed" in told) is not several


def test_no_more_is_retained_than_there_are_seeds() -> None:
    with gr.Blocks():
        widgets = outcome.layout(gr.Button())
    shown = outcome.reopened(visits.Result(recipe(retention=1), (), None), widgets)
    slider = shown[widgets.again.retention]
    assert (slider.value, slider.maximum) == (1, 2)


def said_by(lay_out: Callable[[], object]) -> str:
    """All words of the widgets that are laid out."""
    with gr.Blocks() as page:
        lay_out()
    blocks = page.blocks.values()
    return " ".join(str(getattr(block, key, "")) for block in blocks for key in ("value", "info"))


def test_bounds_are_said_before_they_are_met() -> None:
    assert f"Each is a column of the grid; up to {limits.MAX_METHODS}." in said_by(form.columns)
    drawing = said_by(lambda: form.drawing(bases.find("storybook")))
    assert f"Each is a row of the grid; up to {limits.MAX_SEEDS}." in drawing


def test_why_says_which_methods_it_adds() -> None:
    assert "IterIS, RegMean and Linear are always compared" in said_by(why.layout)


@pytest.mark.parametrize(
    ("strength", "told"), [(1.0, "2 pictures"), (0.5, "2 pictures, strength 0.5"), (None, "2 pictures")]
)
def test_an_entry_says_how_many_pictures_and_how_strong(
    tmp_path: Path, strength: float | None, told: str
) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"")
    entry = History(tmp_path / "past").keep(recipe(strength=strength or 0.5), None, files, "done")
    if strength is None:
        (entry.folder / "recipe.json").write_text("{")
    shown = past._told(entry)
    assert shown["told"] == told
    assert shown["title"] == "a dog next to a barn · dog + barn · base, linear, iteris"


@pytest.mark.parametrize("public", [False, True])
def test_a_page_that_is_loaded_anew_points_to_the_history_where_that_stays(
    public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "public", lambda: public)
    assert ("History" in page._left()) is not public


def test_progress_tells_the_time_that_is_left() -> None:
    state = jobs.State(
        phase="running", stage="Drawing Linear, seed 3", done=5, total=20, at_once=1, left=41.7
    )
    told = results.progress(recipe(), state)
    assert "Picture 1 of 6, step 5 of 20, about 42 s left" in told
    sampling = jobs.State(phase="running", stage="Sampling <x>", done=5, total=20, left=300)
    assert "this step about 5 min left" in results.progress(recipe(), sampling)
    assert "Sampling &lt;x&gt;" in results.progress(recipe(), sampling)
    assert "2 before you" in results.progress(recipe(), jobs.State(before=2))


def test_a_clock_knows_the_rest_from_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = jobs.Clock()
    assert clock.left("Drawing", 10, 100) is None
    now[0] = 2.0
    assert clock.left("Drawing", 20, 100) == pytest.approx(16.0)
    assert clock.left("Merging", 0, 4) is None


def test_tables_of_why_escape_what_they_are_told() -> None:
    told = why.tables(
        {
            "concepts": ["<b>"],
            "served": [{"method": "linear", "residual": None, "discrepancy": 0.25, "shares": {"<b>": 0.5}}],
            "touched": [],
            "calibrated": [],
            "seconds": {"loading": 1.0},
        }
    )
    assert "<b>" not in told and "Share of &lt;b&gt;" in told and "50 %" in told and "1.00 s" in told


# ---------------------------------------------------------------- turns


class _Slow(jobs.Work):
    """Work that notes when it began and waits to be let go."""

    order: list[str] = []

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(recipe(), LIBRARY, folder)
        self.name, self.go = name, threading.Event()

    def _begin(self) -> None:
        if self._stopping.is_set():
            self.tell(phase="stopped")
            return
        self._work()

    def _work(self) -> None:
        self.order.append(self.name)
        self.go.wait(10)
        self.tell(phase="done")


def test_work_is_done_in_turn_and_what_waits_can_be_stopped_at_once(tmp_path: Path) -> None:
    _Slow.order = []
    one, two, three = (_Slow(name, tmp_path) for name in ("one", "two", "three"))
    for work in (one, two, three):
        work.start()
        time.sleep(0.05)
    assert _Slow.order == ["one"] and not two.ended
    two.stop()
    assert two.wait(5) and two.state.phase == "stopped"
    one.go.set()
    assert one.wait(5)
    three.go.set()
    assert three.wait(5)
    assert _Slow.order == ["one", "three"]


def test_an_error_inside_is_told_without_its_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = _Slow("x", tmp_path)
    monkeypatch.setattr(work, "_begin", lambda: 1 / 0)
    work.start()
    assert work.wait(5) and work.state.phase == "failed"
    assert "ZeroDivisionError" not in work.state.message and "ZeroDivisionError" in capsys.readouterr().err


# ---------------------------------------------------------------- visits


def asking_as(session: str | None) -> Any:
    return SimpleNamespace(session_hash=session)


def hold(visit: visits.Visit) -> None:
    """Put a result where a visit has its own."""
    (visit._fresh("run-") / "grid.png").touch()


def test_visits_are_told_apart_and_those_long_idle_go_with_their_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_ones = visits.Visits(LIBRARY)
    one, other = open_ones.of(asking_as("a")), open_ones.of(asking_as("b"))
    assert one is not other and open_ones.of(asking_as("a")) is one
    nameless = open_ones.of(asking_as(None)), open_ones.of(asking_as(None))
    assert nameless[0] is not nameless[1]
    assert not list(open_ones.root.iterdir())  # one that holds nothing takes no place on the disk
    for visit in (one, other):
        hold(visit)
    other.seen -= limits.MAX_IDLE_SECONDS + 1
    assert open_ones.of(asking_as("a")) is one
    for _ in range(50):
        if not other.holds:
            break
        time.sleep(0.1)
    assert one.holds and not other.holds
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.1)
    open_ones.leave(asking_as("a"))
    assert open_ones.of(asking_as("a")) is one  # it had but lost its connection
    time.sleep(0.4)
    assert open_ones.of(asking_as("a")) is one
    open_ones.leave(asking_as("a"))
    time.sleep(0.4)
    assert open_ones.of(asking_as("a")) is not one


def test_no_more_visits_than_allowed_stay_open_but_those_at_work_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VISITS", 2)
    open_ones = visits.Visits(LIBRARY)
    first = open_ones.of(asking_as("first"))
    monkeypatch.setattr(type(first), "busy", property(lambda visit: visit is first))
    for name in ("second", "third", "fourth", "fifth"):
        open_ones.of(asking_as(name))
    assert open_ones.of(asking_as("first")) is first
    assert len(open_ones._open) <= 3


def test_forged_sessions_end_no_visit_that_holds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VISITS", 4)
    open_ones = visits.Visits(LIBRARY)
    one, other = (open_ones.of(asking_as(name)) for name in ("a", "b"))
    hold(one)
    (other._folder / "concepts" / "dog").mkdir(parents=True)
    (other._folder / "concepts" / "dog" / "concept.json").touch()
    for k in range(20):
        open_ones.of(asking_as(f"forged {k}"))
    assert open_ones.of(asking_as("a")) is one and open_ones.of(asking_as("b")) is other
    assert len(open_ones._open) == 4


def test_where_every_visit_holds_something_the_new_one_is_refused_unless_one_was_idle_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_VISITS", 2)
    open_ones = visits.Visits(LIBRARY)
    one, other = (open_ones.of(asking_as(name)) for name in ("a", "b"))
    for visit in (one, other):
        hold(visit)
    with pytest.raises(gr.Error, match="2 visitors have concepts or pictures .* come back in 30 minutes"):
        open_ones.of(asking_as("c"))
    other.seen -= limits.FAIR_IDLE_SECONDS + 1
    assert open_ones.of(asking_as("c")) not in (one, other)
    assert open_ones.of(asking_as("a")) is one and "b" not in open_ones._open


def test_a_visit_that_just_brings_something_is_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VISITS", 2)
    open_ones = visits.Visits(LIBRARY)
    bringing, _ = open_ones.of(asking_as("a")), open_ones.of(asking_as("b"))
    with room.reserved(bringing._folder, 10, concepts=1):
        open_ones.of(asking_as("c"))
        assert open_ones.of(asking_as("a")) is bringing


def test_a_public_page_without_a_gpu_draws_with_storybook_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/iteris")
    monkeypatch.setattr(space, "_has_gpu", lambda: False)
    space.check(recipe())
    with pytest.raises(UserError, match="draws with Storybook only"):
        space.check(recipe(base="sd15"))
    monkeypatch.setattr(space, "_has_gpu", lambda: True)
    space.check(recipe(base="sd15"))


@pytest.mark.parametrize(
    ("given", "size"), [("", None), (None, None), (" 256 ", 256), (",", None), (512, 512)]
)
def test_an_empty_size_is_the_models_own(given: Any, size: int | None) -> None:
    assert asking.size(given) == size


def test_a_size_of_several_numbers_is_told() -> None:
    with pytest.raises(UserError, match="The size is one number"):
        asking.size("256, 512")


def test_what_no_widget_shows_is_carried_over_and_told() -> None:
    asked = recipe(strength=0.5, retention=2, calibration={"samples": 5, "seed": 9, "steps": 3})
    more = form.carried(asked)
    assert more == {"strength": 0.5, "retention": 2, "calibration": {"seed": 9, "steps": 3}}
    made = form.with_carried(recipe(calibration={"samples": 5}), more)
    assert made == asked
    assert form.with_carried(recipe(seeds=[3]), more).retention == 1
    assert form.carried(recipe()) == {} and form.told_of_carried({}) == ""
    assert "strength 0.5" in form.told_of_carried(more) and "seed 9" in form.told_of_carried(more)


def test_a_public_visitor_has_concepts_and_a_history_of_their_own(tmp_path: Path) -> None:
    public = visits.Visits(LIBRARY)
    one, other = public.of(asking_as("a")), public.of(asking_as("b"))
    assert one.history.folder != other.history.folder
    assert one.history.most < limits.MAX_HISTORY and one.history.most_bytes < limits.MAX_HISTORY_BYTES
    own = visits.Visits(LIBRARY, history=History(tmp_path))
    assert own.of(asking_as("a")).history is own.of(asking_as("b")).history


def test_scores_that_were_changed_by_hand_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    good = {"text": 0.8, "text_cosine": 0.3, "images": {}, "minimum": None, "mean": None}
    told = {
        "file": "../../a.png",
        "scene": "",
        "method": "linear",
        "seed": 3,
        "flagged": False,
        "scores": good,
    }
    (one,) = takeaway.drawn_before({"pictures": [told]}, tmp_path)
    assert one.path == tmp_path / "a.png" and one.measures == {"text": 0.8, "text_cosine": 0.3}
    assert takeaway.drawn_before({"pictures": [told | {"file": "gone.png"}]}, tmp_path) == ()
    assert takeaway.drawn_before(None, tmp_path) == ()
    for broken in ({"file": "a.png"}, told | {"scores": {"surprise": 1}}, 3):
        with pytest.raises(UserError, match="not as they are written here"):
            takeaway.drawn_before({"pictures": [broken]}, tmp_path)


@pytest.mark.parametrize(("work", "stop"), [("work", "stop"), ("draw_again", "stop"), ("why", "stop_why")])
def test_work_that_is_stopped_by_hand_is_not_told_as_broken(work: str, stop: str) -> None:
    """What is cancelled counts as failed, and the page may hear of that last."""
    made = page.build(visits.Visits(LIBRARY))
    calls = {event.api_name: event.fn for event in made.fns.values()}

    def told(name: str) -> str:
        return str([*calls[name](asking_as("a")).values()])

    assert results.BROKEN in told(f"failed_{work}")
    told(stop)
    assert results.BROKEN not in told(f"failed_{work}")
    told(f"begin_{work}")
    assert results.BROKEN in told(f"failed_{work}")
