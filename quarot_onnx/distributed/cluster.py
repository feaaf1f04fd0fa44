"""A Dask scheduler and its workers: who is there, whether they can do the work, and tasks whose results come in order.

Tasks are pure functions of what lies on storage that all share, so that Dask may do one again when its worker is lost.
Nothing but paths, small configuration and statistics goes over the network.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from quarot_onnx.distributed.worker import Answer, Context, Question, answer, forget, perform, refuse_others
from quarot_onnx.errors import ClusterError, ConfigError, MissingPackageError
from quarot_onnx.processor import described

if TYPE_CHECKING:
    import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

_CONNECT, _WORKERS = 10, 30
"""Seconds to wait for a scheduler, and for its first worker."""

BYTES, FLOPS = 1e9, 25e9
"""Each second, over the network or from storage, and of products in a thread: what machines of today have."""

_AHEAD = 2
"""Tasks for each thread of the workers that are on their way: more hold more results in the workers' memory."""


class Cluster:
    """The workers of a scheduler."""

    def __init__(self, client: "distributed.Client") -> None:
        """Use a client, which is connected."""
        self._client = client
        self._address = client.scheduler.address
        self.notes: tuple[str, ...] = ()
        """What the user should know of the workers."""

    def check(self, files: Sequence[Path] = (), folder: Path | None = None) -> None:
        """Refuse workers that cannot do the work, or would do it otherwise than this process.

        Args:
            files: What they have to read.
            folder: A folder that they have to share with us.

        Raises:
            ClusterError: There are none; other versions; a path that one of them cannot see.
        """
        question = Question(tuple((path.absolute(), path.stat().st_size) for path in files), folder)
        if folder is not None:
            (folder / question.token).write_text(question.token, "ascii")
        context, answers = Context.here(), dict[str, Any]()
        try:
            answers |= self._ask(question)
            for address, said in answers.items():
                _refuse(address, said, context)
                if folder is not None and not (folder / said.wrote).is_file():
                    raise _unseen(said.host, folder)
        finally:
            if folder is not None:
                for name in (question.token, *(getattr(said, "wrote", "") for said in answers.values())):
                    if name:
                        (folder / name).unlink(missing_ok=True)
        kinds = sorted({described(), *(said.processor for said in answers.values())})
        if len(kinds) > 1:
            note = (
                f"the workers and this machine have processors of different kinds ({'; '.join(kinds)}): what they "
                "compute may differ in its last bits from what one kind computes alone"
            )
            self.notes = (note,)

    def in_order(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Do tasks on the workers.

        Args:
            work: A function of a module, pure but for what it leaves on shared storage.
            items: What it is given.

        Yields:
            The results, in the order of the items; no more than some of them wait for those before.

        Raises:
            ClusterError: The scheduler is lost, or a task takes down every worker that tries it.
            QuarotError: What a task raises.
        """
        left, waiting = iter(items), deque[Any]()
        context, name = Context.here(), f"quarot-{getattr(work, '__name__', 'work')}-{uuid4().hex[:8]}"
        number = 0
        try:
            while True:
                for item in islice(left, max(_AHEAD * self.threads - len(waiting), 0)):
                    key = f"{name}-{number}"
                    waiting.append(self._client.submit(perform, work, item, context, key=key, pure=False))
                    number += 1
                if not waiting:
                    return
                yield self._result(waiting[0])
                waiting.popleft().release()
        finally:
            if waiting:
                with suppress(Exception):
                    self._client.cancel(list(waiting), force=True)

    def forget(self) -> None:
        """Let the workers close what they have open."""
        with suppress(Exception):
            self._client.run(forget)

    @property
    def threads(self) -> int:
        """How many tasks are done at once, at least one."""
        with self._told():
            threads: Mapping[str, int] = self._client.nthreads()
        return max(sum(threads.values()), 1)

    def _result(self, future: Any) -> Any:
        with self._told():
            return self._client.gather(future, direct=True)

    def _ask(self, question: Question) -> Mapping[str, Any]:
        """What every worker says."""
        with self._told():
            try:
                self._client.wait_for_workers(1, timeout=_WORKERS)
            except TimeoutError as error:
                raise ClusterError(
                    f"the scheduler {self._address} has no workers after {_WORKERS} s; start some: "
                    f"dask worker {self._address}"
                ) from error
            found: Mapping[str, Any] = self._client.run(answer, question, on_error="return")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell in our words what befalls a cluster."""
        from distributed import KilledWorker  # noqa: PLC0415 - optional
        from distributed.comm import CommClosedError  # noqa: PLC0415

        try:
            yield
        except KilledWorker as error:
            raise ClusterError(
                f"a task took down {error.allowed_failures + 1} workers, one after the other: look into their logs; "
                "where it was memory, give each more of it, or fewer threads"
            ) from error
        except (CancelledError, asyncio.CancelledError, CommClosedError) as error:
            raise ClusterError(
                f"the scheduler {self._address} is lost; start it again, and run the same command"
            ) from error


@contextmanager
def connected(scheduler: "str | distributed.Client | None") -> Iterator[Cluster | None]:
    """The workers of a scheduler, until the end.

    Args:
        scheduler: Its address (``tcp://host:8786``), or a client of it, which stays open; None for none.

    Raises:
        ConfigError: It is neither.
        MissingPackageError: Dask.distributed is not installed.
        ClusterError: There is no such scheduler, or it has no workers that can do the work.
    """
    if scheduler is None:
        yield None
        return
    try:
        import distributed  # noqa: PLC0415 - optional
    except ImportError as error:
        raise MissingPackageError(
            "a scheduler needs Dask.distributed; `pip install 'quarot-onnx[distributed]'` brings it"
        ) from error
    given = isinstance(scheduler, distributed.Client)
    if not given and not isinstance(scheduler, str):
        raise ConfigError(f"scheduler is a {type(scheduler).__name__}: give an address such as tcp://host:8786")
    client = scheduler if isinstance(scheduler, distributed.Client) else _client(scheduler)
    cluster = Cluster(client)
    try:
        cluster.check()
        yield cluster
    finally:
        cluster.forget()
        if not given:
            with suppress(Exception):
                client.close()


def _client(address: str) -> "distributed.Client":
    """A client of a scheduler that is there: Dask's own leaves a traceback where none is."""
    import distributed  # noqa: PLC0415 - optional

    async def identity() -> Mapping[str, Any]:
        tls = distributed.Security().get_connection_args("client")  # as Dask's configuration says
        async with distributed.rpc(address, timeout=_CONNECT, connection_args=tls) as other:
            found: Mapping[str, Any] = await asyncio.wait_for(other.identity(), _CONNECT)
            return found

    way = "give the address of a Dask scheduler that runs, such as tcp://host:8786"
    try:
        with ThreadPoolExecutor(1) as pool:  # there may be an event loop in this thread
            kind = pool.submit(asyncio.run, identity()).result().get("type")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{address!r} is no address of a scheduler ({_line(error)}); {way}") from error
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"no scheduler answers at {address}; {way}") from error
    if kind != "Scheduler":
        raise ClusterError(f"at {address} is a {kind} of Dask; {way}")
    try:
        return distributed.Client(address, timeout=_CONNECT, set_as_default=False)
    except OSError as error:
        raise ClusterError(f"no scheduler answers at {address}; {way}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refuse(address: str, said: Answer | BaseException, context: Context) -> None:
    """Refuse a worker that cannot do the work."""
    if isinstance(said, BaseException):
        raise ClusterError(
            f"the worker {address} cannot run quarot_onnx ({type(said).__name__}: {said}); install the same as here"
        ) from said
    refuse_others(context.versions, said.versions, f"{address} on {said.host}")
    if said.unseen is not None:
        raise _unseen(said.host, said.unseen)


def _unseen(host: str, path: Path) -> ClusterError:
    return ClusterError(
        f"a worker on {host} does not see {path} as it is on {socket.gethostname()}: model and output have to lie on "
        "storage that all of them share, under the same path"
    )
