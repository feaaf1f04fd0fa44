"""A model that is evaluated, and how it is run: here, or by the workers of a cluster, which keep it open meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from quarot_onnx.calibration.units import units
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.distributed.worker import kept
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model, opened
from quarot_onnx.progress import Progress

KIND = "evaluated"
"""Of what a worker keeps open: one model at a time, for one purpose."""


@dataclass(frozen=True)
class Source:
    """A model's file, and how it is run.

    Attributes:
        path: The file.
        threads: onnxruntime's intra-op threads.
        exact: Whether 8-bit products are computed exactly.
        memory: What it may take, and whether the model is run piece by piece for that.
        token: Of the run that workers keep it open for.
    """

    path: Path
    threads: int | None = None
    exact: bool = False
    memory: Memory = Memory()  # noqa: RUF009 - frozen
    token: str = ""

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

    def kept(self) -> tuple[Scored, Model]:
        """The same in a worker, which opens it once."""

        def make() -> tuple[Scored, Model]:
            model = Scored.of_text(self.path)
            return model, self.opened(model)

        return kept(KIND, self.token, make)

    def shared(self, model: Scored, cluster: Cluster) -> "Source":
        """The same for workers.

        Args:
            model: What was read of it.
            cluster: The workers.

        Raises:
            ClusterError: They do not see it, or cannot do the work.
        """
        cluster.check(model_io.input_files(model.model))
        return replace(self, path=self.path.absolute(), token=uuid4().hex)

    def groups(self, model: Scored, lengths: Sequence[int], threads: int) -> list[range]:
        """What workers run at once: some 2,048 tokens; as few groups as threads where each reads the whole model.

        Args:
            model: What was read of it.
            lengths: Tokens of each run.
            threads: Those of the workers.
        """
        if not self.memory.divides(model.model):
            return units(lengths)
        count, size = len(lengths), -(-len(lengths) // threads)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]
