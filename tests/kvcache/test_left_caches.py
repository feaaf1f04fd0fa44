"""Caches of layers that are not as the others: quantized all the same, or named, their bytes counted."""

from pathlib import Path

import cached_decoder as cached
import exports
import onnx
import pytest
from command_line import Shell
from onnx import helper
from strange_blocks import behind, without_softmax

from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.places import find_cache_places
from quarot_onnx.sites.detect import Survey

ALL = 2 * 2 * cached.HIDDEN * 4
"""Bytes of a position in float: keys and values of two layers."""

EIGHT = cached.HIDDEN + 4 * cached.HEADS
"""Of keys or values of one layer in 8 bits, scales of heads beside them."""

OPTIONS = ("--w-bits", 16, "--no-rotate", "--no-k-balance", "--no-check")
UNREAD = "no attention that is understood reads, unchanged, the cache that it takes"


def types(folder: Path) -> dict[str, int]:
    inputs = onnx.load(folder / "m.onnx").graph.input
    return {value.name: value.type.tensor_type.elem_type for value in inputs if value.name[-3:] in ("key", "lue")}


@pytest.mark.parametrize("value", [("o0",), ("o1",), ("r0", "LayerNormalization", "b0g")])
def test_a_layer_that_does_not_write_to_the_stream_as_others_do(
    value: tuple[str, ...], shell: Shell, tmp_path: Path
) -> None:
    source = cached.save(behind(cached.build(), *value), tmp_path / "source")
    told = shell.ok("quantize", source, tmp_path / "m.onnx", "--kv-bits", 8, *OPTIONS).err
    assert f"takes {4 * EIGHT} bytes a position in place of {ALL}: integers" in told
    assert "left in float" not in told
    assert set(types(tmp_path).values()) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("bits", [8, 3])
def test_a_layer_whose_attention_is_not_found_is_named(bits: int, shell: Shell, tmp_path: Path) -> None:
    source = cached.save(without_softmax(cached.build(), 1), tmp_path / "source")
    told = shell.ok("quantize", source, tmp_path / "m.onnx", "--kv-bits", bits, *OPTIONS).err
    assert f"left in float at node_present.1.key and 1 more: {UNREAD}" in told
    if bits == 8:
        assert f"takes {2 * EIGHT + ALL // 2} bytes a position in place of {ALL}: integers" in told
        assert [kind == onnx.TensorProto.INT8 for kind in types(tmp_path).values()] == [True, True, False, False]


def test_where_no_layer_is_found_it_is_refused_by_name(shell: Shell, tmp_path: Path) -> None:
    source = cached.save(without_softmax(without_softmax(cached.build(), 1), 0), tmp_path / "source")
    said = shell.fails("quantize", source, tmp_path / "m.onnx", "--kv-bits", 8, *OPTIONS)
    assert f"node_present.0.key and 3 more: {UNREAD}, so it cannot be quantized; leave the cache in float" in said
    assert not (tmp_path / "m.onnx").exists()


def with_state(model: onnx.ModelProto, *shape: int | str) -> onnx.ModelProto:
    """A past that goes round, and that no attention reads."""
    more = "grown" if "held" in shape else "state"
    operands = ["past.state", "past.state"] if more == "grown" else ["past.state"]
    model.graph.node.append(helper.make_node("Concat", operands, ["present.state"], name="keeper", axis=2))
    after = [more if dim == "held" else dim for dim in shape]
    for values, name, dims in ((model.graph.input, "past.state", shape), (model.graph.output, "present.state", after)):
        values.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", *dims]))
    return model


def test_a_state_that_does_not_grow_is_named_and_not_counted(shell: Shell, tmp_path: Path) -> None:
    source = cached.save(with_state(cached.build(), 16, 3), tmp_path / "source")
    told = shell.ok("quantize", source, tmp_path / "m.onnx", "--kv-bits", 8, "--no-verify", *OPTIONS).err
    assert f"takes {4 * EIGHT} bytes a position in place of {ALL}: integers" in told
    assert f"left in float at keeper: {UNREAD}" in told


def test_beside_operators_one_that_grows_is_refused(tmp_path: Path) -> None:
    def survey(*shape: int | str) -> Survey:
        return Survey(model_io.load(cached.save(with_state(onnx.load(exports.genai_like()), *shape), tmp_path)))

    with pytest.raises(ModelError, match=f"keeper: {UNREAD}, so it cannot be quantized, and .* keeps its own"):
        find_cache_places(survey(2, "held", 8))
    assert find_cache_places(survey(16, 3)).unread == ("keeper",)
