"""Stages of a decoder for tests, and their inputs by two ways: the whole model at once, and segment after segment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.graph.linear import Linear, linears
from quarot_onnx.sessions.skeleton import open_augmented
from quarot_onnx.sites.detect import detect
from quarot_onnx.stages.blocks import Segments, Stage, find_stages


def decoder_stages(model: ir.Model) -> tuple[Stage, ...]:
    """The stages of all Linears but the head."""
    sites = detect(model)
    head = {linear.node for linear in sites.head}
    starts = {attention.value.node for attention in sites.attentions if attention.value is not None}
    return find_stages([linear for linear in linears(model.graph) if linear.node not in head], starts)


def plain_stages(model: ir.Model, starts: Sequence[ir.Node] = ()) -> tuple[Stage, ...]:
    """The stages of all Linears of any graph."""
    return find_stages(linears(model.graph), starts)


def feeds_of(path: Path, count: int = 2, length: int = 12, seed: int = 0) -> list[Feeds]:
    """Samples of random bytes as tokens."""
    inputs, rng = ModelInputs.from_path(path), np.random.default_rng(seed)
    top = min(256, inputs.vocab_size or 256)
    return [inputs.feed(rng.integers(0, top, (1, length + 3 * sample))) for sample in range(count)]


def whole_runs(model: ir.Model, names: Sequence[str], samples: Sequence[Feeds]) -> list[dict[str, NDArray[Any]]]:
    """Values of a model that is run at once, for each sample; its own outputs are not computed."""
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for value in graph.inputs}
    values |= {output.name: output for node in graph for output in node.outputs}
    fed = set(samples[0])
    wanted = [name for name in dict.fromkeys(names) if name not in fed]
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in wanted)
    RemoveUnusedNodesPass()(copy)
    session = open_augmented(copy, threads=1)
    found = []
    for feeds in samples:
        given = {argument.name: feeds[argument.name] for argument in session.get_inputs()}
        outputs = dict(zip(wanted, session.run(None, given), strict=True))
        found.append(outputs | {name: feeds[name] for name in names if name in fed})
    return found


def stage_rows(model: ir.Model, stage: Stage, samples: Sequence[Feeds]) -> NDArray[np.float64]:
    """A stage's inputs in all samples, [rows, in], of the model that is run at once."""
    name = stage.input.name or ""
    return np.concatenate([rows_of(run[name], stage.linears[0]) for run in whole_runs(model, [name], samples)])


def segment_run(
    model: ir.Model, stages: Sequence[Stage], feeds: Feeds
) -> tuple[dict[str, NDArray[Any]], list[set[str]]]:
    """The stages' inputs, one segment after the other, and the names that are held after each."""
    segments, held = Segments(model, stages), dict(feeds)
    inputs: dict[str, NDArray[Any]] = {}
    kept = []
    for number, stage in enumerate(stages):
        segment = segments.segment(number)
        if segment.outputs:
            for value in segment.model.graph.inputs:  # exporters leave most types out
                value.type = ir.TensorType(ir.DataType.from_numpy(held[str(value.name)].dtype))
            session = open_augmented(segment.model, threads=1)
            given = {argument.name: held[argument.name] for argument in session.get_inputs()}
            held |= dict(zip(segment.outputs, session.run(None, given), strict=True))
        for name in segment.expires:
            held.pop(name, None)
        inputs[stage.input.name or ""] = held[stage.input.name or ""]
        kept.append(set(held) - set(feeds))
    return inputs, kept


def rows_of(array: NDArray[Any], linear: Linear) -> NDArray[np.float64]:
    """A stage's input as [rows, in]."""
    matrix = array.T if linear.transposed_input else array.reshape(-1, linear.in_features)
    return matrix.astype(np.float64)
