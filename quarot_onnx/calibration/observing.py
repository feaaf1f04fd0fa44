"""Activations looked at while a model runs over calibration samples, in bounded memory.

The graph gets extra outputs and loses all others (no logits, no caches, nothing that only they needed). What is reduced
to scalars in the graph never leaves onnxruntime; what is wanted whole is for ``fetching``.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import onnx_ir as ir

from quarot_onnx.calibration.checked import CheckedReader, DataReader, wrap
from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.inputs import FLOATS
from quarot_onnx.calibration.padding import Padding, Sample
from quarot_onnx.calibration.sample import check_feeds, check_ids, run_sample
from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.graph.parts import drop_unused
from quarot_onnx.piecewise.cuts import Piece
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.piecewise.sweep import Arrays, Run, Sweep
from quarot_onnx.progress import Progress
from quarot_onnx.sessions.skeleton import open_augmented

ROW_PEAKS = "RowPeaks"
"""What `observing_session` makes of a tensor under this name: max|x| along its last axis."""

_AXES_AS_INPUT = 18  # the opset from which on ReduceMax takes them so


Observation = Callable[[Sample], list[Any]]
"""Runs one sample, looks at it, and gives the outputs that are kept."""


class Observer(Protocol):
    """Looks at activations."""

    @property
    def names(self) -> Sequence[str]:
        """The activations."""

    def on(self, model: ir.Model, names: Sequence[str], kept: Sequence[str] = (), *, part: bool = False) -> Observation:
        """Open a model, or a piece of one.

        Args:
            model: The model.
            names: What is looked at here.
            kept: Outputs of it that are given back.
            part: It is a piece, so that little is computed in it.
        """


def observe_samples(
    observer: Observer,
    model: ir.Model,
    reader: DataReader,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    decoding: Decoding | None = None,
    memory: Memory = WHOLE,
    first: int = 0,
    name: str = "",
) -> None:
    """Show an observer the samples of a reader, their padding taken off.

    Args:
        observer: Who looks.
        model: The model; its large weights are external.
        reader: Any calibration reader.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample, or where the model is run piece by piece after every run through a piece.
        decoding: Makes the decode steps that are shown behind every sample; None for none.
        memory: Whether the model is run piece by piece.
        first: The number of the first sample, for messages.
        name: The class of the reader that they come from, for messages; by default that of the reader.

    Raises:
        CalibrationError: A reader that is empty or does not fit the model's inputs.
    """
    if max_samples is not None and max_samples < 1:
        raise CalibrationError(f"max_samples {max_samples} leaves nothing to calibrate on: ask for 1 or more")
    samples = _Samples(model, wrap(reader), max_samples, decoding, first=first, name=name)
    if memory.divides(model):
        _observe_pieces(observer, model, samples, progress, memory)
        return
    kept = () if decoding is None else decoding.kept
    observe = observer.on(model, observer.names, kept)
    for count, parts in enumerate(samples, 1):
        left: list[Arrays] = []
        for part in parts:
            taken = {name: item.of(left[-item.back][item.output]) for name, item in part.carried.items()}
            found = observe(replace(part, feeds={**part.feeds, **taken}))
            left.append({} if part.carried else dict(zip(kept, found, strict=True)))
        if progress is not None:
            progress(count, samples.total)


class _Samples:
    """What is run of each sample of a reader."""

    def __init__(
        self,
        model: ir.Model,
        reader: CheckedReader,
        limit: int | None,
        decoding: Decoding | None,
        *,
        first: int,
        name: str,
    ) -> None:
        self._limit = None if limit is None or limit > sys.maxsize else limit
        self._model, self._reader, self._decoding = model, reader, decoding
        self._first, self._name = first, name or reader.name
        self._padding = Padding(model)
        total = reader.size
        self.total = total if total is None or limit is None else min(total, limit)

    def __iter__(self) -> Iterator[Iterator[Sample]]:
        count = 0
        for count, feeds in enumerate(islice(self._reader, self._limit), 1):
            check_feeds(feeds, self._model)
            number = self._first + count - 1
            check_ids(self._padding.tokens(feeds, number), self._name, number)
            yield self._parts(feeds, count - 1)
        if count == 0:
            raise self._reader.empty()

    def _parts(self, feeds: Feeds, number: int) -> Iterator[Sample]:
        number += self._first
        if self._decoding is None:
            yield from self._padding.samples(feeds, number)
            return
        parts = list(self._padding.samples(feeds, number))
        yield from (*parts, *self._decoding.samples(feeds, number, parts))


def _observe_pieces(
    observer: Observer, model: ir.Model, samples: "_Samples", progress: Progress | None, memory: Memory
) -> None:
    """Take all samples through one piece of the model after the other."""
    find_values(model, observer.names)
    shown = [part for parts in samples for part in parts]
    runs = [Run(part.feeds, part.carried) for part in shown]
    done = 0

    def visit(piece: Piece) -> Callable[[int, Arrays], list[Any]]:
        observe = observer.on(piece.model, piece.observed, piece.outputs, part=True)

        def run(number: int, feeds: Arrays) -> list[Any]:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, None)
            return observe(replace(shown[number], feeds=dict(feeds)))

        return run

    with Sweep(model, runs, memory, wide=True) as sweep:
        for _ in sweep.through(visit, observed=observer.names):
            pass


def run_observing(session: Any, sample: Sample, observed: int, kept: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What an observing session puts out: so many values that are looked at, none of a silent sample; what is kept."""
    names = [output.name for output in session.get_outputs()]
    looked_at = [] if sample.silent else names[:observed]
    fetched = [*looked_at, *kept]
    found = run_sample(session, sample.feeds, sample.number, fetched) if fetched else []
    return found[: len(looked_at)], found[len(looked_at) :]


