"""The data-free methods against dense references, and what every method's result does not depend on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iteris_sd.calibration import finish, merge
from iteris_sd.errors import UserError
from iteris_sd.lora import LowRank
from iteris_sd.merging import METHODS, Parameter, sparsifying
from iteris_sd.merging.decomposing import decompose
from iteris_sd.merging.moments import Moments, Sums
from iteris_sd.merging.solving import Solution
from tests import dense, simulated_gpu
from tests.toys import attention_stack, distance, problem, random_adapter

EXACT = 1e-8
FREE = [name for name, method in METHODS.items() if method.needs == "none"]
CUT = [name for name in FREE if any(p.name == "rank" for p in METHODS[name].parameters)]
ENTRYWISE = [name for name in CUT if name != "svd"]


@dataclass(frozen=True)
class Case:
    """What one layer's solve is given: adapters, inputs of the layer, in the merged model too, and parameters."""

    method: str
    adapters: list[LowRank]
    X: list[Tensor]
    X_merged: list[Tensor]
    base: Tensor
    others: Tensor
    parameters: dict[str, Any]

    @property
    def deltas(self) -> list[Tensor]:
        return [adapter.delta() for adapter in self.adapters]

    @property
    def shape(self) -> tuple[int, int]:
        return self.adapters[0].shape

    @property
    def seen(self) -> Sequence[Tensor | None]:
        """X̃ of every concept, where the method looks at it."""
        return self.X_merged if METHODS[self.method].needs == "merged" else [None] * len(self.X)

    def solve(self, moments: Sequence[Moments] | None = None) -> Solution:
        method = METHODS[self.method]
        if method.needs == "none":
            return method.solve(self.adapters, None, **self.parameters)
        extra: dict[str, Any] = {"base": self.base} if method.needs_base else {}
        if method.needs == "words":
            extra["generic"] = Moments.of(self.others)
        pairs = zip(self.X, self.seen, strict=True)
        moments = moments or [Moments.of(x, y) for x, y in pairs]
        return method.solve(self.adapters, moments, **extra, **self.parameters)

    def picked(self, concepts: Sequence[int]) -> "Case":
        """The same with these concepts, and with their numbers where a parameter has one per concept."""
        scopes = {p.name: p.scope for p in METHODS[self.method].parameters}
        parameters = {
            name: [value[n] for n in concepts] if scopes[name] == "concept" and value else value
            for name, value in self.parameters.items()
        }
        return replace(
            self,
            adapters=[self.adapters[n] for n in concepts],
            X=[self.X[n] for n in concepts],
            X_merged=[self.X_merged[n] for n in concepts],
            parameters=parameters,
        )


def case(method: str, ranks: Sequence[int], shape: tuple[int, int], seed: int, /, **parameters: Any) -> Case:
    rng = torch.Generator().manual_seed(seed)
    adapters = [random_adapter(*shape, rank, rng) for rank in ranks]
    X = [torch.randn(6, shape[1], generator=rng, dtype=torch.float64) for _ in ranks]
    base = torch.randn(*shape, generator=rng, dtype=torch.float64)
    others = torch.randn(3 * shape[1], shape[1], generator=rng, dtype=torch.float64)
    X_merged = [x + 0.5 * torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in X]
    return Case(method, adapters, X, X_merged, base, others, parameters)


# Ranges that keep a random problem regular; the others are the registry's.
NARROWER = {
    "alpha": (1e-2, 1.0),
    "alpha_merged": (1e-2, 1.0),
    "factor": (0.0, 0.8),
    "coefficients": (0.25, 4.0),
    "scale": (0.25, 4.0),
    "slack": (1e-2, 1.0),
    "steps": (1, 3),  # before L-BFGS has magnified the rounding
}


def values_of(dial: Parameter, concepts: int) -> st.SearchStrategy[Any]:
    """Every value that a parameter may have, drawn from its description."""
    low, high = NARROWER.get(dial.name, (dial.low, dial.high))
    if dial.type == "choice":
        return st.sampled_from(dial.choices)
    if dial.type == "int":
        numbers: st.SearchStrategy[Any] = st.integers(int(low), int(min(high, 9)))
    else:
        numbers = st.floats(low, high)
    if dial.type == "floats":
        numbers = st.lists(numbers, min_size=concepts, max_size=concepts)
    return st.none() | numbers if dial.default is None else numbers


