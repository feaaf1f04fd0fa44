"""Schedulers and workers that are not there, not alike, or lost: one line that tells what and what to do."""

import asyncio
import builtins
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import exports
import pytest
from command_line import Shell
from distributed import Client, LocalCluster
from worker_tasks import Item, always_fatal, slow, square

from quarot_onnx.distributed import cluster as cluster_module
from quarot_onnx.distributed import worker
from quarot_onnx.distributed.cluster import Cluster, connected
from quarot_onnx.distributed.worker import Context, Question, answer, kept
from quarot_onnx.errors import ClusterError, ConfigError, FeedError, MissingPackageError

pytestmark = [pytest.mark.xdist_group("cluster")]


@pytest.fixture
def model() -> Path:
    return exports.optimum_export("llama")


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{held.getsockname()[1]}"


def test_results_come_in_order_though_a_worker_dies(client: Client, tmp_path: Path) -> None:
    items = [Item(number, tmp_path, fatal=number == 5) for number in range(12)]
    assert list(Cluster(client).in_order(square, items)) == [number**2 for number in range(12)]
    assert (tmp_path / "killed").exists()


def test_what_is_not_wanted_any_more_is_cancelled(client: Client, tmp_path: Path) -> None:
    results = Cluster(client).in_order(square, (Item(number, tmp_path) for number in range(1000)))
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert not client.futures


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_no_scheduler(
    command: str, shell: Shell, model: Path, text: Path, nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "_CONNECT", 0.3)
    rest = {
        "quantize": (model, tmp_path / "o" / "m.onnx", "--weights", "gptq", "--w-bits", 4, "--calib-samples", 2,
                     "--calib-seq-len", 24, "--calib-text", text),
        "evaluate": (model, "--text", text, "--windows", 2, "--seq-len", 24),
    }[command]  # fmt: skip
    said = shell.fails(command, *rest, "--scheduler", nobody)
    assert f"no scheduler answers at {nobody}; give the address of a Dask scheduler that runs" in said
    assert "'nowhere' is no address of a scheduler" in shell.fails(command, *rest, "--scheduler", "nowhere")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("address", ["nowhere", "http://host:1", "tls://127.0.0.1:1", ""])
def test_what_is_no_address(address: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"is no address of a scheduler \(.*\); give the address of a Dask"),
        connected(address),
    ):
        pass


def test_something_else_answers(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    monkeypatch.setattr(cluster_module, "_CONNECT", 0.3)
    other = next(iter(client.nthreads()))
    with pytest.raises(ClusterError, match=f"at {other} is a Worker of Dask"), connected(other):
        pass
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no scheduler answers"), connected(address):
            pass


def test_inside_an_event_loop(address: str) -> None:
    """As in a notebook."""

    async def ask() -> int:
        with connected(address) as cluster:
            assert cluster is not None
            return cluster.threads

    assert asyncio.run(ask()) == 2


def test_what_is_no_scheduler() -> None:
    given: Any = 8786
    with pytest.raises(ConfigError, match="scheduler is a int"), connected(given):
        pass


def test_dask_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "distributed":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"pip install 'quarot-onnx\[distributed\]'"), connected("tcp://a:1"):
        pass


