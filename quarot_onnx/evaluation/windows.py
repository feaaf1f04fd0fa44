"""Windows of token ids scored by a model: here, or by the workers of a cluster, with the same figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.evaluation.logits import negative_log_likelihood
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.evaluation.source import Source
from quarot_onnx.piecewise.runs import Model, Whole
from quarot_onnx.progress import Progress

_SHORTER = "where windows are longer than the model's positions, use shorter ones (--seq-len)"


@dataclass(frozen=True, eq=False)
class Windows:
    """What is scored.

    Attributes:
        source: The model.
        ids: ``[windows, tokens]``.
        brought: Tokens at the start of each window that the model brings itself.
        firsts: The first token of each window that is scored.
        decode: Tokens at the end of a window that are fed one by one.
    """

    source: Source
    ids: TokenIds
    brought: Sequence[int]
    firsts: Sequence[int]
    decode: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, places: range) -> "Windows":
        """Some of them."""
        part = slice(places.start, places.stop)
        return replace(self, ids=self.ids[part], brought=self.brought[part], firsts=self.firsts[part])


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
    runnable = windows.source.opened(model, progress)

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
    windows = replace(windows, source=windows.source.shared(model, cluster))
    count, length = windows.ids.shape
    groups = windows.source.groups(model, [length] * count, cluster.threads)
    done = 0
    for group in cluster.in_order(score_group, map(windows.some, groups)):
        done += len(group)
        if progress is not None:
            progress(done, count)
        yield from group


def score_group(windows: Windows) -> list[float]:
    """The scores of some windows, in a worker."""
    return list(_scores(windows, *windows.source.kept()))


def _scores(windows: Windows, model: Scored, runnable: Model) -> Iterator[float]:
    batches = (window[None, held:] for window, held in zip(windows.ids, windows.brought, strict=True))
    logits_of = model.logits_of(runnable, batches, _SHORTER, windows.decode)
    for (logits,), window, held, first in zip(logits_of, windows.ids, windows.brought, windows.firsts, strict=True):
        yield float(negative_log_likelihood(logits[first - held - 1 : -1], window[first:]).sum())
