"""A bounded map of results: the least recently asked for goes first."""

from hypothesis import given
from hypothesis import strategies as st

from iteris_sd.remembering import Shelf


def test_the_least_recently_asked_for_goes_first() -> None:
    shelf: Shelf[str] = Shelf(10)
    shelf.put("a", "A", 4)
    shelf.put("b", "B", 4)
    assert shelf.get("a") == "A"
    shelf.put("c", "C", 4)
    assert (shelf.get("a"), shelf.get("b"), shelf.get("c")) == ("A", None, "C")


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    shelf: Shelf[str] = Shelf(10)
    shelf.put("a", "A", 4)
    shelf.put("b", "B", 11)
    assert shelf.get("b") is None and shelf.get("a") == "A"
    shelf.put("a", "AA", 11)  # nor does the older one stay under its name
    assert shelf.get("a") is None
    shelf.clear()
    assert shelf.get("a") is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6)), max_size=60))
def test_it_never_holds_more_than_its_bound(puts: list[tuple[str, int]]) -> None:
    shelf: Shelf[int] = Shelf(10)
    sizes: dict[str, int] = {}
    for key, size in puts:
        shelf.put(key, size, size)
        sizes[key] = size
        kept = [key for key in sizes if shelf.get(key) is not None]
        assert sum(sizes[key] for key in kept) <= 10
        assert key in kept
