"""The algebra of LoRA values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iteris_sd.lora import LoRA, LowRank, inner, working_dtype
from tests.toys import random_adapter

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**31)


@given(sizes, sizes, st.lists(sizes, min_size=1, max_size=4), seeds)
def test_concatenation_is_the_exact_sum(out: int, width: int, ranks: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapters = [random_adapter(out, width, rank, rng) for rank in ranks]
    total = LowRank.concatenate(adapters)
    assert total.rank == sum(ranks)
    assert total.shape == (out, width)
    torch.testing.assert_close(total.delta(), torch.stack([a.delta() for a in adapters]).sum(0))


@given(sizes, sizes, sizes, st.floats(-3, 3), seeds)
def test_scaling_padding_and_applying(out: int, width: int, rank: int, c: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    adapter = random_adapter(out, width, rank, rng)
    torch.testing.assert_close(adapter.scaled(c).delta(), c * adapter.delta())
    torch.testing.assert_close(adapter.padded(rank + 3).delta(), adapter.delta())
    assert adapter.padded(rank + 3).rank == rank + 3
    x = torch.randn(2, 3, width, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(adapter.apply(x), x @ adapter.delta().T)


@given(sizes, sizes, sizes, sizes, seeds)
def test_inner_products_from_the_factors(out: int, width: int, r: int, s: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a, b = random_adapter(out, width, r, rng), random_adapter(out, width, s, rng)
    M = torch.randn(width, width, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(inner(a, b), (a.delta() * b.delta()).sum())
    torch.testing.assert_close(inner(a, b, M), (a.delta() @ M @ b.delta().T).trace())


@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-7])
def test_small_factors_keep_their_digits_in_halves(small: float) -> None:
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 30, generator=rng), small * torch.randn(20, 4, generator=rng)
    wanted, found = up @ down, LowRank(down, up).to(dtype=torch.float16)
    coarse = LowRank(down.bfloat16(), up.bfloat16())
    apart = (
        coarse.to(dtype=torch.float16).to(dtype=torch.float64).delta()
        - coarse.to(dtype=torch.float64).delta()
    )
    assert float(apart.norm() / wanted.norm()) < 1e-5  # fewer digits come whole into more
    assert found.up.dtype == found.down.dtype == torch.float16
    made = found.to(dtype=torch.float32).delta()
    assert float((made - wanted).norm() / wanted.norm()) < 1e-3
    assert not LowRank(down, 0 * up).to(dtype=torch.float16).delta().any()


def test_factors_must_fit() -> None:
    with pytest.raises(ValueError, match="expected"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="agree in shape"):
        LowRank.concatenate(
            [LowRank(torch.zeros(1, 3), torch.zeros(4, 1)), LowRank(torch.zeros(1, 2), torch.zeros(4, 1))]
        )


def test_a_lora_is_a_read_only_mapping_with_parts() -> None:
    adapter = LowRank(torch.ones(1, 3), torch.ones(2, 1))
    lora = LoRA({"unet.a": adapter, "text_encoder.b": adapter, "unet.c": adapter})
    assert list(lora) == ["unet.a", "text_encoder.b", "unet.c"]
    assert {component: list(part) for component, part in lora.parts().items()} == {
        "unet": ["unet.a", "unet.c"],
        "text_encoder": ["text_encoder.b"],
    }
    assert float(lora.scaled(0.5)["unet.a"].delta().max()) == 0.5
    assert lora.to(dtype=torch.float16)["unet.c"].up.dtype == torch.float16
    with pytest.raises(TypeError):
        lora.layers["unet.d"] = adapter  # type: ignore[index]


def test_results_are_kept_in_float32_at_least() -> None:
    half = LowRank(torch.ones(1, 3, dtype=torch.float16), torch.ones(2, 1, dtype=torch.bfloat16))
    assert working_dtype([half]) == torch.float32
    assert working_dtype([half, half.to(dtype=torch.float64)]) == torch.float64
