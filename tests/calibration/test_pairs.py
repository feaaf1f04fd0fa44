"""Caches belong together as the graph joins them, whatever their names and places."""

from pathlib import Path

import cached_decoder as cached
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.pipeline import rotate


def crossed() -> onnx.ModelProto:
    """Layers 0 and 1 have swapped the names of their cache inputs, so that names say the opposite of the graph."""
    model = cached.build()
    swap = {f"past_key_values.{a}.{part}": f"past_key_values.{b}.{part}" for a, b in ("01", "10") for part in
            ("key", "value")}  # fmt: skip
    for value in model.graph.input:
        value.name = swap.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]
    return model


def reordered() -> onnx.ModelProto:
    """Other names, and all keys before all values among the outputs alone."""
    model = cached.build()
    values = sorted(model.graph.output[1:], key=lambda value: value.name.split(".")[::-1])
    del model.graph.output[1:]
    model.graph.output.extend(values)
    return renamed(model, lambda name: f"c{sum(name.encode())}" if name.startswith(("past", "present")) else name)


def renamed(model: onnx.ModelProto, rename) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.name = rename(value.name)
    for node in model.graph.node:
        node.input[:], node.output[:] = map(rename, node.input), map(rename, node.output)
    return model


def windowed() -> onnx.ModelProto:
    """Presents through a Slice of the last 64 positions and an Identity, pasts through a Gather of the beams."""
    model = cached.build()
    graph = model.graph
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), n) for n, v in
                             (("back", [-64]), ("far", [2**62]), ("time", [2]), ("beam", [0])))  # fmt: skip
    for output in list(graph.output)[1:]:
        last, name = f"{output.name}.last", f"out.{len(graph.node)}"
        graph.node.append(helper.make_node("Slice", [output.name, "back", "far", "time"], [last]))
        graph.node.append(helper.make_node("Identity", [last], [name]))
        output.name = name
    for value in list(graph.input)[1:]:
        for node in graph.node:
            node.input[:] = [f"{value.name}.beam" if name == value.name else name for name in node.input]
        graph.node.insert(0, helper.make_node("Gather", [value.name, "beam"], [f"{value.name}.beam"], axis=0))
    return renamed(model, lambda name: name.replace("past_key_values", "mem") if name[-1] in "ye" else name)


def logits(model: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray]:
    """Of a whole prefill, and of a prefill followed by decode steps."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs, names = ModelInputs.from_model(ir.from_proto(model)), [output.name for output in session.get_outputs()]
    whole = session.run(["logits"], inputs.feed(cached.IDS))[0]
    outputs = dict(zip(names, session.run(names, inputs.feed(cached.IDS[:, :5])), strict=True))
    steps = [outputs["logits"]]
    for step in range(5, cached.IDS.shape[1]):
        feeds = inputs.feed(cached.IDS[:, step : step + 1], inputs.present_to_past(outputs))
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        steps.append(outputs["logits"])
    return whole, np.concatenate(steps, axis=1)


@pytest.mark.parametrize("build", [cached.build, crossed, reordered, windowed])
def test_decoding_feeds_back_what_the_graph_joins(build, tmp_path: Path) -> None:
    whole, steps = logits(build())
    np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-5)  # float32, sums of up to 64 terms
    done = rotate(cached.save(build(), tmp_path), tmp_path / "rotated.onnx", QuarotConfig())
    assert done.equivalence is not None
    assert done.equivalence.decode_steps == 4
    # A cache that is gathered before it is joined is no plain one: R2 stays away.
    assert done.recipe["rotation"]["counts"].get("R2", 0) == (0 if build is windowed else 2)


def test_a_past_without_a_present_ends_decoding_but_not_the_proof(tmp_path: Path) -> None:
    model = cached.build(present=False)
    assert not ModelInputs.from_model(ir.from_proto(model)).has_cache
    done = rotate(cached.save(model, tmp_path), tmp_path / "rotated.onnx", QuarotConfig())
    assert done.equivalence is not None
    assert (done.equivalence.passed, done.equivalence.decode_steps) == (True, 0)


def test_a_past_without_a_present_is_another_graphs() -> None:
    model = renamed(cached.build(), lambda name: name.replace("present", "cache"))
    del model.graph.output[-1]
    assert not ModelInputs.from_model(ir.from_proto(model)).has_cache


def test_a_copy_in_another_type_is_not_fed_back() -> None:
    model = cached.build(layers=1)
    node = helper.make_node("Cast", ["present.0.key"], ["half"], to=TensorProto.FLOAT16)
    cached.put_out(model, "present.0.key", node, kind=TensorProto.FLOAT16)
    assert dict(ModelInputs.from_model(ir.from_proto(model)).presents)["past_key_values.0.key"] == "present.0.key"


def scaled_by_lengths(spelling: str) -> onnx.ModelProto:
    """Keys multiplied by sqrt(1 / sqrt(head_dim)), which the graph computes, as TorchScript does for SDPA."""
    model = cached.build()
    graph = model.graph
    for name, value in (("minus", [-1]), ("end", [2**63 - 1]), ("three", 3), ("one", np.float32(1))):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    for layer in range(2):
        product = next(node for node in graph.node if f"kt{layer}" in node.output)
        length = {
            "Slice": [helper.make_node("Shape", [f"q{layer}_2"], [f"sh{layer}"]),
                      helper.make_node("Slice", [f"sh{layer}", "minus", "end"], [f"n{layer}"])],
            "Gather": [helper.make_node("Shape", [f"q{layer}_2"], [f"sh{layer}"]),
                       helper.make_node("Gather", [f"sh{layer}", "three"], [f"n{layer}"])],
            "Shape": [helper.make_node("Shape", [f"q{layer}_2"], [f"n{layer}"], start=3, end=4)],
        }[spelling]  # fmt: skip
        factor = [helper.make_node("Cast", [f"n{layer}"], [f"nf{layer}"], to=TensorProto.FLOAT),
                  helper.make_node("Sqrt", [f"nf{layer}"], [f"root{layer}"]),
                  helper.make_node("Div", ["one", f"root{layer}"], [f"per{layer}"]),
                  helper.make_node("Sqrt", [f"per{layer}"], [f"by{layer}"]),
                  helper.make_node("Mul", [f"kt{layer}", f"by{layer}"], [f"scaled{layer}"])]  # fmt: skip
        user = next(i for i, node in enumerate(graph.node) if f"kt{layer}" in node.input)
        graph.node[user].input[1] = f"scaled{layer}"
        assert f"q{layer}_2" in graph.node[user].input
        assert product.op_type == "Transpose"
        for place, node in enumerate([*length, *factor]):
            graph.node.insert(user + place, node)
    return model


@pytest.mark.parametrize("spelling", ["Slice", "Gather", "Shape"])
def test_keys_that_are_scaled_by_a_computed_number_are_a_cache(spelling: str, tmp_path: Path) -> None:
    source = cached.save(scaled_by_lengths(spelling), tmp_path)
    done = rotate(source, tmp_path / "rotated.onnx", QuarotConfig(r3=True))
    assert done.equivalence is not None
    assert done.equivalence.passed
    assert done.recipe["rotation"]["counts"]["R3"] == 2
    # The cache of the rotated model holds other keys, of the same lengths.
    before, after = (cached.run(path, {"input_ids": cached.IDS})["present.0.key"] for path in (source, done.saved.path))
    assert cached.difference(before, after) > 0.1
    np.testing.assert_allclose(np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1), rtol=1e-5)
