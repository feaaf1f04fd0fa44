"""One cluster of two processes for all tests of this folder that follow each other.

It goes with the last of them: workers without work take a tenth of a processor each.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

_HERE = Path(__file__).parent
_open: list[LocalCluster] = []


@pytest.fixture
def address() -> str:
    if not _open:
        cluster = LocalCluster(
            processes=True, n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
        )
        _open.append(cluster)
    found = _open[0].scheduler_address
    assert isinstance(found, str)
    return found


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None or _HERE not in nextitem.path.parents:
        while _open:
            _open.pop().close()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=180)
        yield client
