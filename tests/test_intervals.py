"""What the scores of many pictures say: summaries, differences on the same seeds, intervals."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iteris_sd import intervals, scoring
from iteris_sd.intervals import Paired, Row
from iteris_sd.scoring import Score


@dataclass(frozen=True)
class Made:
    """A picture as `summarise` and `paired` need it."""

    method: str
    score: Score
    seed: int = 0


def random_score(rng: np.random.Generator) -> Score:
    text, *each = rng.uniform(-0.2, 1, 7).tolist()
    return Score.of(
        text, *({"dog": dog, "barn": barn} for dog, barn in zip(each[::2], each[1::2], strict=True))
    )


def test_a_summary_agrees_with_numpy():
    rng = np.random.default_rng(1)
    made = [Made(method, random_score(rng)) for method in ("iteris", "linear") for _ in range(5)]
    rows = {(row.method, row.measure): row for row in intervals.summarise(made[5:] + made[:5])}
    assert list(dict.fromkeys(method for method, _ in rows)) == ["linear", "iteris"]
    measures = {
        "text": lambda s: s.text,
        "text_cosine": lambda s: s.text_cosine,
        "image:dog": lambda s: s.images["dog"],
        "image:barn": lambda s: s.images["barn"],
        "minimum": lambda s: s.minimum,
        "mean": lambda s: s.mean,
        "crop:dog": lambda s: s.crops["dog"],
        "crop:barn": lambda s: s.crops["barn"],
        "crop_minimum": lambda s: min(s.crops["dog"], s.crops["barn"]),
        "dino:dog": lambda s: s.dino["dog"],
        "dino:barn": lambda s: s.dino["barn"],
    }
    assert list(scoring.measures(made[0].score)) == list(measures)
    assert set(rows) == {(method, measure) for method in ("iteris", "linear") for measure in measures}
    for (method, measure), row in rows.items():
        values = np.array([measures[measure](m.score) for m in made if m.method == method])
        reach = 2.776445 * values.std(ddof=1) / np.sqrt(5)  # Student's t, four degrees of freedom
        assert row.n == 5
        assert row.mean == pytest.approx(values.mean())
        assert (row.low, row.high) == pytest.approx((values.mean() - reach, values.mean() + reach))


def test_one_picture_has_a_mean_and_no_interval():
    rows = intervals.summarise([Made("base", Score.of(0.4, {}))])
    assert rows == [Row("base", "text", 1, 1.0, None, None), Row("base", "text_cosine", 1, 0.4, None, None)]


def test_a_summary_of_nothing_is_empty():
    assert intervals.summarise([]) == []


def test_differences_are_taken_on_the_seeds_that_both_have():
    of_linear = [Made("linear", Score.of(text, {}), seed) for seed, text in ((0, 0.9), (1, 0.2), (2, 0.3))]
    of_iteris = [Made("iteris", Score.of(text, {}), seed) for seed, text in ((2, 0.7), (1, 0.5), (3, -1.0))]
    text, cosine = intervals.paired([*of_iteris, *of_linear], "linear")
    # Differences 0.4 and 0.3: mean 0.35, deviation √0.005; t is 12.7062 for one degree of freedom.
    reach = 12.706205 * np.sqrt(0.005) / np.sqrt(2)
    assert (cosine.method, cosine.to, cosine.measure, cosine.n) == ("iteris", "linear", "text_cosine", 2)
    assert cosine.mean == pytest.approx(0.35)
    assert (cosine.low, cosine.high) == pytest.approx((0.35 - reach, 0.35 + reach))
    assert text.measure == "text" and text.mean == pytest.approx(2.5 * 0.35)


def test_one_seed_has_a_difference_and_no_interval():
    made = [Made("base", Score.of(0.5, {"dog": 0.25})), Made("linear", Score.of(0.25, {"dog": 0.5}))]
    rows = intervals.paired(made, "linear")
    expected = {"text": 0.625, "text_cosine": 0.25, "image:dog": -0.25, "minimum": -0.25, "mean": -0.25}
    assert rows == [Paired("base", "linear", name, 1, mean, None, None) for name, mean in expected.items()]


def test_what_has_no_partner_has_no_difference():
    one = Score.of(0.5, {})
    assert intervals.paired([], "linear") == []
    assert intervals.paired([Made("base", one), Made("iteris", one)], "linear") == []
    assert intervals.paired([Made("linear", one)], "linear") == []
    assert intervals.paired([Made("base", one, 1), Made("linear", one, 2)], "linear") == []
    unscored = [Made("base", scoring.UNSCORED), Made("linear", one)]
    assert intervals.paired(unscored, "linear") == intervals.paired(unscored[::-1], "base") == []
    made = [Made("base", Score.of(0.5, {"dog": 1.0}), 1), Made("linear", one, 1), Made("linear", one, 2)]
    assert [row.measure for row in intervals.paired(made, "linear")] == ["text", "text_cosine"]


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_differences_turn_round_and_do_not_see_what_seeds_have_in_common(seed, n):
    rng = np.random.default_rng(seed)
    texts, common = rng.uniform(0.2, 0.4, (2, n)), rng.uniform(0, 0.5, n)

    def made(shift: np.ndarray) -> list[Made]:
        return [
            Made(method, Score.of(float(text), {}), k)
            for method, own in zip(("linear", "iteris"), texts + shift, strict=True)
            for k, text in enumerate(own)
        ]

    there, back = intervals.paired(made(0 * common), "linear"), intervals.paired(made(0 * common), "iteris")
    shifted = intervals.paired(made(common), "linear")
    summary = {(row.method, row.measure): row.mean for row in intervals.summarise(made(0 * common))}
    for one, other, third in zip(there, back, shifted, strict=True):
        assert one.mean == pytest.approx(summary["iteris", one.measure] - summary["linear", one.measure])
        told, back_again, common_to_both = (
            np.array([row.mean, row.low, row.high], dtype=float) for row in (one, other, third)
        )
        assert told == pytest.approx(-back_again[[0, 2, 1]])
        assert told == pytest.approx(common_to_both, abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (15, 2.1314), (30, 2.0423), (120, 1.9799)],
)
def test_the_t_quantile_agrees_with_the_printed_table(freedom, printed):
    assert intervals.t_quantile(freedom) == pytest.approx(printed, abs=6e-5)
