"""The merging methods and the engine that drives them, against Algorithm 1 written densely from the paper."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iteris_sd import capture
from iteris_sd.calibration import LayerReport, Merged, Part, Samples, finish, measure, measuring, merge
from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.merging import METHODS, find, iteris, linear, regmean
from iteris_sd.merging import moments as sums_of
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import adaptive_weight
from tests.reference import algorithm_1, closed_form, layer_inputs
from tests.toys import Batch, Toy, attention_stack, distance, problem, random_adapter, text_encoder, worst

TOYS = {"text encoder": text_encoder(), "attention stack": attention_stack()}
EXACT = 1e-8


@pytest.fixture(params=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]


def run(
    toy: Toy, loras: Sequence[LoRA], batches: Sequence[Batch], method: str = "iteris", **parameters
) -> Merged:
    return finish(merge(toy.modules, loras, toy.samples(batches), method, parameters))


def reference(
    toy: Toy, loras: Sequence[LoRA], batches: Sequence[Batch], alpha: float, iterations: int
) -> dict[str, Tensor]:
    return algorithm_1(toy.model, toy.run, [toy.dense(lora) for lora in loras], batches, alpha, iterations)


# One layer


@settings(max_examples=60, deadline=None)
@example(out=5, width=1, terms=[(1, 1, 1.0)], log_alpha=0.0, dtype=torch.float64, seed=214798)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    terms=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 14), st.floats(0.1, 10)), min_size=1, max_size=6
    ),
    log_alpha=st.floats(-5, 0),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_low_rank_solve_is_the_dense_closed_form(out, width, terms, log_alpha, dtype, seed) -> None:
    """Whatever dtype adapters and features come in, nothing is lost beyond what that dtype lost before."""
    rng = torch.Generator().manual_seed(seed)
    adapters = [random_adapter(out, width, rank, rng).to(dtype=dtype) for rank, _, _ in terms]
    X = [torch.randn(m, width, generator=rng, dtype=torch.float64).to(dtype) for _, m, _ in terms]
    X_merged = [x + 0.3 * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(dtype) for x in X]
    coefficients = [c for _, _, c in terms]
    moments = [Moments.of(x, y) for x, y in zip(X, X_merged, strict=True)]
    alpha = 10**log_alpha
    found = iteris.solve(adapters, moments, alpha=alpha, coefficients=coefficients)
    deltas = [a.to(dtype=torch.float64).delta() for a in adapters]
    wanted = closed_form([x.double() for x in X], [y.double() for y in X_merged], deltas, alpha, coefficients)
    assert found.adapter.rank == sum(rank for rank, _, _ in terms)
    assert distance(found.adapter.delta(), wanted) < EXACT
    assert not found.dropped


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-4, 0),
    st.floats(-4, 0),
    st.floats(0, 1),
    st.sampled_from(["adapter", "full"]),
    st.integers(0, 99),
)
def test_the_authors_options_are_their_dense_formulae(log_alpha, log_merged, rho, on, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapters = [random_adapter(6, 5, rank, rng) for rank in (1, 3)]
    X = [torch.randn(7, 5, generator=rng, dtype=torch.float64) for _ in adapters]
    X_merged = [x + 0.3 * torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in X]
    W0 = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    left, right, lambdas = torch.zeros(5, 5).double(), torch.zeros(5, 6).double(), []
    for adapter, x, y in zip(adapters, X, X_merged, strict=True):
        W = adapter.delta() + (W0 if on == "full" else 0)
        lambdas.append(float((W**2).sum() / ((x @ W.T) ** 2).sum()))
        y = (1 - rho) * y + rho * x
        C, S, eye = y.T @ x, y.T @ y, torch.eye(5).double()
        left += lambdas[-1] * (S + 10**log_merged * torch.linalg.norm(S) * eye)
        right += lambdas[-1] * (C + 10**log_alpha * torch.linalg.norm(C) * eye) @ adapter.delta().T
    found = iteris.solve(
        adapters,
        [Moments.of(x, y) for x, y in zip(X, X_merged, strict=True)],
        base=W0,
        alpha=10**log_alpha,
        alpha_merged=10**log_merged,
        adaptive_on=on,
        mix=rho,
    )
    assert distance(found.adapter.delta(), torch.linalg.solve(left, right).T) < EXACT
    assert found.weights == pytest.approx(lambdas)
    true = float(torch.linalg.cond(left))
    assert found.condition is not None and 0.3 * true < found.condition < 1.001 * true


@given(st.integers(1, 6), st.floats(-7, 0), st.integers(1, 12), st.integers(0, 2**31))
def test_a_single_adapter_comes_back_whatever_alpha(rank, log_alpha, m, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapter = random_adapter(5, 8, rank, rng)
    moments = Moments.of(torch.randn(m, 8, generator=rng, dtype=torch.float64))
    found = iteris.solve([adapter], [moments], alpha=10**log_alpha).adapter
    assert distance(found.delta(), adapter.delta()) < EXACT


def test_linear_is_the_mean_of_the_deltas_not_of_the_factors() -> None:
    rng = torch.Generator().manual_seed(0)
    adapters = [random_adapter(5, 8, 3, rng) for _ in range(3)]
    found = linear.solve(adapters).adapter
    assert distance(found.delta(), torch.stack([a.delta() for a in adapters]).mean(0)) < 1e-14
    factors = torch.stack([a.up for a in adapters]).mean(0) @ torch.stack([a.down for a in adapters]).mean(0)
    assert distance(found.delta(), factors) > 0.5


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.9])
def test_regmean_is_its_dense_formula(factor: float) -> None:
    rng = torch.Generator().manual_seed(1)
    adapters = [random_adapter(5, 8, rank, rng) for rank in (1, 2, 4)]
    X = [torch.randn(6, 8, generator=rng, dtype=torch.float64) for _ in adapters]
    off = torch.full((8, 8), factor, dtype=torch.float64).fill_diagonal_(1.0)
    grams = [off * (x.T @ x) for x in X]
    right = sum(G @ a.delta().T for G, a in zip(grams, adapters, strict=True))
    found = regmean.solve(adapters, [Moments.of(x) for x in X], factor=factor).adapter
    assert found.rank == 7
    assert distance(found.delta(), torch.linalg.solve(sum(grams), right).T) < 1e-10


def test_uniform_weights_without_regularisation_are_regmean_with_factor_one() -> None:
    rng = torch.Generator().manual_seed(2)
    adapters = [random_adapter(5, 8, rank, rng) for rank in (1, 3)]
    moments = [Moments.of(torch.randn(20, 8, generator=rng, dtype=torch.float64)) for _ in adapters]
    left = iteris.solve(adapters, moments, alpha=0.0, weights="uniform").adapter
    assert distance(left.delta(), regmean.solve(adapters, moments, factor=1.0).adapter.delta()) < 1e-10


def test_on_whitened_inputs_both_are_the_linear_average() -> None:
    rng = torch.Generator().manual_seed(3)
    adapters = [random_adapter(5, 8, rank, rng) for rank in (1, 3, 2)]
    whitened = [torch.linalg.qr(torch.randn(20, 8, generator=rng, dtype=torch.float64)).Q for _ in adapters]
    moments = [Moments.of(x) for x in whitened]
    wanted = linear.solve(adapters).adapter.delta()
    for found in (
        iteris.solve(adapters, moments, alpha=0.0, weights="uniform"),
        regmean.solve(adapters, moments, factor=1.0),
    ):
        assert distance(found.adapter.delta(), wanted) < 1e-12


def test_a_small_ridge_gets_exact_moments() -> None:
    assert not find("iteris").exact({"alpha": 1e-4, "alpha_merged": None})
    assert find("iteris").exact({"alpha": 1e-4, "alpha_merged": 1e-7})
    assert find("iteris").exact({"alpha": 1e-6})
    assert find("regmean").exact({"factor": 0.9})
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) + 1
    wanted, rough = Moments.of(x).own, Moments.of(x, exact=False).own
    assert wanted.dtype == rough.dtype == torch.float64
    torch.testing.assert_close(wanted, x.double().T @ x.double(), rtol=1e-14, atol=1e-12)
    off = float((rough - wanted).norm() / wanted.norm())
    assert 1e-12 < off < 1e-6


@pytest.mark.parametrize("small", [1e-7, 1e-3])
def test_the_engine_takes_products_as_exact_as_the_ridge_asks(small: float, monkeypatch) -> None:
    asked: list[bool] = []
    toy = TOYS["attention stack"]
    loras, batches = problem(toy, (2, 3))
    monkeypatch.setattr(capture, "Sums", _counting(asked))
    run(toy, loras, batches, alpha=small)
    assert set(asked) == {small < 1e-5}


@pytest.mark.parametrize("exact", [True, False])
def test_sums_are_those_of_all_rows_together(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_of, "ROWS", 70)  # some sums go into float64 on the way
    x, y = torch.randn(2, 200, 210, generator=torch.Generator().manual_seed(0))
    sums = sums_of.Sums(exact)
    for k in range(0, 200, 30):
        sums.add(x[k : k + 30], y[k : k + 30])
    found, wanted = sums.total(), Moments.of(x, y)
    assert (found.count, found.own.dtype) == (200, torch.float64)
    assert found.apart == pytest.approx(wanted.apart) == pytest.approx(float((x - y).square().sum()))
    for part in ("own", "cross", "merged"):
        assert distance(getattr(found, part), getattr(wanted, part)) < (1e-14 if exact else 1e-6)


@pytest.mark.parametrize("width", [191, 192, 193, 500])
def test_wide_moments_are_symmetric_and_whole(width: int) -> None:
    x, y = torch.randn(2, 30, width, dtype=torch.float64)
    found = Moments.of(x, y)
    for part, wanted in ((found.own, x.T @ x), (found.merged, y.T @ y), (found.cross, y.T @ x)):
        torch.testing.assert_close(part, wanted)
    assert torch.equal(found.own.triu(200), found.own.T.triu(200))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("blind", ["up", "samples"])
@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_a_vanished_term_is_dropped_and_reported(blind: str, exact: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapters = [random_adapter(5, 64, 2, rng) for _ in range(2)]
    X = [torch.randn(500, 64, generator=rng, dtype=torch.float64) for _ in range(2)]
    if blind == "up":
        adapters[0] = adapters[0].scaled(0.0)
    else:  # project the samples off the rows of down, so that X ΔWᵀ is mere rounding
        Q = torch.linalg.qr(adapters[0].down.T).Q
        X[0] = X[0] - X[0] @ Q @ Q.T
    moments = [Moments.of(x if exact else x.float(), exact=exact) for x in X]
    found = iteris.solve(adapters, moments)
    assert "vanishes" in found.dropped[0]
    assert found.weights[0] == 0.0
    assert distance(found.adapter.delta(), adapters[1].delta()) < EXACT


@given(rank=st.integers(1, 64), width=st.sampled_from([64, 768]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_term_that_is_small_and_there_is_kept(rank: int, width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapter = random_adapter(48, width, rank, rng).to(dtype=torch.float32).scaled(1e-6)
    X = torch.randn(60, width, generator=rng) * torch.logspace(0, -2, width)  # as unequal as inputs are
    wanted = float((X.double() @ adapter.to(dtype=torch.float64).delta().T).square().sum())
    norm = float(adapter.to(dtype=torch.float64).delta().square().sum())
    assert adaptive_weight(adapter, Moments.of(X, exact=False)) == pytest.approx(norm / wanted, rel=1e-3)


def test_nothing_left_gives_zero() -> None:
    adapters = [random_adapter(5, 8, 2, torch.Generator().manual_seed(n)).scaled(0.0) for n in range(2)]
    found = iteris.solve(adapters, [Moments.of(torch.randn(9, 8, dtype=torch.float64))] * 2)
    assert set(found.dropped) == {0, 1}
    assert not found.adapter.delta().any()


# The engine


@pytest.mark.parametrize("ranks", [(2, 3), (1, 4, 2)])
@pytest.mark.parametrize("alpha", [1e-4, 1e-2])
def test_the_sweep_is_algorithm_1_run_to_convergence(toy: Toy, ranks: tuple[int, ...], alpha: float) -> None:
    loras, batches = problem(toy, ranks)
    found = run(toy, loras, batches, alpha=alpha)
    assert found.passes == 1
    assert worst(found.lora, reference(toy, loras, batches, alpha, iterations=8)) < EXACT
    assert worst(found.lora, reference(toy, loras, batches, alpha, iterations=1)) > 1e-3


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_iterations_are_algorithm_1_step_for_step(toy: Toy, iterations: int) -> None:
    loras, batches = problem(toy, (2, 3))
    found = run(toy, loras, batches, alpha=1e-4, iterations=iterations)
    assert found.passes == iterations + 1
    assert worst(found.lora, reference(toy, loras, batches, 1e-4, iterations)) < EXACT


def test_enough_iterations_meet_the_sweep(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3, 1), seed=1)
    assert worst(run(toy, loras, batches, iterations=8).lora, run(toy, loras, batches).lora) < EXACT


def test_iterations_end_early_within_the_tolerance_and_report_each_change(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    full = run(toy, loras, batches, iterations=12)
    early = run(toy, loras, batches, iterations=12, tolerance=1e-6)
    assert full.passes == 13
    assert early.passes < 13
    assert worst(early.lora, full.lora) < 1e-5
    assert all(report.change is not None and report.change < 1e-6 for report in early.reports)
    assert all(report.change is None for report in run(toy, loras, batches).reports)
    coarse = run(toy, loras, batches, iterations=1)
    assert max(report.change or 0.0 for report in coarse.reports) > 1e-3


def test_every_layer_reports_its_balance_and_condition(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    for report in run(toy, loras, batches).reports:
        assert len(report.balance) == 2 and min(report.balance) >= 0
        assert report.condition is not None and report.condition > 1
        assert report.residual is not None and report.residual > 0


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_lora_alone_or_merged_with_itself_comes_back(toy: Toy, alpha: float, copies: int) -> None:
    (lora,), (batch,) = problem(toy, (3,))
    found = run(toy, [lora] * copies, [batch] * copies, alpha=alpha)
    assert worst(found.lora, lora) < EXACT


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_concepts_does_not_matter(toy: Toy, method: str) -> None:
    loras, batches = problem(toy, (2, 1, 3))
    few = {"steps": 2} if method == "gradient_fusion" else {}  # before it has magnified the rounding
    if find(method).needs == "words":
        pytest.skip("has samples of its own kind; see test_data_driven")
    one = run(toy, loras, batches, method, **few)
    other = run(toy, [loras[i] for i in (2, 0, 1)], [batches[i] for i in (2, 0, 1)], method, **few)
    assert worst(one.lora, other.lora) < EXACT


def test_coefficients_favour_their_concept(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    first = toy.paths[0]  # nothing is upstream of it, so that only its own solve tells
    x = layer_inputs(toy.model, toy.run, batches[0], [first])[first]

    def miss(coefficient: float) -> float:
        found = run(toy, loras, batches, coefficients=[coefficient, 1.0], alpha=1e-9).lora
        name = f"{toy.component}.{first}"
        return float((x @ (found[name].delta() - loras[0][name].delta()).T).norm())

    misses = [miss(c) for c in (1e-3, 0.1, 1.0, 10.0, 1e3)]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 0.05 * misses[0]


def test_a_coefficient_of_zero_leaves_the_concept_out(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    alone = run(toy, loras, batches, coefficients=[1.0, 0.0])
    assert all(report.dropped == {1: "its coefficient is 0"} for report in alone.reports)
    assert worst(alone.lora, loras[0]) < EXACT


@pytest.mark.parametrize("iterations", [None, 3])
def test_loras_that_touch_different_layers(toy: Toy, iterations: int | None) -> None:
    _, batches = problem(toy, (1, 1, 1))
    spans = [toy.paths[:5], toy.paths[3:8], toy.paths[4:]]
    loras = [toy.lora(2 + n, seed=n, paths=span) for n, span in enumerate(spans)]
    found = run(toy, loras, batches, iterations=iterations)
    wanted = reference(toy, loras, batches, 1e-4, iterations=8 if iterations is None else iterations)
    assert worst(found.lora, wanted) < EXACT
    participants = {report.name.partition(".")[2]: report.participants for report in found.reports}
    assert participants == {p: tuple(n for n in range(3) if p in spans[n]) for p in toy.paths}
    first = f"{toy.component}.{toy.paths[0]}"
    assert found.lora[first] is loras[0][first]


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_zeros_that_are_stored_are_as_a_layer_that_is_not_there(toy: Toy, absent: str) -> None:
    loras, batches = problem(toy, (2, 3))
    blank = next(iter(loras[0]))
    stored = LoRA({n: a.scaled(0.0) if n == blank else a for n, a in loras[0].items()})
    missing = LoRA({n: a for n, a in loras[0].items() if n != blank})
    found, wanted = (
        run(toy, [one, loras[1]], batches, absent=absent, alpha=1e-3) for one in (stored, missing)
    )
    assert worst(found.lora, wanted.lora) < EXACT
    assert {r.name: r.participants for r in found.reports} == {r.name: r.participants for r in wanted.reports}


def test_where_all_are_zero_the_layer_stays_and_is_reported(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    blank = next(iter(loras[0]))
    loras = [LoRA({n: a.scaled(0.0) if n == blank else a for n, a in lora.items()}) for lora in loras]
    found = run(toy, loras, batches)
    assert [r.name for r in found.reports if r.dropped] == [blank]
    assert all(bool(a.delta().isfinite().all()) for a in found.lora.values())


@pytest.mark.parametrize("method", ["regmean", "ssr", "iteris"])
def test_a_discrepancy_is_told_only_where_the_merged_model_was_looked_at(toy: Toy, method: str) -> None:
    loras, batches = problem(toy, (2, 3))
    reports = finish(merge(toy.modules, loras, toy.samples(batches), method)).reports
    found = [report.discrepancy for report in reports if report.method == method]
    assert len(found) > 3 and all((one is not None) == (method == "iteris") for one in found)


@pytest.mark.parametrize("parameters", [{}, {"iterations": 2}])
def test_a_callers_autocast_changes_nothing(toy: Toy, parameters: dict) -> None:
    loras, batches = problem(toy, (2, 3))
    loras = [lora.to(dtype=torch.float32) for lora in loras]
    wanted = run(toy, loras, batches, alpha=1e-2, **parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(toy, loras, batches, alpha=1e-2, **parameters)
    assert worst(found.lora, wanted.lora) == 0.0


@pytest.mark.parametrize(
    ("around", "parameters"),
    [("counted", {}), ("inference", {}), ("inference", {"iterations": 1}), ("compiled", {})],
)
def test_samples_may_run_in_any_way(toy: Toy, around: str, parameters: dict) -> None:
    loras, batches = problem(toy, (2, 3))
    plain = toy.samples(batches, 2)
    whole: Any = torch.compile(toy.model, backend="eager")

    def feed(parts: Sequence[Part]) -> None:
        if around == "counted":
            with FlopCounterMode(display=False):
                plain.feed(parts)
        elif around == "inference":
            with torch.inference_mode():
                plain.feed(parts)
        else:
            chosen = [tuple(tensor[part] for tensor in batches[n]) for n, part in parts]
            toy.run(whole, tuple(torch.cat(tensors) for tensors in zip(*chosen, strict=True)))

    torch._dynamo.reset()
    found = finish(
        merge(toy.modules, loras, replace(plain, feed=feed), "iteris", {"alpha": 1e-2, **parameters})
    )
    wanted = finish(merge(toy.modules, loras, plain, "iteris", {"alpha": 1e-2, **parameters}))
    assert worst(found.lora, wanted.lora) < EXACT


def test_what_adapters_take_is_not_what_samples_hold(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    wanted = finish(merge(toy.modules, loras, toy.samples(batches, 2), "iteris")).frontier
    doubles = [lora.to(dtype=torch.float32) for lora in loras]
    assert finish(merge(toy.modules, doubles, toy.samples(batches, 2), "iteris")).frontier == wanted > 0


def test_a_concept_without_a_layer_is_weighed_by_what_others_do_to_it_if_they_do_anything() -> None:
    rng = torch.Generator().manual_seed(0)
    adapters = [random_adapter(6, 64, 2, rng), LowRank(torch.zeros(0, 64), torch.zeros(6, 0))]
    Q = torch.linalg.qr(adapters[0].down.T).Q
    X = [torch.randn(500, 64, generator=rng, dtype=torch.float64) for _ in adapters]
    X[1] = X[1] - X[1] @ Q @ Q.T
    for exact in (True, False):
        moments = [Moments.of(x if exact else x.float(), exact=exact) for x in X]
        found = iteris.solve(adapters, moments)
        assert found.weights[1] == 0.0 and distance(found.adapter.delta(), adapters[0].delta()) < 1e-3


def test_a_layer_that_a_merge_leaves_out_is_measured_as_zero(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    made = run(toy, loras, batches).lora
    left = next(iter(made))
    reports = measure(
        toy.modules, loras, LoRA({n: a for n, a in made.items() if n != left}), toy.samples(batches)
    )
    assert {report.name: report.residual for report in reports}[left] == pytest.approx(1.0)


def test_layers_fed_by_the_same_tensor_share_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = TOYS["attention stack"]
    loras, batches = problem(toy, (2, 3))
    made: list[bool] = []
    monkeypatch.setattr(capture, "Sums", _counting(made))
    run(toy, loras, batches)
    # Per block: q, k, v of attn1; its out; q of attn2; its out. And the text, once for both blocks.
    assert len(made) == 2 * (2 * 4 + 1)


def _counting(made: list[bool]):
    """Sums that are noted when they are begun, and how exact they are."""

    def counted(exact: bool) -> sums_of.Sums:
        made.append(exact)
        return sums_of.Sums(exact)

    return counted


def test_reports_tell_how_well_it_fits_and_measure_agrees(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    samples = toy.samples(batches)
    sweep = run(toy, loras, batches)
    measured = measure(toy.modules, loras, sweep.lora, samples)
    for told, seen in zip(sweep.reports, measured, strict=True):
        assert told.name == seen.name
        assert told.weights == pytest.approx(seen.weights)
        assert told.residual == pytest.approx(seen.residual)
        assert told.discrepancy == pytest.approx(seen.discrepancy, abs=1e-6)

    def total(reports: Sequence[LayerReport]) -> float:
        return sum(report.residual or 0.0 for report in reports)

    average = measure(toy.modules, loras, run(toy, loras, batches, "linear").lora, samples)
    assert total(measured) < 0.9 * total(average)
    # Nothing is upstream of the first layer.
    assert sweep.reports[0].discrepancy == pytest.approx(0.0, abs=1e-6)
    assert (sweep.reports[-1].discrepancy or 0.0) > 0.01


def test_measuring_in_several_passes_tells_the_same(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    merged, samples = run(toy, loras, batches).lora, toy.samples(batches)
    whole = measure(toy.modules, loras, merged, samples)
    steps = []
    work = measuring(toy.modules, loras, merged, samples, most_bytes=1)
    while True:
        try:
            steps.append(next(work))
        except StopIteration as stop:
            found = stop.value
            break
    assert {step.steps for step in steps} == {len(whole)}  # a pass for each layer
    assert [report.name for report in found] == [report.name for report in whole]
    for one, other in zip(found, whole, strict=True):
        assert one.residual == pytest.approx(other.residual)
        assert one.discrepancy == pytest.approx(other.discrepancy)


def test_single_precision_stays_close(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    wanted = run(toy, loras, batches, alpha=1e-3).lora
    narrow = [tuple(t.float() if t.is_floating_point() else t for t in batch) for batch in batches]
    toy.model.float()
    try:
        found = run(toy, [lora.to(dtype=torch.float32) for lora in loras], narrow, alpha=1e-3).lora
    finally:
        toy.model.double()
    assert {a.down.dtype for a in found.values()} == {torch.float32}
    assert worst(found.to(dtype=torch.float64), wanted) < 1e-3


def test_data_free_methods_need_no_samples(toy: Toy) -> None:
    loras, _ = problem(toy, (2, 3))
    found = finish(merge(toy.modules, loras, None, "linear"))
    assert found.passes == 0
    for name, adapter in found.lora.items():
        assert distance(adapter.delta(), (loras[0][name].delta() + loras[1][name].delta()) / 2) < 1e-14


def test_without_a_sweep_the_model_may_run_several_times(toy: Toy) -> None:
    loras, halves = problem(toy, (2, 3))
    _, others = problem(toy, (2, 3), seed=5)
    whole = [
        tuple(torch.cat(pair) for pair in zip(a, b, strict=True)) for a, b in zip(halves, others, strict=True)
    ]
    parts = [toy.samples(halves), toy.samples(others)]

    def feed(chosen: Sequence[Part]) -> None:
        for part in parts:
            part.feed(chosen)

    twice = Samples(parts[0].rows, feed)
    for method, parameters in (("regmean", {}), ("iteris", {"iterations": 2})):
        found = finish(merge(toy.modules, loras, twice, method, parameters))
        assert worst(found.lora, run(toy, loras, whole, method, **parameters).lora) < EXACT
    with pytest.raises(UserError, match="twice in one sweep"):
        finish(merge(toy.modules, loras, twice, "iteris"))


def test_progress_comes_with_each_micro_batch_and_layer_and_stopping_leaves_the_model_clean(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    work = merge(toy.modules, loras, toy.samples(batches), "iteris", {"iterations": 3})
    each = 2 + len(toy.modules)
    told = [next(work) for _ in range(2 * each)]
    assert [(p.step, p.steps) for p in told] == [(0, 4)] * each + [(1, 4)] * each
    work.close()
    assert not any(module._forward_hooks for module in toy.modules.values())


@pytest.mark.parametrize("method", ["linear", "ties", "svd"])
def test_without_samples_progress_comes_with_each_layer(toy: Toy, method: str) -> None:
    loras, _ = problem(toy, (2, 3))
    told = [(p.step, p.steps) for p in merge(toy.modules, loras, None, method)]
    assert told == [(k, len(toy.modules)) for k in range(len(toy.modules))]


def test_a_sweep_can_be_stopped_anywhere_and_leaves_neither_hooks_nor_threads(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    for steps in (1, 2, 5, 9):
        work = merge(toy.modules, loras, toy.samples(batches, micro_batch=1), "iteris")
        for _ in range(steps):
            next(work)
        work.close()
        assert not any(module._forward_hooks for module in toy.modules.values())
        assert not [thread for thread in threading.enumerate() if thread.name == "pausable"]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
@pytest.mark.parametrize("parameters", [{}, {"iterations": 2}])
def test_micro_batches_change_nothing(toy: Toy, micro_batch: int, parameters: dict[str, Any]) -> None:
    loras, batches = problem(toy, (2, 3, 1))
    cut = toy.samples(batches, micro_batch)
    found = finish(merge(toy.modules, loras, cut, "iteris", parameters))
    assert worst(found.lora, run(toy, loras, batches, **parameters).lora) < EXACT
    own = finish(merge(toy.modules, loras, cut, "regmean"))
    assert worst(own.lora, run(toy, loras, batches, "regmean").lora) < EXACT
    for one, other in zip(
        measure(toy.modules, loras, found.lora, cut),
        measure(toy.modules, loras, found.lora, toy.samples(batches)),
        strict=True,
    ):
        assert one.residual == pytest.approx(other.residual)


def test_a_sweep_sees_no_more_than_a_micro_batch_at_once(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    samples, rows = toy.samples(batches, micro_batch=2), []

    def feed(parts: Sequence[Part]) -> None:
        rows.append(sum(part.stop - part.start for _, part in parts))
        samples.feed(parts)

    finish(merge(toy.modules, loras, replace(samples, feed=feed), "iteris"))
    assert max(rows) == 4 and sum(rows) == 2 * sum(samples.rows)  # X and X̃ side by side, every sample once


# What can go wrong


def test_a_singular_system_names_the_layer(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    few = [tuple(t[:1] for t in batch) for batch in batches]
    with pytest.raises(
        UserError, match=rf"Layer {toy.component}\.\S+ cannot be merged: .*singular.*regularisation"
    ):
        run(toy, loras, few, alpha=0.0)
    assert not any(module._forward_hooks for module in toy.modules.values())


@pytest.mark.parametrize("method", ["iteris", "regmean"])
def test_a_non_finite_system_names_the_layer(toy: Toy, method: str) -> None:
    loras, batches = problem(toy, (2, 3))
    name = f"{toy.component}.{toy.paths[3]}"
    broken = [
        LoRA({n: a.scaled(float("inf")) if n == name else a for n, a in lora.items()}) for lora in loras
    ]
    with pytest.raises(UserError, match=rf"Layer {toy.component}\.\S+ cannot be merged: .*not finite"):
        run(toy, broken, batches, method)


def test_loras_must_fit_the_model(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    name = next(iter(loras[1]))
    misfit = LoRA({name: LowRank(torch.zeros(1, 3), torch.zeros(2, 1))})
    with pytest.raises(UserError, match="LoRA 2 does not fit .*: it is 2 × 3"):
        run(toy, [loras[0], misfit], batches)
    with pytest.raises(UserError, match="LoRA 2 touches unet.nowhere, which this model does not have"):
        run(toy, [loras[0], LoRA({"unet.nowhere": loras[1][name]})], batches)
    with pytest.raises(UserError, match="only linear layers and plain convolutions"):
        finish(
            merge(
                {**toy.modules, name: torch.nn.Conv2d(2, 2, 1, groups=2)},
                loras,
                toy.samples(batches),
                "iteris",
            )
        )
    with pytest.raises(UserError, match="nothing to merge"):
        run(toy, [], [])


def test_samples_must_reach_every_contested_layer_with_all_rows(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    samples = toy.samples(batches)
    for parameters in ({}, {"iterations": 1}):
        with pytest.raises(UserError, match=f"do not reach {len(toy.paths)} of the layers"):
            finish(merge(toy.modules, loras, replace(samples, feed=lambda parts: None), "iteris", parameters))
    with pytest.raises(UserError, match="rows where the samples have"):
        finish(
            merge(toy.modules, loras, replace(samples, feed=lambda parts: samples.feed(parts[:1])), "iteris")
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1}, "alpha must lie between 0 and 1"),
        ({"alpha": float("nan")}, "alpha must be a number"),
        ({"alpha": "much"}, "alpha must be a number"),
        ({"iterations": 2.5}, "iterations must be a whole number"),
        ({"iterations": 10**6}, "iterations must lie between"),
        ({"weights": "equal"}, "weights must be one of adaptive, uniform"),
        ({"coefficients": [0, 0]}, "must not all be zero"),
        ({"coefficients": [1, -1]}, "coefficients must lie between 0"),
        ({"coefficients": [1, 1, 1]}, "one number per concept, 2, not 3"),
        ({"lambda": 1}, "IterIS has no parameter 'lambda'"),
    ],
)
def test_parameters_are_checked(parameters: dict, message: str) -> None:
    toy = TOYS["text encoder"]
    loras, batches = problem(toy, (2, 3))
    with pytest.raises(UserError, match=message):
        run(toy, loras, batches, **parameters)


def test_the_registry_lists_the_methods_without_torch() -> None:
    assert [name for name, method in METHODS.items() if method.needs == "own"] == [
        "regmean",
        "gradient_fusion",
        "ssr",
    ]
    assert [name for name, method in METHODS.items() if method.needs == "words"] == ["custom_diffusion"]
    assert [name for name, method in METHODS.items() if method.needs == "merged"] == [
        "regmean_pp",
        "rank_space",
        "iteris",
    ]
    assert all(name == method.name for name, method in METHODS.items())
    assert find("iteris").validate({"alpha": 1}) == {
        "alpha": 1.0,
        "alpha_merged": None,
        "weights": "adaptive",
        "adaptive_on": "adapter",
        "mix": 0.0,
        "objective": "adapter",
        "rank": None,
        "coefficients": None,
        "absent": "skip",
        "targets": "all",
        "iterations": None,
        "tolerance": 0.0,
    }
    with pytest.raises(UserError, match=f"no merging method 'tie'; choose one of {', '.join(METHODS)}"):
        find("tie")
    code = "import sys, iteris_sd.merging; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
