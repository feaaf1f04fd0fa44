"""What runs in a worker: a task, under the conditions that make its result that of this machine.

One thread of BLAS and of onnxruntime, as samples are run here, too; the same versions, or nothing at all.
"""

import socket
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar
from uuid import uuid4

from quarot_onnx.errors import ClusterError
from quarot_onnx.processor import described
from quarot_onnx.sessions.providers import Provider, current, running_on, version_record
from quarot_onnx.threads import limited_to, one_blas_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

_PACKAGES = ("quarot-onnx", "numpy", "scipy", "onnx-ir")


@dataclass(frozen=True)
class Context:
    """Under what conditions a task runs.

    Attributes:
        versions: What must be installed.
        provider: What onnxruntime runs models on.
    """

    versions: tuple[tuple[str, str], ...]
    provider: Provider

    @classmethod
    def here(cls) -> "Context":
        """The conditions of this process."""
        return cls(versions(), current())


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """What computes in this process; equal versions, equal results. Of this package it is the code that counts."""
    digest, root = sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root).as_posix()).encode())
        digest.update(path.read_bytes())
    found = {name: version(name) for name in _PACKAGES}
    found["quarot-onnx"] += f" (code {digest.hexdigest()[:12]})"
    return tuple((found | {"onnxruntime": str(version_record()["onnxruntime"])}).items())


def refuse_others(wanted: tuple[tuple[str, str], ...], there: tuple[tuple[str, str], ...], where: str) -> None:
    """Refuse a worker that computes with other versions than those wanted.

    Args:
        wanted: What computes where the command runs.
        there: What computes in the worker.
        where: The worker, for the message.

    Raises:
        ClusterError: They differ.
    """
    found = dict(there)
    for name, asked in wanted:
        if found.get(name) != asked:
            raise ClusterError(
                f"the worker {where} has {name} {found.get(name)}, and the command {asked}: results would differ in "
                "their last bits; install the same on both"
            )


def perform(work: Callable[[Item], Result], item: Item, context: Context) -> Result:
    """Do a task.

    Raises:
        ClusterError: Other versions are installed here.
    """
    refuse_others(context.versions, versions(), socket.gethostname())
    with limited_to(1), one_blas_thread(), running_on(context.provider):
        return work(item)


@dataclass(frozen=True)
class Question:
    """What a worker is asked before any work.

    Attributes:
        files: Files that it has to read, and their sizes.
        folder: The folder that all share; None where nothing is shared.
        token: What a file of this name there holds.
    """

    files: tuple[tuple[Path, int], ...] = ()
    folder: Path | None = None
    token: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Answer:
    """What a worker says.

    Attributes:
        host: The machine.
        versions: What is installed.
        processor: Its kind.
        unseen: A path that it cannot read as it is here, or None.
        wrote: The name of a file that it left in the shared folder.
    """

    host: str
    versions: tuple[tuple[str, str], ...]
    processor: str
    unseen: Path | None = None
    wrote: str = ""


def answer(question: Question) -> Answer:
    """Look around in a worker."""
    said = Answer(socket.gethostname(), versions(), described())
    for path, size in question.files:
        try:
            same = path.stat().st_size == size
        except OSError:
            same = False
        if not same:
            return Answer(said.host, said.versions, said.processor, path)
    if question.folder is None:
        return said
    name = f"{question.token}-{uuid4().hex}"
    try:
        if (question.folder / question.token).read_text("ascii") == question.token:
            (question.folder / name).write_text(question.token, "ascii")
            return Answer(said.host, said.versions, said.processor, None, name)
    except (OSError, ValueError):
        pass
    return Answer(said.host, said.versions, said.processor, question.folder)


_lock, _kept = RLock(), dict[str, tuple[Hashable, Any]]()


def kept(kind: str, key: Hashable, make: Callable[[], Result]) -> Result:
    """What a process keeps from task to task: of each kind the last one, made when another is asked for.

    Args:
        kind: A word.
        key: Which one.
        make: Makes it.
    """
    with _lock:
        held = _kept.get(kind)
        if held is None or held[0] != key:
            _kept.pop(kind, None)  # before the new one takes its room
            made = make()
            _kept[kind] = key, made
            return made
        found: Result = held[1]
        return found


def forget() -> None:
    """Keep nothing any more; what is being made meanwhile is not waited for."""
    _kept.clear()
