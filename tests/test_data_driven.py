"""The methods that look at layer inputs, beside IterIS itself, and IterIS's options, against dense references."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iteris_sd.calibration import Merged, Part, Samples, contested, finish, merge
from iteris_sd.lora import LoRA, LowRank
from iteris_sd.merging import METHODS, iteris, rank_space, regmean, regmean_pp, ssr
from iteris_sd.merging.moments import Moments
from iteris_sd.merging.solving import regularised_sum
from iteris_sd.samples import _stops
from tests.reference import layer_inputs, patched
from tests.toys import Batch, Toy, attention_stack, distance, problem, random_adapter, text_encoder, worst

EXACT = 1e-8
TOYS = {"text encoder": text_encoder(), "attention stack": attention_stack()}


@pytest.fixture(params=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]


def run(toy: Toy, loras: Sequence[LoRA], batches: Sequence[Batch], method: str, **parameters: Any) -> Merged:
    return finish(merge(toy.modules, loras, toy.samples(batches), method, parameters))


class Layer:
    """Random adapters of one layer, its inputs in each model and in the merged one, and its base weight."""

    def __init__(self, ranks: Sequence[int], seed: int, out: int = 6, width: int = 9, rows: int = 14) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.adapters = [random_adapter(out, width, rank, rng) for rank in ranks]
        self.X = [torch.randn(rows, width, generator=rng, dtype=torch.float64) for _ in ranks]
        self.X_merged = [x + 0.3 * torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in self.X]
        self.W0 = torch.randn(out, width, generator=rng, dtype=torch.float64)

    @property
    def deltas(self) -> list[Tensor]:
        return [adapter.delta() for adapter in self.adapters]

    @property
    def moments(self) -> list[Moments]:
        return [Moments.of(x, y) for x, y in zip(self.X, self.X_merged, strict=True)]


def weight(x: Tensor, W: Tensor) -> float:
    return float((W**2).sum() / ((x @ W.T) ** 2).sum())


ranks = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(ranks, st.integers(0, 999), st.floats(0.0, 0.9))
def test_regmean_pp_is_regmean_on_the_merged_models_inputs(ranks, seed, factor) -> None:
    layer = Layer(ranks, seed)
    found = regmean_pp.solve(layer.adapters, layer.moments, factor=factor).adapter
    off = torch.full((9, 9), factor, dtype=torch.float64).fill_diagonal_(1.0)
    grams = [off * (y.T @ y) for y in layer.X_merged]
    right = sum(G @ dW.T for G, dW in zip(grams, layer.deltas, strict=True))
    assert distance(found.delta(), torch.linalg.solve(sum(grams), right).T) < EXACT


@settings(deadline=None)
@given(ranks, st.integers(0, 999))
def test_rank_space_is_the_best_of_all_mixtures_of_the_factors(ranks, seed) -> None:
    """Σ λ ‖X_n ΔW_nᵀ − X̃_n (U R D)ᵀ‖² over all R, by a dense least squares for vec(R)."""
    layer = Layer(ranks, seed, out=16)
    found = rank_space.solve(layer.adapters, layer.moments, alpha=1e-13).adapter
    U = torch.cat([a.up for a in layer.adapters], dim=1)
    D = torch.cat([a.down for a in layer.adapters])
    roots = [weight(x, dW) ** 0.5 for x, dW in zip(layer.X, layer.deltas, strict=True)]
    left = torch.cat([c * torch.kron(y @ D.T, U) for c, y in zip(roots, layer.X_merged, strict=True)])
    wanted = [c * (x @ dW.T).flatten() for c, x, dW in zip(roots, layer.X, layer.deltas, strict=True)]
    R = torch.linalg.lstsq(left, torch.cat(wanted), driver="gelsd").solution.view(len(D), U.shape[1]).T
    assert distance(found.delta(), U @ R @ D) < 1e-6


@given(ranks, st.integers(0, 999), st.floats(-6, 0))
def test_ssr_is_rank_space_without_the_merged_model(ranks, seed, log_alpha) -> None:
    layer = Layer(ranks, seed)
    own = [Moments.of(x) for x in layer.X]
    wanted = rank_space.solve(layer.adapters, own, alpha=10**log_alpha, weights="uniform").adapter
    found = ssr.solve(layer.adapters, layer.moments, alpha=10**log_alpha).adapter
    assert distance(found.delta(), wanted.delta()) < EXACT


@given(ranks, st.integers(0, 999))
def test_ssr_decorrelates_what_the_loras_see_and_routes_it(ranks, seed) -> None:
    """Z_n = X_n Dᵀ; R from Σ ‖Z_n E_n − Z_n Rᵀ‖², E_n keeping what concept n's own down makes of its inputs."""
    layer = Layer(ranks, seed, out=16)
    U = torch.cat([a.up for a in layer.adapters], dim=1)
    D = torch.cat([a.down for a in layer.adapters])
    owner = torch.cat([torch.full((a.rank,), n) for n, a in enumerate(layer.adapters)])
    Z = [x @ D.T for x in layer.X]
    routed = torch.cat([z * (owner == n) for n, z in enumerate(Z)])
    R = torch.linalg.lstsq(torch.cat(Z), routed, driver="gelsd").solution.T
    found = ssr.solve(layer.adapters, layer.moments, alpha=1e-13).adapter
    assert distance(found.delta(), U @ R @ D) < 1e-6