def test_other_versions(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tuple((name, "1.2.3" if name == "onnxruntime" else found) for name, found in worker.versions())
    monkeypatch.setattr(worker, "versions", lambda: mine)
    with pytest.raises(
        ClusterError, match=r"has onnxruntime \d.*, and the command 1\.2\.3: .*install the same on both"
    ):
        Cluster(client).check()
    # A worker that comes later is met by its first task.
    with pytest.raises(ClusterError, match="install the same on both"):
        list(Cluster(client).in_order(square, [Item(1, tmp_path)]))


def test_a_refused_worker_leaves_no_file(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tuple((name, "1.2.3" if name == "onnxruntime" else found) for name, found in worker.versions())
    monkeypatch.setattr(worker, "versions", lambda: mine)
    with pytest.raises(ClusterError, match="install the same on both"):
        Cluster(client).check([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_versions_tell_code_apart() -> None:
    found = dict(worker.versions())
    assert set(found) == {"quarot-onnx", "numpy", "scipy", "onnx-ir", "onnxruntime"}
    assert "(code " in found["quarot-onnx"]


def test_other_processors_are_noted(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(client)
    cluster.check()
    assert cluster.notes == ()
    monkeypatch.setattr(cluster_module, "described", lambda: "another one")
    cluster.check()
    (note,) = cluster.notes
    assert note.startswith("the workers and this machine have processors of different kinds (")
    assert "another one" in note


def test_a_path_that_a_worker_does_not_see(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"1234")
    Cluster(client).check([file], tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    for wrong in (Question(((file, 5),)), Question(((tmp_path / "none", 4),))):
        assert answer(wrong).unseen == wrong.files[0][0]
    assert answer(Question(folder=tmp_path)).unseen == tmp_path, "nothing of ours lies there"

    def elsewhere(files: Any, folder: Path | None) -> Question:
        return Question(tuple((path, size + 1) for path, size in files), folder)

    monkeypatch.setattr(cluster_module, "Question", elsewhere)
    with pytest.raises(
        ClusterError, match=r"a worker on .* does not see .*model\.onnx as it is on .*under the same path"
    ):
        Cluster(client).check([file])


@pytest.mark.further
def test_folders_that_are_not_shared(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(files: Any, folder: Path) -> Question:
        return Question(files, folder.parent / "of another machine")

    monkeypatch.setattr(cluster_module, "Question", elsewhere)
    with pytest.raises(ClusterError, match="does not see"):
        Cluster(client).check([], tmp_path)


def test_no_workers_and_workers_that_all_die(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster_module, "_WORKERS", 0.3)
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.comm.timeouts.connect": "1s"}
    with (
        dask.config.set(settings),
        LocalCluster(
            processes=True, n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as own,
    ):
        none = pytest.raises(ClusterError, match=r"has no workers after 0.3 s; start some: dask worker tcp")
        with none, connected(own.scheduler_address):
            pass
        own.scale(1)
        with Client(own.scheduler_address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=180)
            with pytest.raises(ClusterError, match="took down 1 workers, one after the other: look into their logs"):
                list(Cluster(client).in_order(always_fatal, [Item(0, tmp_path)]))
            client.wait_for_workers(1, timeout=180)
            tasks = Cluster(client).in_order(slow, [Item(0, tmp_path)])
            threading.Timer(0.5, lambda: own.sync(own.scheduler.close)).start()
            with pytest.raises(ClusterError, match="is lost; start it again, and run the same command"):
                next(tasks)


def test_an_error_comes_back_as_it_was() -> None:
    error = pickle.loads(pickle.dumps(FeedError("an input that no rule can feed", "leave it")))
    assert (str(error), error.reason) == ("an input that no rule can feed; leave it", "an input that no rule can feed")


def test_one_thing_of_each_kind_is_kept() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    for name in ("a", "a", "b", "a"):
        assert kept("letter", name, lambda name=name: make(name)) == name
    assert made == ["a", "b", "a"]
    worker.forget()
    kept("letter", "a", lambda: make("a"))
    assert len(made) == 4
    worker.forget()
    assert Context.here().versions == worker.versions()


def test_options(shell: Shell, model: Path, text: Path, address: str, tmp_path: Path) -> None:
    """The command line as it is typed, with a scheme that no worker helps with."""
    evaluate = ("evaluate", model, "--text", text, "--windows", 4, "--seq-len", 24, "--json")
    here, there = shell.ok(*evaluate).json, shell.ok(*evaluate, "--scheduler", address).json
    assert here["nll"] == there["nll"]
    quantize = ("--calib-text", text, "--calib-samples", 3, "--calib-seq-len", 24, "--no-check", "--quiet")
    for name, more in (("here", ()), ("there", ("--scheduler", address))):
        shell.ok("quantize", model, tmp_path / name / "m.onnx", "--weights", "gptq", "--w-bits", 4, *quantize, *more)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    said = shell.ok("quantize", model, tmp_path / "w8", "--scheme", "w8", "--no-check", "--scheduler", address).err
    assert "nothing is calibrated that workers can help with: --scheduler not used" in said
    assert (tmp_path / "w8").exists()
