"""Work as a generator is passed on whole, heard step by step, and closed whatever happens."""

from collections.abc import Generator

import pytest

from iteris_sd.generators import finish, relayed


class Work:
    """Three steps and a result; `closed` when it has ended or was given up."""

    def __init__(self) -> None:
        self.closed = False

    def steps(self) -> Generator[int, None, str]:
        try:
            yield from (1, 2, 3)
            return "done"
        finally:
            self.closed = True


def test_steps_are_heard_and_the_result_returned() -> None:
    heard: list[int] = []
    assert finish(Work().steps(), heard.append) == finish(Work().steps()) == "done"
    assert heard == [1, 2, 3]


def test_steps_are_passed_on_as_they_are_told() -> None:
    heard: list[str] = []
    assert finish(relayed(Work().steps(), str), heard.append) == "done"
    assert heard == ["1", "2", "3"]


def test_work_is_closed_when_it_is_given_up() -> None:
    work = Work()
    outer = relayed(work.steps(), str)
    next(outer)
    outer.close()
    assert work.closed


@pytest.mark.parametrize("relaying", [False, True])
def test_work_is_closed_when_hearing_it_fails(relaying: bool) -> None:
    work = Work()

    def fail(step: int) -> None:
        raise ValueError(step)

    with pytest.raises(ValueError, match="1"):
        finish(relayed(work.steps(), fail)) if relaying else finish(work.steps(), fail)
    assert work.closed
