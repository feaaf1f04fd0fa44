"""What is compared beside the logits: every float output, and caches up to the rotation that the record states."""

import json
from pathlib import Path

import cached_decoder as cached
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.config import Int8Spec, QConfig, QLayerConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.errors import VerificationError
from quarot_onnx.evaluation.equivalence import Equivalence, compare, require
from quarot_onnx.evaluation.report import equivalence_record
from quarot_onnx.graph.metadata import RECIPE_KEY
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize, rotate


def with_head(factor: float, how: str) -> onnx.ModelProto:
    """A decoder with a value head ``factor`` times as large, put out in several ways."""
    model = cached.build()
    weight = (factor * np.random.default_rng(3).standard_normal((cached.HIDDEN, 1))).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "Wvalue"))
    nodes = [helper.make_node("MatMul", ["fy", "Wvalue"], ["value"])]
    kind = TensorProto.FLOAT
    if how == "float16":
        nodes.append(helper.make_node("Cast", ["value"], ["half"], to=TensorProto.FLOAT16))
        kind = TensorProto.FLOAT16
    if how == "flat":
        nodes.append(helper.make_node("ReduceMean", ["value"], ["mean"], keepdims=0))
    cached.put_out(model, "value", *nodes, kind=kind)
    if how == "masked":  # minus infinity in both
        shape = [helper.make_node("Log", ["f0"], ["minus_infinity"])]
        shape.append(helper.make_node("Where", ["gt0", "minus_infinity", "f0"], ["mask"]))
        cached.put_out(model, "mask", *shape)
    return model


@pytest.mark.parametrize("how", ["plain", "float16", "flat", "masked"])
def test_a_second_head_is_compared(how: str, tmp_path: Path) -> None:
    paths = [cached.save(with_head(factor, how), tmp_path, f"{factor}.onnx") for factor in (1, 1.0001, 3)]
    same = compare(paths[0], paths[0])
    assert same.passed
    name = {"float16": "half", "flat": "mean"}.get(how, "value")
    assert name in [output.name for output in same.outputs]
    found = compare(paths[0], paths[2])
    assert found.max_abs_logit_diff == 0.0
    assert [output.name for output in found.outputs if not output.passed] == [name]
    with pytest.raises(VerificationError, match=f"output '{name}' relative 2, relative L2 2"):
        require(found)
    # A factor of 1.0001 is beyond float32's rounding, and within float16's.
    assert compare(paths[0], paths[1]).passed == (how == "float16")


def test_masked_scores_that_are_infinite_in_one_alone_differ(tmp_path: Path) -> None:
    first, second = with_head(1, "masked"), with_head(1, "masked")
    next(node for node in second.graph.node if node.output[0] == "mask").input[1] = "f0"
    found = compare(cached.save(first, tmp_path, "a.onnx"), cached.save(second, tmp_path, "b.onnx"))
    assert [output.name for output in found.outputs if not output.passed] == ["mask"]


def up_to(found: Equivalence) -> dict[str, str]:
    return {output.name: output.up_to for output in found.outputs}


@pytest.mark.parametrize("options", [{}, {"use_random_had": True, "seed": 4}, {"r3": True}], ids=str)
def test_caches_are_compared_up_to_the_recorded_rotation(options: dict, tmp_path: Path) -> None:
    source, target = cached.save(cached.build(), tmp_path), tmp_path / "rotated.onnx"
    done = rotate(source, target, QuarotConfig(**options))
    assert done.equivalence is not None
    key = "R3[16]" if options.get("r3") else ""
    expected = {"logits": ""} | {f"present.{i}.{part}": words for i in range(2)
                                 for part, words in (("key", key), ("value", "R2[16]"))}  # fmt: skip
    assert up_to(done.equivalence) == expected
    assert up_to(compare(source, target)) == expected
    assert compare(target, source).passed
    assert compare(target, target).passed
    # Records that tell another rotation than the one that was done, or none.
    model = model_io.load(target)
    for number, (key, value) in enumerate((("seed", 99), ("size", 8), ("caches", {}))):
        recipe = json.loads(model.metadata_props[RECIPE_KEY])
        if key == "caches":
            recipe["rotation"]["caches"] = value
        else:
            recipe["rotation"]["rotations"]["R2[16]"] |= {key: value, "origin": None}
        model.metadata_props[RECIPE_KEY] = json.dumps(recipe)
        model_io.save(model, tmp_path / str(number) / "model.onnx")
        failed = [o.name for o in compare(source, tmp_path / str(number) / "model.onnx").outputs if not o.passed]
        assert {"present.0.value", "present.1.value"} <= set(failed)


