"""How much memory a run may take, and which models are run piece by piece for that."""

import ctypes
import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
from pydantic import Field, field_validator

from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError
from quarot_onnx.io.halves import HALVES
from quarot_onnx.io.nodes import all_graphs

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_OPEN = 1.25  # of a model's weights as float32: what onnxruntime, NumPy and activations take beside them
_PIECE, _STATES = 256 << 20, 256 << 20
_BASE, QUANTIZING = 250 * 10**6, 300 * 10**6
"""What a process has beside one weight: libraries, the graph, what goes from piece to piece, what is not given back at
once; and what quantizing adds, which is texts, tokenizer, and predictions that are compared."""


class Memory(Strict):
    """What a run may take, and how it runs models.

    Attributes:
        limit: Bytes; None for what the machine has available when it is asked.
        by_stages: Whether models are run piece by piece; None where they would not fit otherwise.

    Raises:
        ConfigError: The limit is no number of bytes.
    """

    positional = ("limit", "by_stages")

    limit: Annotated[int, Field(ge=1)] | None = None
    by_stages: Annotated[bool, Field(strict=True)] | None = None

    @field_validator("limit", mode="before")
    @classmethod
    def _of_bytes(cls, value: object) -> object:
        if isinstance(value, bool | str):
            raise ValueError("need a number of bytes, or None; Memory.of reads words such as '8GB'")  # noqa: TRY004 - becomes a ConfigError
        return value

    @property
    def bytes(self) -> int | None:
        """The bytes that are there; None where the system does not tell."""
        return available() if self.limit is None else self.limit

    @property
    def piece(self) -> int:
        """Bytes of weights of a piece, as float32."""
        return max(1, min(_PIECE, (self.bytes or 8 * _PIECE) // 8))

    @property
    def states(self) -> int:
        """Bytes of what goes from piece to piece that are kept in memory; the rest goes to disk."""
        return min(_STATES, (self.bytes or 32 * _STATES) // 32)

    def notes(self, model: ir.Model, more: int = 0, light: Collection[ir.TensorProtocol] = ()) -> tuple[str, ...]:
        """What to say of a limit that cannot be kept, as one weight alone takes more: when it is run, or written.

        Args:
            model: The float model.
            more: Bytes that the process needs beside weights, more than a rotation does, when it runs the model.
            light: Weights of which no 32-bit copy is made in one piece, see ``panels.light``.
        """
        needs = {
            tensor: max(more + (tensor.nbytes if tensor in light else weight_bytes(tensor)), 2 * tensor.nbytes)
            for tensor in _tensors(model)
        }
        if self.limit is None or not needs:
            return ()
        largest = max(needs, key=lambda tensor: needs[tensor])
        needed = _BASE + needs[largest]
        if needed <= self.limit:
            return ()
        shape = "x".join(map(str, largest.shape.numpy()))
        note = (
            f"--max-memory of {self.limit / 1e6:.0f} MB cannot be kept: the process takes some {needed / 1e6:.0f} MB "
            f"where it has {largest.name!r}, {shape} {largest.dtype.name.lower()}, in memory"
        )
        return (note,)

    def divides(self, model: ir.Model) -> bool:
        """Whether a model is run piece by piece."""
        return not self.holds(model) if self.by_stages is None else self.by_stages

    def holds(self, model: ir.Model, copies: int = 1) -> bool:
        """Whether a model fits whole, its weights so many times."""
        there = self.bytes
        return there is None or copies * _OPEN * opened_bytes(model) <= there

    @classmethod
    def of(cls, words: str | None, by_stages: bool | None) -> "Memory":
        """What options ask for: words such as ``1GB``, ``800 MiB`` or ``2000000000``, None for no limit of theirs.

        Raises:
            ConfigError: The words are no amount of memory.
        """
        if words is None:
            return cls(by_stages=by_stages)
        text = words.strip().lower()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        try:
            size = int(float(digits) * _UNITS[text[len(digits) :].strip()])
        except (ValueError, KeyError, OverflowError):
            size = 0
        if size < 1:
            raise ConfigError(f"--max-memory {words!r} is no size: give bytes, or a number with MB, GB, MiB or GiB")
        return cls(limit=size, by_stages=by_stages)


WHOLE = Memory(by_stages=False)
"""Every model is run whole."""


def opened_bytes(model: ir.Model) -> int:
    """The bytes of a model's weights in a session: onnxruntime computes with 16-bit floats as 32-bit ones on a CPU."""
    return sum(map(weight_bytes, _tensors(model)))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """What the initializers of a model hold, those of subgraphs too."""
    values = (value.const_value for graph in all_graphs(model) for value in graph.initializers.values())
    return (tensor for tensor in values if tensor is not None)


def weight_bytes(tensor: ir.TensorProtocol) -> int:
    """The same of one tensor; 16-bit weights lie beside their copies."""
    return tensor.nbytes * 3 if tensor.dtype in HALVES else tensor.nbytes


def give_back() -> None:
    """Return what was freed to the system, where the C library keeps it (glibc): it lies between what is still held."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on Windows
        return None


def available() -> int | None:
    """The bytes of memory that this process can get without swapping; None where the system does not tell."""
    found = [size for size in (_free(), _of_group()) if size is not None]
    return min(found, default=None)


def _free() -> int | None:
    """What the system has available, or at least has."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _of_group() -> int | None:
    """What a container's limit leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None
