"""What onnxruntime accepts in several spellings is loaded in one, and computes what it computed."""

from pathlib import Path
from typing import Any

import exports
import io_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.transformers.float16 import convert_float_to_float16
from rotating import check_equivalent, rotate

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.sites.detect import detect

X = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
CONFIG = QConfig(QLayerConfig(UInt8Spec(), Int8Spec()))
node = helper.make_node


def run(path: Path | onnx.ModelProto) -> NDArray[Any]:
    given = str(path) if isinstance(path, Path) else path.SerializeToString()
    return ort.InferenceSession(given, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def loaded(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as ``model_io`` reads and writes it."""
    model = model_io.load(io_models.write(proto, folder / "in.onnx"))
    return onnx.load(model_io.save(model, folder / "out.onnx").path)


def order(graph: onnx.GraphProto) -> list[str]:
    return [one.name for one in graph.node]


def shuffled(source: Path, folder: Path, seed: int) -> Path:
    """The same model with its nodes in any order, beside its companions."""
    proto = onnx.load(source)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes[i] for i in np.random.default_rng(seed).permutation(len(nodes)))
    return saved_beside(proto, source, folder)


def saved_beside(proto: onnx.ModelProto, source: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in source.parent.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "export", [lambda: exports.optimum_export("llama"), exports.genai_like], ids=["optimum", "genai"]
)
def test_a_decoder_whose_nodes_are_in_any_order(export, tmp_path):
    source = export()
    unsorted = shuffled(source, tmp_path / "unsorted", seed=3)
    assert detect(model_io.load(unsorted)).counts() == detect(model_io.load(source)).counts()
    target, _, plan = rotate(unsorted, tmp_path)
    assert plan.counts["R1"] == 5
    check_equivalent(source, target)
    done = quantize(unsorted, tmp_path / "int8" / "model.onnx", QConfig(QLayerConfig(weight=Int8Spec())))
    assert (
        done.recipe["quantization"]["linears"]
        == detect(model_io.load(source)).layers * (7 if "optimum" in str(source) else 5) + 1
    )


def test_a_converter_to_float16_that_appends_its_casts(tmp_path):
    source = exports.optimum_export("qwen2")
    half = saved_beside(convert_float_to_float16(onnx.load(source), keep_io_types=True), source, tmp_path / "half")
    written = onnx.load(half).graph
    made = {name: i for i, one in enumerate(written.node) for name in one.output}
    assert any(made.get(name, -1) > i for i, one in enumerate(written.node) for name in one.input), "it is sorted"
    target, _, plan = rotate(half, tmp_path)
    assert {"R2", "R4"} <= set(plan.counts)
    check_equivalent(half, target)


def test_a_sorted_graph_keeps_its_order(tmp_path):
    source = exports.optimum_export("llama")
    names = [one.name for one in model_io.load(source).graph]
    assert names == [one.name for one in onnx.load(source).graph.node]


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(nodes[-1].output[0], 1, ["n", 32])])


def test_subgraphs_are_sorted_and_wait_for_what_they_read(tmp_path):
    then = branch("then", node("Relu", ["m"], ["t0"], name="relu"), node("MatMul", ["x", "first"], ["m"], name="mm"))
    then.node.append(node("Identity", ["t0"], ["t"], name="t"))
    then.output[0].name = "t"
    nodes = [
        node(
            "If", ["yes"], ["y"], name="if", then_branch=then, else_branch=branch("else", node("Neg", ["late"], ["e"]))
        ),
        node("Neg", ["x"], ["late"], name="late"),
        node("Constant", [], ["yes"], name="yes", value=numpy_helper.from_array(np.ones((), bool))),
    ]
    first = io_models.weights()["first"]
    made = loaded(io_models.model_of(nodes, [numpy_helper.from_array(first, "first")]), tmp_path)
    names = order(made.graph)
    assert names.index("if") == 2
    then = next(a.g for a in made.graph.node[2].attribute if a.name == "then_branch")
    assert order(then) == ["mm", "relu", "t"]
    np.testing.assert_allclose(run(made), np.maximum(X @ first, 0), rtol=1e-5, atol=1e-5)


def test_a_function_is_sorted_before_it_is_inlined(tmp_path):
    body = [node("Relu", ["m"], ["o"], name="relu"), node("MatMul", ["a", "w"], ["m"], name="mm")]
    made = loaded(with_function(body, 21, 21), tmp_path)
    assert [one.op_type for one in made.graph.node] == ["MatMul", "Relu"]
    np.testing.assert_allclose(run(made), np.maximum(X @ io_models.weights()["first"], 0), rtol=1e-5, atol=1e-5)


def in_branches(*names: str) -> onnx.ModelProto:
    """Negated and cut off at 0 in one branch, absolute in the other, by nodes of these names."""
    then = branch("then", node("Neg", ["x"], ["n"], name=names[0]), node("Relu", ["n"], ["t"], name=names[1]))
    other = branch("else", node("Abs", ["x"], ["e"], name=names[2]))
    yes = node("Constant", [], ["yes"], name="yes", value=numpy_helper.from_array(np.ones((), bool)))
    choice = node("If", ["yes"], ["y"], name="if", then_branch=then, else_branch=other)
    return io_models.model_of([yes, choice], [])


def with_names(*names: str) -> onnx.ModelProto:
    proto = io_models.linear_model()
    for one, name in zip(proto.graph.node, names, strict=True):
        one.name = name
    return proto


@pytest.mark.parametrize("place", ["main", "branch", "function"])
def test_nodes_of_one_name_are_refused_as_onnxruntime_does(place, tmp_path):
    proto = {
        "main": lambda: with_names("a", "a", "add"),
        "branch": lambda: in_branches("a", "a", "b"),
        "function": lambda: with_function(
            [node("Relu", ["a"], ["m"], name="a"), node("Neg", ["m"], ["o"], name="a")], 21, 21
        ),
    }[place]()
    with pytest.raises(Fail, match="same node name"):
        run(proto)
    message = r"in\.onnx has nodes of one name, 'a' \(2 nodes\), .*; give each a name of its own, or none"
    with pytest.raises(ModelError, match=message):
        model_io.load(io_models.write(proto, tmp_path / "in.onnx"))


@pytest.mark.parametrize("proto", [with_names("", "", ""), in_branches("a", "b", "a"), in_branches("if", "", "yes")])
def test_names_that_onnxruntime_does_not_mind(proto, tmp_path):
    np.testing.assert_allclose(run(loaded(proto, tmp_path)), run(proto), rtol=1e-6)


CYCLES = {
    "two nodes": ([node("Add", ["x", "b"], ["y"], name="add"), node("Neg", ["y"], ["b"], name="neg")], "'add' needs"),
    "one node": ([node("Add", ["x", "y"], ["y"], name="self")], "'self' needs 'self'"),
    "behind sorted nodes": (
        [
            node("Relu", ["x"], ["r"], name="relu"),
            node("Add", ["r", "c"], ["y"], name="add"),
            node("Neg", ["y"], ["n"], name="neg"),
            node("Abs", ["n"], ["c"], name="abs"),
        ],
        "needs 'abs' needs",
    ),
    "through a branch": (
        [
            node("Constant", [], ["yes"], name="yes", value=numpy_helper.from_array(np.ones((), bool))),
            node(
                "If",
                ["yes"],
                ["y"],
                name="if",
                then_branch=branch("then", node("Neg", ["late"], ["t"], name="inner")),
                else_branch=branch("else", node("Neg", ["x"], ["e"], name="other")),
            ),
            node("Relu", ["y"], ["late"], name="late"),
        ],
        "'late' needs 'if'",
    ),
}


@pytest.mark.parametrize("case", CYCLES)
def test_a_cycle_is_an_error_of_one_line(case, tmp_path):
    nodes, shown = CYCLES[case]
    with pytest.raises(ModelError, match="has a cycle") as caught:
        model_io.load(io_models.write(io_models.model_of(nodes, []), tmp_path / "in.onnx"))
    assert shown in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def with_function(body: list[onnx.NodeProto], model: int, function: int) -> onnx.ModelProto:
    """``y = F(x, first)``: the model and the function import different versions."""
    made = helper.make_function("local", "F", ["a", "w"], ["o"], body, [helper.make_opsetid("", function)])
    imports = [helper.make_opsetid("", model), helper.make_opsetid("local", 1)]
    first = numpy_helper.from_array(io_models.weights()["first"], "first")
    return io_models.model_of(
        [node("F", ["x", "first"], ["y"], domain="local", name="call")], [first], functions=[made], opsets=imports
    )


def product(*tail: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [node("MatMul", ["a", "w"], ["m"], name="mm"), *tail]


SAME = {
    "matmul": product(node("Identity", ["m"], ["o"])),
    "widened": product(node("Add", ["m", "m"], ["s"]), node("Relu", ["s"], ["o"])),
    "constant": product(node("Constant", [], ["two"], value_float=2.0), node("Mul", ["m", "two"], ["o"])),
    "sine": product(node("Sin", ["m"], ["o"])),
    "softmax": product(node("Softmax", ["m"], ["o"], axis=-1)),
}


@pytest.mark.parametrize(("model", "function"), [(18, 17), (21, 13), (17, 21), (22, 17), (17, 22)])
@pytest.mark.parametrize("body", SAME)
def test_a_function_may_import_another_version(body, model, function, tmp_path):
    proto = with_function(SAME[body], model, function)
    made = loaded(proto, tmp_path)
    assert [(o.domain, o.version) for o in made.opset_import if o.domain == ""] == [("", model)]
    np.testing.assert_array_equal(run(made), run(proto))


@pytest.mark.parametrize(
    ("model", "function", "tail"),
    [
        (18, 17, node("ReduceMax", ["m"], ["o"], name="odd", axes=[0], keepdims=1)),
        (17, 18, node("Split", ["m"], ["o"], name="odd", num_outputs=1)),
        (13, 11, node("Softmax", ["m"], ["o"], name="odd", axis=1)),
        (21, 18, node("GroupNormalization", ["m", "w", "w"], ["o"], name="odd", num_groups=2)),
    ],
)
def test_a_function_whose_operators_changed_is_refused_by_name(model, function, tail, tmp_path):
    path = io_models.write(with_function(product(tail), model, function), tmp_path / "in.onnx")
    with pytest.raises(
        ModelError, match=rf"local::F .* version {function} .* the model {model}.*'odd' means something"
    ):
        model_io.load(path)


def test_a_function_that_nobody_calls_may_be_what_it_likes(tmp_path):
    proto = with_function(product(node("Relu", ["m"], ["o"])), 18, 17)
    odd = product(node("ReduceMax", ["m"], ["o"], axes=[0], keepdims=1))
    proto.functions.append(helper.make_function("local", "Odd", ["a", "w"], ["o"], odd, [helper.make_opsetid("", 17)]))
    np.testing.assert_array_equal(run(loaded(proto, tmp_path)), run(proto))


def test_functions_that_call_functions_and_hold_branches(tmp_path):
    then = branch("then", node("Add", ["m", "m"], ["t"]))
    body = product(
        node("Constant", [], ["yes"], value=numpy_helper.from_array(np.ones((), bool))),
        node("If", ["yes"], ["o"], then_branch=then, else_branch=branch("else", node("Neg", ["m"], ["e"]))),
    )
    proto = with_function(body, 18, 13)
    outer = [node("F", ["a", "w"], ["b"], domain="local"), node("Relu", ["b"], ["o"])]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    proto.functions.append(helper.make_function("local", "G", ["a", "w"], ["o"], outer, imports))
    proto.graph.node[0].op_type = "G"
    np.testing.assert_array_equal(run(loaded(proto, tmp_path)), run(proto))


@pytest.mark.parametrize("imports", [[("ai.onnx", 18)], [("", 13), ("ai.onnx", 18)], [("ai.onnx", 13), ("", 18)]])
def test_the_standard_domain_by_its_long_name(imports, tmp_path):
    proto = io_models.linear_model()
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(*each) for each in imports)
    branches = {
        "then_branch": branch("then", node("Neg", ["g"], ["t"])),
        "else_branch": branch("e", node("Abs", ["g"], ["e"])),
    }
    proto.graph.node.insert(2, node("If", ["yes"], ["i"], name="if", **branches))
    proto.graph.node.insert(0, node("Constant", [], ["yes"], value=numpy_helper.from_array(np.ones((), bool))))
    proto.graph.node[-1].input[0] = "i"
    expected = run(proto)
    for one in proto.graph.node:
        one.domain = "ai.onnx"
    np.testing.assert_array_equal(run(proto), expected)
    for attribute in proto.graph.node[3].attribute:  # onnxruntime insists on the short name here
        attribute.g.node[0].domain = "ai.onnx"
    made = loaded(proto, tmp_path)
    assert {(o.domain, o.version) for o in made.opset_import} == {("", 18)}
    assert {one.domain for one in made.graph.node} == {""}
    np.testing.assert_array_equal(run(made), expected)
    quantize(tmp_path / "in.onnx", tmp_path / "int8.onnx", QConfig(QLayerConfig(weight=Int8Spec())))
    assert "DequantizeLinear" in [one.op_type for one in onnx.load(tmp_path / "int8.onnx").graph.node]


def test_a_decoder_in_the_standard_domain_by_its_long_name(tmp_path):
    source = exports.optimum_export("llama")
    proto = onnx.load(source)
    for one in (*proto.graph.node, *proto.opset_import):
        one.domain = "ai.onnx" if one.domain == "" else one.domain
    long = saved_beside(proto, source, tmp_path / "long")
    target, _, plan = rotate(long, tmp_path)
    assert plan.counts["R1"] == 5
    check_equivalent(source, target)


@pytest.mark.parametrize("r3", [False, True])
@pytest.mark.parametrize("twice", ["logits", "present.0.key"])
def test_an_output_listed_twice(twice, r3, tmp_path):
    source = exports.genai_like()
    proto = onnx.load(source)
    proto.graph.output.append(next(output for output in proto.graph.output if output.name == twice))
    doubled = saved_beside(proto, source, tmp_path / "doubled")
    config = QConfig(
        QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int8Spec(quant_granularity="Channel")),
        algo_config=[QuarotConfig(r3=r3)],
    )
    quantize(doubled, tmp_path / "int8" / "model.onnx", config)
    session = ort.InferenceSession(tmp_path / "int8" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [output.name for output in proto.graph.output]


def test_a_replaced_output_that_is_listed_twice(tmp_path):
    proto = io_models.linear_model()
    proto.graph.output.append(proto.graph.output[0])
    quantize(
        io_models.write(proto, tmp_path / "in.onnx"), tmp_path / "int8.onnx", QConfig(QLayerConfig(weight=Int8Spec()))
    )
    session = ort.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    one, other = session.run(None, {"x": X})
    np.testing.assert_array_equal(one, other)
    exact = run(tmp_path / "in.onnx")
    assert np.linalg.norm(one - exact) < 0.05 * np.linalg.norm(exact)  # two int8 weights, one scale each: about 2 %


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "LeakyRelu", "Elu", "HardSigmoid", "ThresholdedRelu"])
def test_an_activation_inside_a_gemm(activation, tmp_path):
    options = {"activation": activation, "activation_alpha": 0.2, "activation_beta": 0.4, "activation_gamma": 0.0}
    fused = node(
        "FusedGemm", ["x", "first", "bias"], ["y"], name="up", domain="com.microsoft", transB=1, alpha=0.5, **options
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in io_models.weights().items() if name != "second"]
    proto = io_models.model_of([fused], tensors)
    made = loaded(proto, tmp_path)
    assert [one.op_type for one in made.graph.node] == ["Gemm", activation]
    np.testing.assert_allclose(run(made), run(proto), rtol=1e-6, atol=1e-6)
    quantize(tmp_path / "in.onnx", tmp_path / "int8.onnx", QConfig(QLayerConfig(weight=Int8Spec())))
    exact = run(proto)
    assert np.linalg.norm(run(tmp_path / "int8.onnx") - exact) < 0.05 * np.linalg.norm(exact)


def test_a_relu_that_the_optimizer_fused(tmp_path):
    """Gemm and Relu of a 2-D model become a FusedGemm; it stays the output of the graph and keeps its readers."""
    nodes = [
        node("Gemm", ["x", "first", "bias"], ["g"], name="up"),
        node("Relu", ["g"], ["h"], name="relu"),
        node("MatMul", ["h", "second"], ["d"], name="down"),
        node("Add", ["d", "h"], ["y"], name="add"),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in io_models.weights().items()]
    proto = io_models.model_of(nodes, tensors)
    proto.graph.output.append(helper.make_tensor_value_info("h", 1, ["n", 32]))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert "FusedGemm" in [one.op_type for one in optimized.graph.node]
    made = loaded(optimized, tmp_path)
    assert [output.name for output in made.graph.output] == ["y", "h"]
    np.testing.assert_allclose(run(made), run(proto), rtol=1e-5, atol=1e-5)


def test_a_bias_inside_a_skip_norm(tmp_path):
    """As the optimiser fuses it: o's bias joins the norm; R1 rotates it with o's columns."""
    source = exports.genai_like()
    proto = onnx.load(source)
    rng = np.random.default_rng(0)
    skips = [one for one in proto.graph.node if one.op_type == "SkipSimplifiedLayerNormalization"]
    for number, one in enumerate(skips):
        name = f"skip_bias_{number}"
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(64).astype(np.float32), name))
        one.input.append(name)
    biased = saved_beside(proto, source, tmp_path / "biased")
    model = model_io.load(biased)
    assert detect(model).counts() == detect(model_io.load(source)).counts()
    target, _, _ = rotate(biased, tmp_path)
    check_equivalent(biased, target)


def test_two_skip_norms_with_biases_on_one_product(tmp_path):
    """Each addition that is taken out has a name of its own, which nothing else has."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((32, 32)), "g": np.ones(32), "b1": rng.random(32), "b2": rng.random(32)}
    skip = "SkipSimplifiedLayerNormalization"
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="m"),
        node("Neg", ["x"], ["p/bias"], name="n"),
        *(node(skip, ["p", "p/bias", "g", b], [f"{b}_y"], name=b, domain="com.microsoft") for b in ("b1", "b2")),
        node("Sub", ["b1_y", "b2_y"], ["y"], name="s"),
    ]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "skips", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    np.testing.assert_allclose(run(loaded(proto, tmp_path)), run(proto), atol=1e-5)


def inputs_too(proto: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """List initializers among the inputs."""
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return proto


@pytest.mark.parametrize(
    ("ir_version", "inputs"), [(3, ["x"]), (4, ["x", "first", "bias"]), (10, ["x", "first", "bias"])]
)
def test_an_initializer_that_is_an_input_is_a_default_since_ir_version_4(ir_version, inputs, tmp_path):
    proto = inputs_too(io_models.linear_model(), "first", "bias")
    proto.ir_version = ir_version
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", 8))
    made = loaded(proto, tmp_path)
    assert [value.name for value in made.graph.input] == inputs
    assert {tensor.name for tensor in made.graph.initializer} == set(io_models.weights())
    onnx.checker.check_model(made)
    np.testing.assert_array_equal(run(made), run(proto))