def test_rank_space_does_not_see_how_a_lora_is_factored_or_that_rows_repeat() -> None:
    layer = Layer((2, 3), 0)
    wanted = rank_space.solve(layer.adapters, layer.moments).adapter
    other = [LowRank(100 * a.down, a.up / 100) for a in layer.adapters]
    other[0] = LowRank(torch.cat([other[0].down] * 2), torch.cat([other[0].up / 2] * 2, dim=1))
    assert distance(rank_space.solve(other, layer.moments).adapter.delta(), wanted.delta()) < EXACT


def test_where_the_loras_span_everything_rank_space_is_iteris() -> None:
    layer = Layer((5, 6), 1)
    found = rank_space.solve(layer.adapters, layer.moments, alpha=1e-3).adapter
    assert (
        distance(found.delta(), iteris.solve(layer.adapters, layer.moments, alpha=1e-3).adapter.delta())
        < EXACT
    )


def test_gradient_fusion_descends_regmeans_objective_to_its_minimum() -> None:
    layer = Layer((2, 3), 2)
    own, misses = [Moments.of(x) for x in layer.X], []
    wanted = regmean.solve(layer.adapters, own, factor=1.0).adapter.delta()

    def miss(dW: Tensor) -> float:
        return sum(float((x @ (dW - d).T).square().sum()) for x, d in zip(layer.X, layer.deltas, strict=True))

    for steps in (1, 2, 5, 20, 200):
        found = METHODS["gradient_fusion"].solve(layer.adapters, own, steps=steps).adapter
        assert found.rank <= 5
        misses.append(miss(found.delta()))
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > 1.05 * misses[-1]
    assert distance(found.delta(), wanted) < 1e-4
    assert misses[-1] == pytest.approx(miss(wanted), rel=1e-8)


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 999))
def test_custom_diffusion_is_its_constrained_least_squares(ranks, seed) -> None:
    """min ‖ΔW C_regᵀ‖² subject to ΔW Cᵀ = V, by the paper's own formula: two words of each concept."""
    layer = Layer(ranks, seed, rows=2)
    others = torch.randn(40, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    C = torch.cat(layer.X)
    V = torch.cat([x @ dW.T for x, dW in zip(layer.X, layer.deltas, strict=True)]).T
    G = regularised_sum([(1.0, others.T @ others)], 1e-6)
    d = C @ torch.linalg.inv(G)
    wanted = V @ torch.linalg.inv(d @ C.T) @ d
    found = METHODS["custom_diffusion"].solve(
        layer.adapters, [Moments.of(x) for x in layer.X], generic=Moments.of(others), slack=1e-9
    )
    assert distance(found.adapter.delta(), wanted) < 1e-5
    assert distance(found.adapter.delta() @ C.T, V) < 1e-5


@pytest.mark.parametrize("method", ["regmean_pp", "rank_space"])
def test_a_sweep_by_any_method_is_its_own_fixed_point(toy: Toy, method: str) -> None:
    """Solved anew from the inputs in the merged model, every layer comes out as it is."""
    loras, batches = problem(toy, (2, 3))
    found = run(toy, loras, batches, method).lora
    far = run(toy, loras, batches, method, iterations=12).lora
    assert worst(found, far) < EXACT


@pytest.mark.parametrize("method", ["ssr", "gradient_fusion", "regmean_pp", "rank_space"])
def test_zero_adapters_are_no_trouble(method: str) -> None:
    layer = Layer((2, 3), 3)
    for zeros in (1, 2):
        adapters = [a.scaled(0.0) if n < zeros else a for n, a in enumerate(layer.adapters)]
        found = METHODS[method].solve(adapters, layer.moments).adapter.delta()
        assert bool(found.isfinite().all())
        assert bool(found.any()) == (zeros == 1)


# IterIS's options


@settings(max_examples=40, deadline=None)
@given(ranks, st.integers(0, 999), st.floats(-4, 0), st.integers(1, 6))
def test_the_full_objective_is_its_dense_formula_cut_to_a_rank(ranks, seed, log_alpha, rank) -> None:
    layer, alpha, eye = Layer(ranks, seed), 10**log_alpha, torch.eye(9).double()
    left, right = torch.zeros(9, 9).double(), torch.zeros(9, 6).double()
    for x, y, dW in zip(layer.X, layer.X_merged, layer.deltas, strict=True):
        C, S = y.T @ x, y.T @ y
        left += weight(x, dW) * (S + alpha * torch.linalg.norm(S) * eye)
        right += weight(x, dW) * (C + alpha * torch.linalg.norm(C) * eye) @ (layer.W0 + dW).T
    wanted = torch.linalg.solve(left, right).T - layer.W0
    options = {"base": layer.W0, "alpha": alpha, "objective": "full"}
    whole = iteris.solve(layer.adapters, layer.moments, rank=6, **options)
    assert distance(whole.adapter.delta(), wanted) < EXACT
    cut = iteris.solve(layer.adapters, layer.moments, rank=rank, **options)
    U, s, Vh = torch.linalg.svd(wanted, full_matrices=False)
    assert distance(cut.adapter.delta(), (U[:, :rank] * s[:rank]) @ Vh[:rank]) < EXACT
    assert cut.truncation == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-7)


