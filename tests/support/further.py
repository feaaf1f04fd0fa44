"""Which tests `make test` leaves to `.ci/run`: further cases of tests that have many, and runs that take long.

A test with cases for every export, every width and every option is a minute for what one of its cases mostly tells.
`make test` takes one of eight, chosen by its name alone, the same one everywhere; `.ci/run` takes them all.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest

MANY = 2
"""A test with so many cases has further ones."""

OF = 8
"""One case of so many is taken."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark the further cases of every test (marker ``further``); one of each test stays, whatever the names are."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        if len(cases) < MANY:
            continue
        stays = min(cases, key=lambda item: (_drawn(item), item.nodeid))
        for case in cases:
            if case is not stays and _drawn(case):
                case.add_marker(pytest.mark.further)


def _drawn(item: pytest.Item) -> int:
    """A number below ``OF``, by the name of the case; 0 is taken."""
    return zlib.crc32(item.name.encode()) % OF