@st.composite
def cases(draw: st.DrawFn, method: str, rank: str = "any") -> Case:
    """Random problems for a method; ``rank`` "full" asks for results that are not cut."""
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shape = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    dials = [p for p in METHODS[method].parameters if p.scope != "run"]
    parameters = {dial.name: draw(values_of(dial, len(ranks))) for dial in dials}
    if rank == "full" and "rank" in parameters:
        parameters["rank"] = min(shape)
    return case(method, ranks, shape, draw(st.integers(0, 2**31)), **parameters)


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= EXACT * max(float(wanted.norm()), 1e-6)


# Against the papers


def dense_masks(given: Case) -> list[Tensor]:
    """Which entries DARE keeps of each adapter; what it makes of ones tells."""
    seeds = [sparsifying.seed_for(adapter, given.parameters["seed"]) for adapter in given.adapters]
    ones = torch.ones(given.shape, dtype=torch.float64)
    return [sparsifying.drop_and_rescale(ones, given.parameters["p"], seed) > 0 for seed in seeds]


def dense_dare(given: Case) -> list[Tensor]:
    pairs = zip(given.deltas, dense_masks(given), strict=True)
    return [dense.dare(dW, kept, given.parameters["p"]) for dW, kept in pairs]


def average(deltas: Sequence[Tensor]) -> Tensor:
    return dense.weighted(deltas, [1 / len(deltas)] * len(deltas))


def of_coefficients(given: Case) -> list[float]:
    return given.parameters["coefficients"] or [1.0] * len(given.deltas)


REFERENCES: dict[str, Callable[[Case], Tensor]] = {
    "linear": lambda c: average(c.deltas),
    "task_arithmetic": lambda c: c.parameters["scale"] * dense.weighted(c.deltas, of_coefficients(c)),
    "normalised": lambda c: dense.weighted(c.deltas, of_coefficients(c)) / sum(of_coefficients(c)),
    "ties": lambda c: (
        c.parameters["scale"] * dense.ties(c.deltas, c.parameters["density"], c.parameters["majority_sign"])
    ),
    "dare_linear": lambda c: c.parameters["scale"] * average(dense_dare(c)),
    "dare_ties": lambda c: (
        c.parameters["scale"]
        * dense.ties(dense_dare(c), c.parameters["density"], c.parameters["majority_sign"])
    ),
    "magnitude": lambda c: (
        c.parameters["scale"] * average([dense.trimmed(dW, c.parameters["density"]) for dW in c.deltas])
    ),
    "svd": lambda c: average(c.deltas) * (1 if c.parameters["of"] == "average" else len(c.deltas)),
    "knots": lambda c: (
        c.parameters["scale"]
        * dense.knots(c.deltas, c.parameters["density"], c.parameters["majority_sign"], c.parameters["sigma"])
    ),
    "tsv": lambda c: c.parameters["scale"] * dense.tsv(c.deltas, c.parameters["share"]),
    "iso_c": lambda c: c.parameters["scale"] * dense.iso_c(c.deltas),
}


def test_every_data_free_method_has_a_reference() -> None:
    assert list(REFERENCES) == FREE