def test_the_full_objective_keeps_the_merged_models_outputs_nearer(toy: Toy) -> None:
    """What it is for: the last layer's outputs, W0's part included, are nearer those of the single models."""
    loras, batches = problem(toy, (2, 3))
    last, weight = toy.paths[-1], toy.model.get_parameter(f"{toy.paths[-1]}.weight").detach()

    def miss(merged: LoRA) -> float:
        total = 0.0
        for lora, batch in zip(loras, batches, strict=True):
            own = toy.dense(lora)
            one = layer_inputs(patched(toy.model, own), toy.run, batch, [last])[last] @ (weight + own[last]).T
            ours = toy.dense(merged)
            other = (
                layer_inputs(patched(toy.model, ours), toy.run, batch, [last])[last] @ (weight + ours[last]).T
            )
            total += float((one - other).square().sum())
        return total

    full = run(toy, loras, batches, "iteris", objective="full", rank=16, weights="uniform").lora
    adapter = run(toy, loras, batches, "iteris", weights="uniform").lora
    assert miss(full) < 0.9 * miss(adapter)


def test_an_absent_lora_speaks_for_leaving_the_layer_alone(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    first = f"{toy.component}.{toy.paths[0]}"
    partial = [loras[0], LoRA({n: a for n, a in loras[1].items() if n != first})]
    skipped = run(toy, partial, batches, "iteris").lora[first]
    assert distance(skipped.delta(), loras[0][first].delta()) < EXACT
    found = run(toy, partial, batches, "iteris", absent="zero")
    x, y = (layer_inputs(toy.model, toy.run, b, [toy.paths[0]])[toy.paths[0]] for b in batches)
    dW, eye = loras[0][first].delta(), torch.eye(x.shape[1]).double()
    S = [m + 1e-4 * torch.linalg.norm(m) * eye for m in (x.T @ x, y.T @ y)]
    lambdas = [weight(x, dW), weight(y, dW)]
    wanted = torch.linalg.solve(lambdas[0] * S[0] + lambdas[1] * S[1], lambdas[0] * S[0] @ dW.T).T
    assert distance(found.lora[first].delta(), wanted) < EXACT
    (report,) = (r for r in found.reports if r.name == first)
    assert report.participants == (0, 1)
    assert report.weights == pytest.approx(lambdas)


@pytest.mark.parametrize(
    ("method", "parameters", "factors"),
    [
        ("task_arithmetic", {"coefficients": [-1.0, 2.0], "scale": 0.5}, (-0.5, 1.0)),
        ("task_arithmetic", {"coefficients": [0.0, 1.0]}, (0.0, 1.0)),
        ("ties", {"scale": 0.0}, (0.0, 0.0)),
        ("iso_c", {"scale": 0.3}, (0.3, 0.3)),
        ("normalised", {"coefficients": [0.0, 3.0]}, (0.0, 1.0)),
        ("iteris", {"coefficients": [0.0, 3.0]}, (0.0, 1.0)),
        ("iteris", {"coefficients": [0.5, 3.0]}, (1.0, 1.0)),
        ("linear", {}, (1.0, 1.0)),
    ],
)
def test_scale_and_coefficients_hold_where_one_lora_is_alone(
    toy: Toy, method: str, parameters: dict, factors: tuple[float, float]
) -> None:
    loras, batches = problem(toy, (2, 3))
    names = list(loras[0])
    apart = [LoRA({n: lora[n] for n in (names[0], names[k + 1])}) for k, lora in enumerate(loras)]
    found = run(toy, apart, batches, method, **parameters)
    reports = {report.name: report for report in found.reports}
    for k, factor in enumerate(factors):
        own = names[k + 1]
        assert distance(found.lora[own].delta(), factor * loras[k][own].delta()) < EXACT
        assert bool(reports[own].dropped) is (factor == 0.0)


def test_an_input_changed_in_place_is_another_one_in_inference_mode_too() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.tanh_())

    torch.manual_seed(0)
    model = Changing()
    modules = {"unet.a": model.a, "unet.b": model.b}
    rng = torch.Generator().manual_seed(0)
    loras = [LoRA({name: random_adapter(6, 6, 2, rng) for name in modules}) for _ in range(2)]
    given = [3 * torch.randn(50, 6, dtype=torch.float64) for _ in range(2)]

    def feed(parts: Sequence[Part], inference: bool) -> None:
        with torch.inference_mode(inference):
            model(torch.cat([given[n][part] for n, part in parts]))

    for method in ("regmean", "iteris"):
        wanted, found = (
            finish(merge(modules, loras, Samples((50, 50), partial(feed, inference=mode)), method)).lora
            for mode in (False, True)
        )
        assert max(distance(found[n].delta(), wanted[n].delta()) for n in modules) < EXACT


