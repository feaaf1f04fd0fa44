"""Windows of token ids scored by a model: here, or by the workers of a cluster, with the same figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.calibration.units import units
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.distributed.worker import kept
from quarot_onnx.evaluation.logits import negative_log_likelihood
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model, Whole, opened
from quarot_onnx.progress import Progress

_SHORTER = "where windows are longer than the model's positions, use shorter ones (--seq-len)"


@dataclass(frozen=True, eq=False)
class Windows:
    """What is scored, and how the model is run.

    Attributes:
        path: The model's file.
        ids: ``[windows, tokens]``.
        firsts: The first token of each window that is scored.
        decode: Tokens at the end of a window that are fed one by one.
        threads: onnxruntime's intra-op threads.
        exact: Whether 8-bit products are computed exactly.
        memory: What it may take, and whether the model is run piece by piece for that.
        token: Of the run.
    """

    path: Path
    ids: TokenIds
    firsts: Sequence[int]
    decode: int = 0
    threads: int | None = None
    exact: bool = False
    memory: Memory = Memory()  # noqa: RUF009 - frozen
    token: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def opened(self, model: Scored, progress: Progress | None = None) -> Model:
        """The model ready to run; the progress is of one that is run piece by piece."""
        return opened(
            self.path,
            self.memory,
            model=model.model,
            threads=self.threads,
            exact_products=self.exact,
            progress=progress,
        )

    def some(self, places: range) -> "Windows":
        """Some of them."""
        part = slice(places.start, places.stop)
        return replace(self, ids=self.ids[part], firsts=tuple(self.firsts[part]))


def scores(windows: Windows, model: Scored, progress: Progress | None = None) -> Iterator[float]:
    """The negative log likelihood of each window's scored tokens, in nats; the model is opened at once.

    Args:
        windows: The windows.
        model: What was read of the model.
        progress: Called with the windows done and their number; of a model run piece by piece those of every piece.

    Raises:
        FeedError: The model cannot be run on them.
        ModelError: It has no logits of every token.
    """
    runnable = windows.opened(model, progress)

    def run() -> Iterator[float]:
        for number, score in enumerate(_scores(windows, model, runnable), start=1):
            if progress is not None and isinstance(runnable, Whole):
                progress(number, len(windows))
            yield score

    return run()


def spread_scores(
    windows: Windows, model: Scored, cluster: Cluster, progress: Progress | None = None
) -> Iterator[float]:
    """The same by the workers of a cluster; each opens the model once.

    Args:
        windows: The windows.
        model: What was read of the model.
        cluster: The workers, which see its files.
        progress: Called with the windows done and their number.

    Raises:
        ClusterError: The workers cannot do it.
        QuarotError: As for ``scores``.
    """
    cluster.check(model_io.input_files(model.model))
    windows = replace(windows, path=windows.path.absolute(), token=uuid4().hex)
    count, length = windows.ids.shape
    groups = units([length] * count)
    if windows.memory.divides(model.model):  # each group reads the whole model: as few of them as there are threads
        size = -(-count // cluster.threads)
        groups = [range(start, min(start + size, count)) for start in range(0, count, size)]
    done = 0
    for group in cluster.in_order(score_group, map(windows.some, groups)):
        done += len(group)
        if progress is not None:
            progress(done, count)
        yield from group


def score_group(windows: Windows) -> list[float]:
    """The scores of some windows, in a worker."""

    def make() -> tuple[Scored, Model]:
        model = Scored.of_text(windows.path)
        return model, windows.opened(model)

    model, runnable = kept("evaluated", windows.token, make)
    return list(_scores(windows, model, runnable))


def _scores(windows: Windows, model: Scored, runnable: Model) -> Iterator[float]:
    brought = [model.brought(window) for window in windows.ids]
    batches = (window[None, held:] for window, held in zip(windows.ids, brought, strict=True))
    every = zip(
        model.logits_of(runnable, batches, _SHORTER, windows.decode), windows.ids, brought, windows.firsts, strict=True
    )
    for (logits,), window, held, first in every:
        yield float(negative_log_likelihood(logits[first - held - 1 : -1], window[first:]).sum())