def observing_session(
    model: ir.Model, names: Sequence[str], ops: Sequence[str | None], threads: int | None, kept: Sequence[str] = ()
) -> Any:
    """A session whose outputs are what each op (None: the tensor itself) makes of each tensor, as float32.

    Outputs of the model that are ``kept`` come behind them.
    """
    model = model.clone()
    graph, values = model.graph, find_values(model, names)
    staying = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    for number, value in enumerate(values):
        stem = f"quarot_calibration/{number}"
        # The cast also gives every observed tensor an output of its own, whatever its name or use.
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{stem}/cast")
        nodes = [cast]
        for op in ops:
            if op is None:
                output = cast.outputs[0]
            elif op == ROW_PEAKS:
                nodes += _row_peaks(model, cast.outputs[0], stem)
                output = nodes[-1].outputs[0]
            else:
                attributes = {} if op == "Size" else {"keepdims": 0}
                node = ir.node(op, [cast.outputs[0]], attributes, name=f"{stem}/{op}")
                nodes.append(node)
                output = node.outputs[0]
                output.shape = ir.Shape([])
            output.name = f"{stem}/{op or 'value'}"
            output.dtype = ir.DataType.INT64 if op == "Size" else ir.DataType.FLOAT
            graph.outputs.append(output)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], nodes)
        else:
            graph.insert_after(producer, nodes)
    graph.outputs.extend(staying[name] for name in kept)
    drop_unused(graph)
    return open_augmented(model, threads=threads)


def _row_peaks(model: ir.Model, value: ir.Value, stem: str) -> list[ir.Node]:
    """Nodes that take max|x| along the last axis."""
    magnitude = ir.node("Abs", [value], name=f"{stem}/Abs")
    inputs, attributes = [magnitude.outputs[0]], {"keepdims": 0}
    if model.graph.opset_imports[""] >= _AXES_AS_INPUT:
        axes = ir.Value(name=f"{stem}/axes", const_value=ir.tensor([-1], name=f"{stem}/axes"))
        model.graph.register_initializer(axes)
        return [magnitude, ir.node("ReduceMax", [*inputs, axes], attributes, name=f"{stem}/ReduceMax")]
    return [magnitude, ir.node("ReduceMax", inputs, attributes | {"axes": [-1]}, name=f"{stem}/ReduceMax")]


def find_values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    """The values of these names.

    Raises:
        CalibrationError: An unknown or non-float one.
    """
    known = {value.name: value for value in model.graph.inputs}
    known |= {output.name: output for node in model.graph for output in node.outputs}
    for name in names:
        if name in model.graph.initializers or name not in known:
            kind = "a weight" if name in model.graph.initializers else "not in the graph"
            hint = did_you_mean(name, (other for other in known if other))
            raise CalibrationError(f"tensor {name!r} is {kind}: ranges are taken of activations{hint}")
        dtype = known[name].dtype
        if dtype is not None and dtype not in FLOATS:
            raise CalibrationError(f"tensor {name!r} is {dtype.name}: ranges are taken of float activations")
    return [known[name] for name in names]