@given(st.integers(1, 120), st.integers(1, 40))
def test_trajectories_are_stopped_all_along_their_way(samples: int, steps: int) -> None:
    stops = _stops(samples, steps).tolist()
    assert len(stops) == samples and 0 <= min(stops) <= max(stops) < steps
    counts = [stops.count(step) for step in range(steps)]
    assert max(counts) - min(counts) <= 1
    gaps = [later - one for one, later in pairwise(sorted({-1, steps, *stops}))]
    assert max(gaps) <= 2 * -(-steps // min(samples, steps))


@pytest.mark.parametrize("targets", ["all", "text", "text_encoder", "cross_attention"])
def test_targets_are_solved_and_the_others_averaged(toy: Toy, targets: str) -> None:
    loras, batches = problem(toy, (2, 3))
    found = run(toy, loras, batches, "iteris", targets=targets)
    mine = {
        "all": list(loras[0]),
        "text": [
            n for n in loras[0] if n.startswith("text_encoder.") or n.endswith(("attn2.to_k", "attn2.to_v"))
        ],
        "text_encoder": [n for n in loras[0] if n.startswith("text_encoder.")],
        "cross_attention": [n for n in loras[0] if n.endswith(("attn2.to_k", "attn2.to_v"))],
    }[targets]
    assert {r.name for r in found.reports if r.method == "iteris"} == set(mine)
    assert contested(loras, "iteris", {"targets": targets}) == set(mine)
    for report in found.reports:
        if report.name not in mine:
            assert report.method == "linear"
            mean = (loras[0][report.name].delta() + loras[1][report.name].delta()) / 2
            assert distance(found.lora[report.name].delta(), mean) < EXACT


def test_who_is_left_out_is_left_out_beyond_the_targets_too(toy: Toy) -> None:
    loras, batches = problem(toy, (2, 3))
    found = run(toy, loras, batches, "iteris", targets="text_encoder", coefficients=[0.0, 1.0])
    assert all(
        distance(found.lora[report.name].delta(), loras[1][report.name].delta()) < EXACT
        and report.dropped == {0: "its coefficient is 0"}
        for report in found.reports
        if report.method == "linear"
    )
    assert (toy is TOYS["text encoder"]) is not any(report.method == "linear" for report in found.reports)


def test_data_free_methods_need_inputs_of_no_layer() -> None:
    loras, _ = problem(TOYS["text encoder"], (2, 3))
    assert contested(loras, "ties", {}) == frozenset()


def test_looking_at_some_places_only_is_the_same_as_having_only_those() -> None:
    toy = TOYS["attention stack"]
    loras, batches = problem(toy, (2, 3))
    some = toy.samples(batches)
    thin = type(some)(some.rows, some.feed, some.micro_batch, positions=3)
    found = finish(merge(toy.modules, loras, thin, "regmean", {}))
    whole = run(toy, loras, batches, "regmean")
    assert worst(found.lora, whole.lora) > 1e-3
    first = toy.paths[0]
    picks = torch.randperm(6, generator=torch.Generator().manual_seed(6))[:3]
    X = []
    for lora, batch in zip(loras, batches, strict=True):
        inputs = layer_inputs(patched(toy.model, toy.dense(lora)), toy.run, batch, [first])[first]
        X.append(inputs.view(len(batch[0]), 6, -1)[:, picks].flatten(0, 1))
    name = f"{toy.component}.{first}"
    wanted = regmean.solve([lora[name] for lora in loras], [Moments.of(x) for x in X]).adapter
    assert distance(found.lora[name].delta(), wanted.delta()) < EXACT
