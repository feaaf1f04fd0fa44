"""Which cases `make test` leaves to `make test-further`."""

import random
from typing import Any

import further
import pytest


class Item:
    """What `further` reads and writes of a test."""

    def __init__(self, name: str) -> None:
        self.name, self.nodeid, self.marked = name, f"tests/test_a.py::{name}", False

    def add_marker(self, _marker: object) -> None:
        self.marked = True


def left(names: list[str]) -> list[str]:
    """The cases that are not marked."""
    items: list[Any] = [Item(name) for name in names]
    further.mark(items)
    return [item.name for item in items if not item.marked]


@pytest.mark.parametrize("cases", [1, 2, 3, 4, 40])
def test_a_case_of_each_stays_and_most_of_many_do_not(cases: int) -> None:
    names = [f"test_it[{number}]" for number in range(cases)]
    other = ["test_other", "test_one[a]"]
    stay = left(names + other)
    assert set(other) <= set(stay)
    kept = len(stay) - len(other)
    assert kept == cases if cases < further.MANY else 1 <= kept <= cases / 2


def test_neither_the_order_nor_other_tests_matter() -> None:
    names = [f"test_it[{number}]" for number in range(30)]
    mixed = random.Random(0).sample(names, len(names))
    assert sorted(left(names)) == sorted(left(mixed)) == sorted(set(left([*names, "test_b[0]"])) - {"test_b[0]"})


def test_the_choice_is_no_rhythm() -> None:
    """Of the cases of two parameters every value of each is taken."""
    stay = left([f"test_it[{a}-{b}]" for a in range(40) for b in (4, 8)])
    assert {name.partition("-")[2] for name in stay} == {"4]", "8]"}
