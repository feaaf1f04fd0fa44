"""R3 where RoPE turns a part of each head, and where its tables are chosen by an If (LongRoPE)."""

from pathlib import Path

import exports
import genai_graph
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rotating import RTOL, request, rotate

from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.io import model_io
from quarot_onnx.rotation.plan import Demand, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind

TABLES = ("cos_cache", "sin_cache")
HALF = genai_graph.HEAD_DIM // 2
LIMIT = 66  # of compare's windows the prefill lies before it, the last decode steps behind it


def narrowed(model: onnx.ModelProto, half: int) -> None:
    """RoPE turns the first 2 · half entries of a head."""
    for tensor in model.graph.initializer:
        if tensor.name in TABLES:
            array = np.ascontiguousarray(numpy_helper.to_array(tensor)[:, :half])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def chosen(model: onnx.ModelProto, *, shapes: bool = True, captured: bool = False) -> None:
    """An If on the total length chooses between two pairs of tables of different lengths, as for LongRoPE.

    Args:
        model: A genai graph.
        shapes: The branches' outputs have their shapes written down.
        captured: The tables are weights of the outer graph; otherwise Constants of the branches.
    """
    graph = model.graph
    tables = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in TABLES}
    kept = [tensor for tensor in graph.initializer if tensor.name not in TABLES]
    del graph.initializer[:]
    graph.initializer.extend([*kept, numpy_helper.from_array(np.array(LIMIT), "limit")])

    def branch(tag: str, factor: float, rows: int) -> onnx.GraphProto:
        nodes, outputs = [], []
        for name, table in tables.items():
            tensor = numpy_helper.from_array((table[:rows] * factor).astype(np.float32), f"{name}_{tag}_table")
            if captured:
                graph.initializer.append(tensor)
                nodes.append(helper.make_node("Identity", [tensor.name], [f"{name}_{tag}"]))
            else:
                nodes.append(helper.make_node("Constant", [], [f"{name}_{tag}"], value=tensor))
            shape = list(tensor.dims) if shapes else None
            outputs.append(helper.make_tensor_value_info(f"{name}_{tag}", TensorProto.FLOAT, shape))
        return helper.make_graph(nodes, tag, [], outputs)

    branches = {"then_branch": branch("long", 1.2, 128), "else_branch": branch("short", 1.0, 80)}
    nodes = [
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("ReduceMax", ["mask_shape"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "limit"], ["is_long"]),
        helper.make_node("If", ["is_long"], list(TABLES), name="rope_tables", **branches),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def edited(folder: Path, source: Path, *edits) -> Path:
    model = onnx.load(source)
    for edit in edits:
        edit(model)
    path = folder / "model.onnx"
    onnx.save(model, path)
    for file in source.parent.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return path


CASES = {
    "narrow": (lambda m: narrowed(m, HALF // 2),),
    "if": (chosen,),
    "if narrow": (lambda m: narrowed(m, HALF // 2), chosen),
    "if narrow without shapes": (lambda m: narrowed(m, HALF // 2), lambda m: chosen(m, shapes=False)),
    "if narrow captured": (lambda m: narrowed(m, HALF // 2), lambda m: chosen(m, shapes=False, captured=True)),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_rope_is_taken_out_in_its_width(case: str, packed: bool, tmp_path: Path) -> None:
    source = edited(tmp_path, exports.genai_like(packed_qkv=packed), *CASES[case])
    target, _, plan = rotate(source, tmp_path, request(Kind.R3))
    assert plan.counts == {"R3": 2}
    found = compare(source, target)
    assert found.max_rel_logit_diff < RTOL[found.dtype]
    assert found.decode_steps


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("gpt_neox", {"rotary_pct": 0.25}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        (
            "phi3",
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_real_exports(arch: str, config: dict, tmp_path: Path) -> None:
    source = exports.optimum_export(arch, **config)
    target, _, plan = rotate(source, tmp_path, request(Kind.R3))
    assert plan.counts == {"R3": 2}
    found = compare(source, target)
    assert found.max_rel_logit_diff < RTOL[found.dtype]


def test_frequencies_inside_an_if_are_no_hidden_decoder(tmp_path: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        frequencies = numpy_helper.from_array(np.ones((1, HALF), np.float32), "frequencies")
        column = helper.make_tensor_value_info("angles", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("Cast", ["attention_mask"], ["mask_f"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask_f", "last"], ["column"]),
            helper.make_node("MatMul", ["column", "frequencies"], ["angles"]),
        ]
        tensors = [frequencies, numpy_helper.from_array(np.array([-1]), "last")]
        body = helper.make_graph(nodes, "body", [], [column], tensors)
        model.graph.node.insert(0, helper.make_node("If", ["yes"], ["spare"], then_branch=body, else_branch=body))
        model.graph.initializer.append(numpy_helper.from_array(np.ones((), bool), "yes"))

    assert detect(model_io.load(edited(tmp_path, exports.genai_like(), add))).layers == 2


def table_input(model: onnx.ModelProto) -> None:
    """RoPE's tables come from outside, of a width that is not written down."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in TABLES]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name in TABLES:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["positions", "half"]))


def inner_norm(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(genai_graph.HEAD_DIM, np.float32), "head_gamma"))
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (14 - len(node.input)) + ["head_gamma", "head_gamma"])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (table_input, "the width of RoPE's table 'cos_cache' is not to be seen"),
        (inner_norm, "GroupQueryAttention norms the heads of Q and K inside"),
    ],
)
def test_left_out_with_the_reason(edit, reason: str, tmp_path: Path) -> None:
    sites = detect(model_io.load(edited(tmp_path, exports.genai_like(), edit)))
    plan = plan_rotation(sites, request(Kind.R2, Kind.R3, demand=Demand.IF_POSSIBLE))
    assert set(plan.counts) == {"R2"}
    assert any(reason in note for note in plan.notes)
    with pytest.raises(ConfigError, match=reason):
        plan_rotation(sites, request(Kind.R3))