def test_a_given_matrix_is_recorded_by_its_hash_alone(tmp_path: Path) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))
    np.save(tmp_path / "r2.npy", q)
    source, target = cached.save(cached.build(), tmp_path), tmp_path / "rotated.onnx"
    done = rotate(source, target, QuarotConfig(r2_matrix_path=tmp_path / "r2.npy"))
    assert done.equivalence is not None
    assert up_to(done.equivalence)["present.1.value"] == "a rotation of the heads"


@pytest.mark.parametrize("spoil", ["value", "key"])
def test_a_spoiled_cache_is_found(spoil: str, tmp_path: Path) -> None:
    """What decoding reads is right; what it is given to keep is not: no logit shows it."""
    source, target = cached.save(cached.build(present=False), tmp_path, "a.onnx"), tmp_path / "b.onnx"
    for path, factor in ((source, 1.0), (target, 1.01)):
        model = cached.build(past=False)
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        name = f"present.0.{spoil}"
        cached.put_out(model, name, helper.make_node("Mul", [name, "factor"], ["kept"]))
        cached.save(model, tmp_path, path.name)
    found = compare(source, target)
    assert [output.name for output in found.outputs if not output.passed] == ["kept"]


def test_without_a_record_caches_are_compared_up_to_some_rotation(tmp_path: Path) -> None:
    source, target = cached.save(cached.build(), tmp_path), tmp_path / "rotated.onnx"
    rotate(source, target, QuarotConfig(use_random_had=True))
    model = model_io.load(target)
    del model.metadata_props[RECIPE_KEY]
    model_io.save(model, tmp_path / "bare" / "model.onnx")
    found = compare(source, tmp_path / "bare" / "model.onnx")
    assert found.passed
    assert set(up_to(found).values()) == {"", "a rotation of the heads"}


def test_the_proof_of_a_split_cache_undoes_the_rotation(tmp_path: Path) -> None:
    source = cached.save(cached.build(past=False), tmp_path)
    options = QuarotConfig(use_random_had=True, split_cache=True)
    done = rotate(source, tmp_path / "rotated.onnx", options)
    assert done.equivalence is not None
    assert up_to(done.equivalence)["present.0.value"] == "R2[16]"
    config = QConfig(QLayerConfig(weight=Int8Spec()), algo_config=[options])
    quantized = quantize(source, tmp_path / "int8.onnx", config)
    assert quantized.equivalence is not None
    assert up_to(quantized.equivalence)["present.1.value"] == "R2[16]"


def test_outputs_that_one_model_alone_has_are_named(tmp_path: Path) -> None:
    first = cached.save(with_head(1, "plain"), tmp_path, "a.onnx")
    second = cached.save(cached.build(), tmp_path, "b.onnx")
    for pair, which in (((first, second), "second"), ((second, first), "first")):
        found = compare(*pair)
        assert found.passed
        assert equivalence_record(found)["not_compared"] == {"value": f"the {which} model has no such output"}


def test_graphs_that_are_no_decoders_are_judged_output_by_output(tmp_path: Path) -> None:
    """A small output beside a large one."""

    def two(factor: float) -> Path:
        nodes = [helper.make_node("Mul", ["x", name], [f"y_{name}"]) for name in ("large", "small")]
        values = {"large": 1e6, "small": factor}
        constants = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in values.items()]
        infos = [helper.make_tensor_value_info(n, 1, [2, 3]) for n in ("x", "y_large", "y_small")]
        graph = helper.make_graph(nodes, "two", infos[:1], infos[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return cached.save(model, tmp_path, f"{factor}.onnx")

    found = compare(two(1.0), two(3.0))
    assert found.max_rel_logit_diff < 1e-5
    assert [output.name for output in found.outputs if not output.passed] == ["y_small"]
    assert not found.passed
