"""What the scores of many pictures say: means by method, differences on the same seeds, and their 95 % intervals.

Intervals are Student's t over pictures, or over whatever the values are of: they take these as independent, and say
nothing of other prompts or concepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from iteris_sd.scoring import Scored, measures

BASELINE = "linear"  # what other methods are compared with: the plain average
_TAIL = 0.975  # quantile that leaves 95 % between its ends
# Of Student's t with 1, 2, 3 … degrees of freedom, where the series below is not close enough.
_FEW = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


@dataclass(frozen=True)
class Row:
    """One measure of one method: its mean over `n` pictures and the 95 % interval of it, None for one picture.

    `measure` is one of `scoring.measures`.
    """

    method: str
    measure: str
    n: int
    mean: float
    low: float | None
    high: float | None


def summarise(pictures: Iterable[Scored]) -> list[Row]:
    """Mean, n and interval of every measure by method, in the order in which the methods come."""
    values: dict[tuple[str, str], list[float]] = {}
    for picture in pictures:
        for measure, value in measures(picture.score).items():
            values.setdefault((picture.method, measure), []).append(value)
    methods = dict.fromkeys(method for method, _ in values)
    return [
        Row(method, measure, len(own), *mean_and_interval(own))
        for method in methods
        for (of, measure), own in values.items()
        if of == method
    ]


@dataclass(frozen=True)
class Paired:
    """What `method` has more than `to` of one measure: the mean over `n` seeds of their differences on the same seed.

    `low`, `high`: its 95 % interval, None for one seed.
    """

    method: str
    to: str
    measure: str
    n: int
    mean: float
    low: float | None
    high: float | None


def paired(pictures: Iterable[Scored], to: str) -> list[Paired]:
    """How every method differs from `to` in every measure, on the seeds that both have; in the methods' order.

    What a seed does to all methods alike drops out here, while it widens the intervals of `summarise`. Of each method
    and seed there is one picture; those without a score do not count. Empty when there are none of `to`.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for picture in pictures:
        found.setdefault(picture.method, {})[picture.seed] = measures(picture.score)
    theirs = found.pop(to, {})
    rows = []
    for method, own in found.items():
        differences: dict[str, list[float]] = {}
        for seed in (seed for seed in own if seed in theirs):
            for measure in (measure for measure in own[seed] if measure in theirs[seed]):
                differences.setdefault(measure, []).append(own[seed][measure] - theirs[seed][measure])
        rows += [Paired(method, to, m, len(of), *mean_and_interval(of)) for m, of in differences.items()]
    return rows


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % t interval; no interval for one value. Raises ValueError for none."""
    mean, n = fmean(values), len(values)
    if n == 1:
        return mean, None, None
    reach = t_quantile(n - 1) * stdev(values) / n**0.5
    return mean, mean - reach, mean + reach


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 2e-5: a table to ten degrees of freedom, then a series.

    The series is Cornish and Fisher's (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z, v = NormalDist().inv_cdf(_TAIL), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**k for k, term in enumerate(terms, start=1))