@pytest.mark.parametrize("method", FREE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_the_paper_s_formula(method: str, data: st.DataObject) -> None:
    given = data.draw(cases(method, rank="full"))
    found = given.solve()
    assert close(found.adapter.delta(), REFERENCES[method](given))
    assert found.adapter.rank <= max(min(given.shape), sum(a.rank for a in given.adapters))
    assert len(found.weights) == len(given.adapters)
    assert found.truncation is None if method not in CUT else found.truncation == 0.0


@pytest.mark.parametrize("method", CUT)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_cut_to_the_best_of_its_rank_and_says_what_that_cost(method: str, data: st.DataObject) -> None:
    given = data.draw(cases(method))
    whole, ranks = REFERENCES[method](given), [adapter.rank for adapter in given.adapters]
    rank = given.parameters["rank"] or (max(ranks) if method == "svd" else sum(ranks))
    wanted, found = dense.cut(whole, rank), given.solve()
    assert found.adapter.rank <= rank
    assert close(found.adapter.delta(), wanted)
    missing = float((whole - wanted).norm() / whole.norm()) if whole.any() else 0.0
    assert found.truncation == pytest.approx(missing, abs=1e-8)


def test_the_report_of_a_layer_says_what_the_cut_cost() -> None:
    toy = attention_stack()
    loras, _ = problem(toy, (2, 3))
    cut = finish(merge(toy.modules, loras, None, "ties", {"rank": 3})).reports
    assert all(report.truncation is not None and 0.01 < report.truncation < 1 for report in cut)
    exact = finish(merge(toy.modules, loras, None, "knots")).reports
    assert all(report.truncation is None for report in exact)


@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_decomposition_of_an_adapter_is_that_of_its_product(ranks: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapter = LowRank.concatenate([random_adapter(5, 7, rank, rng) for rank in ranks])
    found, s = decompose(adapter), torch.linalg.svdvals(adapter.delta())
    live = min(5, sum(ranks))
    torch.testing.assert_close(found.s, s[:live])
    assert close(found.low_rank().delta(), adapter.delta())
    for Q in (found.U, found.Vh.T):
        torch.testing.assert_close(Q.T @ Q, torch.eye(live, dtype=torch.float64))


def test_ties_elects_and_averages_what_agrees() -> None:
    """The four fates of an entry, by hand: agreement, a majority in size, a majority in number, trimmed away."""
    rows = ([3.0, 5.0, 4.0, 0.1], [1.0, -1.0, -1.0, 0.2], [2.0, -1.0, -1.0, -0.1])
    adapters = [LowRank(torch.eye(4), torch.tensor([row])) for row in rows]
    total = METHODS["ties"].solve(adapters, None, density=0.75).adapter.delta()
    count = METHODS["ties"].solve(adapters, None, density=0.75, majority_sign="count").adapter.delta()
    torch.testing.assert_close(total, torch.tensor([[2.0, 5.0, 4.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(count, torch.tensor([[2.0, -1.0, -1.0, 0.0]], dtype=torch.float64))


def test_trimming_keeps_equals_together_even_where_rounding_tells_them_apart() -> None:
    D = torch.tensor([3.0, 1.0, -1.0 - 1e-15, 0.5], dtype=torch.float64)
    assert sparsifying.trim(D, 0.5).tolist() == [3.0, 1.0, -1.0 - 1e-15, 0.0]
    assert sparsifying.trim(D, 0.0).tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("sigma", ["shared", "merged"])
def test_knots_hears_no_vote_of_rounding(sigma: str) -> None:
    """LoRAs that write to different outputs do not meet in the shared basis: nothing there is halved."""
    rng = torch.Generator().manual_seed(0)
    adapters = [random_adapter(4, 6, 2, rng) for _ in range(2)]
    directions = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64)).Q.split(4, dim=1)
    apart = [LowRank(a.down, Q @ a.up) for a, Q in zip(adapters, directions, strict=True)]
    found = METHODS["knots"].solve(apart, density=1.0, sigma=sigma).adapter
    assert distance(found.delta(), apart[0].delta() + apart[1].delta()) < 1e-9


def test_tsv_and_iso_c_have_the_spectrum_they_promise() -> None:
    given = case("tsv", (3, 3), (8, 9), 0)
    kept = sorted((float(decompose(a).s[0]) for a in given.adapters), reverse=True)  # 3 // 2 of each
    assert decompose(given.solve().adapter).s.tolist() == pytest.approx(kept)
    total = decompose(LowRank.concatenate(given.adapters)).s
    flat = decompose(replace(given, method="iso_c").solve().adapter).s
    assert flat.tolist() == pytest.approx([float(total.mean())] * 6)


def test_merging_the_factors_apart_is_something_else() -> None:
    """Libraries that combine all A and all B, as PEFT's "linear" and "ties", add cross terms up_1 @ down_2."""
    rng = torch.Generator().manual_seed(0)
    adapters = [random_adapter(6, 8, 3, rng) for _ in range(2)]
    ups, downs = [a.up for a in adapters], [a.down for a in adapters]
    summed = METHODS["task_arithmetic"].solve(adapters).adapter.delta()
    apart = torch.stack(ups).sum(0) @ torch.stack(downs).sum(0)
    crossed = ups[0] @ downs[1] + ups[1] @ downs[0]
    assert distance(apart, summed) > 0.5
    assert close(apart - crossed, summed)
    elected = METHODS["ties"].solve(adapters, None, density=0.5, rank=6).adapter.delta()
    assert distance(dense.ties(ups, 0.5, "total") @ dense.ties(downs, 0.5, "total"), elected) > 0.5


# DARE's masks


def mask(adapter: LowRank, seed: int = 0, p: float = 0.5) -> Tensor:
    ones = torch.ones(adapter.shape, dtype=torch.float64)
    return sparsifying.drop_and_rescale(ones, p, sparsifying.seed_for(adapter, seed)) > 0


def test_a_concept_keeps_its_mask_at_each_layer_and_no_two_share_one() -> None:
    rng = torch.Generator().manual_seed(0)
    one, other = (random_adapter(30, 40, 2, rng) for _ in range(2))
    same = [one.scaled(0.3), one.to(dtype=torch.float32), LowRank(one.down / 7, one.up * 7)]
    assert all(torch.equal(mask(one), mask(adapter)) for adapter in same)
    for stranger in (mask(other), mask(one, seed=1)):
        assert 0.4 < float((mask(one) == stranger).double().mean()) < 0.6


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_dare_drops_its_share_and_is_right_on_average(p: float) -> None:
    adapter = random_adapter(60, 50, 2, torch.Generator().manual_seed(0))
    assert float(mask(adapter, p=p).double().mean()) == pytest.approx(1 - p, abs=0.03)
    dW = random_adapter(3, 4, 2, torch.Generator().manual_seed(1)).delta()
    draws = torch.stack([sparsifying.drop_and_rescale(dW, p, seed) for seed in range(3000)])
    spread = 5 * dW.abs() * (p / (1 - p) / 3000) ** 0.5
    assert bool(((draws.mean(0) - dW).abs() <= spread + 1e-12).all())


# What the result does not depend on

Outcome = tuple[Tensor, Tensor]


def reordered(given: Case) -> Outcome:
    other = given.picked(list(reversed(range(len(given.adapters)))))
    return other.solve().adapter.delta(), given.solve().adapter.delta()


def duplicated(given: Case) -> Outcome:
    other = given.picked(list(range(len(given.adapters))) * 2)
    return other.solve().adapter.delta(), given.solve().adapter.delta()


def rescaled(given: Case) -> Outcome:
    ups = (0.01, 30.0, 7.0, 0.3)
    adapters = [LowRank(a.down / c, a.up * c) for a, c in zip(given.adapters, ups, strict=False)]
    return replace(given, adapters=adapters).solve().adapter.delta(), given.solve().adapter.delta()


def rotated(given: Case) -> Outcome:
    rng = torch.Generator().manual_seed(5)
    width = given.shape[1]
    Q = torch.linalg.qr(torch.randn(width, width, generator=rng, dtype=torch.float64)).Q
    adapters = [LowRank(a.down @ Q, a.up) for a in given.adapters]
    other = replace(
        given,
        adapters=adapters,
        X=[x @ Q for x in given.X],
        X_merged=[x @ Q for x in given.X_merged],
        base=given.base @ Q,
        others=given.others @ Q,
    )
    return other.solve().adapter.delta(), given.solve().adapter.delta() @ Q


def in_batches(given: Case) -> Outcome:
    sums = [Sums() for _ in given.X]
    for one, x, y in zip(sums, given.X, given.seen, strict=True):
        for part in (slice(2), slice(2, None)):
            one.add(x[part], None if y is None else y[part])
    return given.solve([one.total() for one in sums]).adapter.delta(), given.solve().adapter.delta()


def on_a_gpu(given: Case) -> Outcome:
    """By a simulated one: what is given, and all that is made of it, is there."""
    with simulated_gpu.installed():
        other = replace(
            given,
            adapters=[adapter.to("cuda") for adapter in given.adapters],
            X=[x.to("cuda") for x in given.X],
            X_merged=[x.to("cuda") for x in given.X_merged],
            base=given.base.to("cuda"),
            others=given.others.to("cuda"),
        )
        found = other.solve().adapter
        assert found.down.device.type == found.up.device.type == "cuda"
        return found.delta().cpu(), given.solve().adapter.delta()


CHANGES: dict[str, Callable[[Case], Outcome]] = {
    "order": reordered,
    "batches": in_batches,
    "device": on_a_gpu,
    "duplicate": duplicated,
    "scaling": rescaled,
    "basis": rotated,
}
DECLARED = [(name, change) for name in METHODS for change in CHANGES if change in METHODS[name].invariances]
UNDECLARED = [
    (name, change) for name in METHODS for change in CHANGES if change not in METHODS[name].invariances
]
COUNTEREXAMPLES = {("svd", "duplicate"): {"of": "sum"}}  # where the defaults alone do not show it


@pytest.mark.parametrize(("method", "change"), DECLARED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_declared_invariance_holds(method: str, change: str, data: st.DataObject) -> None:
    found, wanted = CHANGES[change](data.draw(cases(method)))
    assert close(found, wanted)


@pytest.mark.parametrize(("method", "change"), UNDECLARED)
def test_what_is_not_declared_does_not_hold(method: str, change: str) -> None:
    given = case(method, (4, 4), (15, 14), 0, **COUNTEREXAMPLES.get((method, change), {}))
    found, wanted = CHANGES[change](given)
    assert distance(found, wanted) > 0.01


@pytest.mark.parametrize("method", ENTRYWISE)
def test_at_a_given_rank_a_concept_may_come_twice(method: str) -> None:
    found, wanted = duplicated(case(method, (2, 2), (9, 8), 0, rank=3))
    assert close(found, wanted)


def test_all_orders_of_three_give_the_same() -> None:
    for method in FREE:
        given = case(method, (1, 2, 3), (7, 8), 3)
        wanted = given.solve().adapter.delta()
        for order in islice(permutations(range(3)), 1, None):
            assert close(given.picked(order).solve().adapter.delta(), wanted)


# What can be wrong


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("zeros", [1, 2])
def test_zero_adapters_are_no_trouble(method: str, zeros: int) -> None:
    given = case(method, (2, 3), (6, 7), 0)
    adapters = [a.scaled(0.0) if n < zeros else a for n, a in enumerate(given.adapters)]
    found = replace(given, adapters=adapters).solve().adapter
    assert found.rank >= 1
    assert bool(found.up.isfinite().all() and found.down.isfinite().all())
    assert bool(found.delta().any()) == (zeros == 1)


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_adapters_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    given = case(method, (2, 3), (6, 7), 0)
    given.adapters[1].up[0, 0] = bad
    with pytest.raises(UserError, match="not finite"):
        given.solve()


@pytest.mark.parametrize("method", FREE)
def test_half_precision_is_merged_in_more(method: str) -> None:
    given = case(method, (2, 3), (6, 7), 0)
    halves = [adapter.to(dtype=torch.float16) for adapter in given.adapters]
    wanted = replace(given, adapters=[adapter.to(dtype=torch.float64) for adapter in halves]).solve()
    found = replace(given, adapters=halves).solve()
    assert found.adapter.up.dtype in (torch.float32, torch.float64)
    assert distance(found.adapter.delta().double(), wanted.adapter.delta()) < 1e-6


def test_a_concept_can_be_taken_away_or_left_out() -> None:
    given = case("task_arithmetic", (2, 3), (6, 7), 0, coefficients=[1.0, -0.5])
    assert close(given.solve().adapter.delta(), given.deltas[0] - 0.5 * given.deltas[1])
    without = replace(given, parameters={"coefficients": [1.0, 0.0], "scale": 2.0}).solve()
    assert close(without.adapter.delta(), 2 * given.deltas[0])
    assert (without.weights, without.dropped) == ((2.0, 0.0), {1: "its coefficient is 0"})


def test_where_all_coefficients_are_zero_the_layer_is_left_alone() -> None:
    found = case("normalised", (2, 3), (6, 7), 0, coefficients=[0.0, 0.0]).solve()
    assert not found.adapter.delta().any()
    assert set(found.dropped) == {0, 1}
