import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import InputRole, position_axis
from quarot_onnx.errors import CalibrationError, ModelError

IDS = np.array([[3, 5, 7, 2, 30, 4, 4, 9]])


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def inputs_of(model: onnx.ModelProto, **options) -> ModelInputs:
    return ModelInputs.from_model(ir.from_proto(model), **options)


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_decode_steps_equal_one_prefill(rename: bool, positions: bool):
    model = tiny.build(tiny.Spec(positions=positions))
    model = tiny.renamed(model) if rename else model
    session, inputs = open_session(model), inputs_of(model)
    names = [output.name for output in session.get_outputs()]
    whole = session.run([inputs.logits], inputs.feed(IDS))[0]
    outputs = dict(zip(names, session.run(names, inputs.feed(IDS[:, :5])), strict=True))
    for step in range(5, IDS.shape[1]):
        feeds = inputs.feed(IDS[:, step : step + 1], inputs.present_to_past(outputs))
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        # Float32 sums of up to eight terms: a few roundoffs of 6e-8.
        np.testing.assert_allclose(outputs[inputs.logits][:, 0], whole[:, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("axes", [2, 3, 4])
def test_a_cache_of_integers_with_their_scales(axes: int, rename: bool):
    """Every present goes back as the past that it carries on, whatever its type and axes."""
    model = tiny.build(tiny.Spec(scales=axes))
    model = tiny.renamed(model) if rename else model
    session, inputs = open_session(model), inputs_of(model)
    assert len(inputs.presents) == 4
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    empty = inputs.feed(IDS)
    assert {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in empty.items()} == declared
    assert {empty[past].ndim for past, _ in inputs.presents} == {4, axes}
    assert not any(empty[past].size for past, _ in inputs.presents)
    names = [output.name for output in session.get_outputs()]
    whole = session.run([inputs.logits], empty)[0]
    outputs = dict(zip(names, session.run(names, inputs.feed(IDS[:, :5])), strict=True))
    for step in range(5, IDS.shape[1]):
        past = inputs.present_to_past(outputs)
        assert {np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.float32)} == {a.dtype for a in past.values()}
        outputs = dict(zip(names, session.run(names, inputs.feed(IDS[:, step : step + 1], past)), strict=True))
        np.testing.assert_allclose(outputs[inputs.logits][:, 0], whole[:, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [3, "past"])
def test_a_state_of_a_length_of_its_own_is_no_cache(length: int | str):
    """Such as that of a convolution, which holds the last columns alone."""
    model = tiny.build()
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("past_conv", TensorProto.FLOAT, ["b", tiny.HIDDEN, length]))
    graph.output.append(helper.make_tensor_value_info("present_conv", TensorProto.FLOAT, ["b", tiny.HIDDEN, "t"]))
    graph.node.append(helper.make_node("Transpose", ["x"], ["columns"], perm=[0, 2, 1]))
    graph.node.append(helper.make_node("Concat", ["past_conv", "columns"], ["present_conv"], axis=2))
    if length == "past":
        assert inputs_of(model).roles["past_conv"] is InputRole.PAST
    else:
        with pytest.raises(ModelError, match=r"'past_conv'.* is not known"):
            inputs_of(model)


def test_scales_whose_positions_come_before_the_heads():
    shapes = [("b", 2, "past"), ("b", "past", 2), ("b", "past"), ("b", 2, "past", "width"), ("b", 2, 64, "width")]
    assert [position_axis(shape) for shape in shapes] == [2, 1, 1, 2, 2]


def test_roles_do_not_depend_on_names():
    model = tiny.build()
    plain, renamed = inputs_of(model), inputs_of(tiny.renamed(model))
    assert list(plain.roles.values()) == list(renamed.roles.values())
    assert InputRole.POSITIONS in plain.roles.values()


@pytest.mark.parametrize(
    ("ids", "dtype"), [(TensorProto.INT32, TensorProto.FLOAT16), (TensorProto.INT64, TensorProto.FLOAT)]
)
def test_feeds_have_the_declared_dtypes(ids: int, dtype: int):
    model = tiny.build(tiny.Spec(ids=ids, dtype=dtype))
    feeds = inputs_of(model).feed(IDS)
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()} == declared
    assert open_session(model).run(None, feeds)[0].shape == (1, 8, tiny.VOCAB)


def test_no_cache():
    inputs = inputs_of(tiny.build(tiny.Spec(cache=False)))
    assert not inputs.has_cache
    assert set(inputs.feed(IDS)) == {"input_ids", "attention_mask", "position_ids"}


def test_symbolic_head_dim_needs_a_hint(tmp_path):
    model = tiny.build(tiny.Spec(head_dim="width"))
    with pytest.raises(ModelError, match="head_dim"):
        inputs_of(model).feed(IDS)
    assert inputs_of(model, head_dim=4).feed(IDS)["past_key_values.0.key"].shape == (1, 2, 0, 4)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 6, "num_attention_heads": 2}))
    assert inputs_of(model, folder=tmp_path).head_dim == 3
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"head_size": 4}}}))
    assert inputs_of(model, folder=tmp_path).head_dim == 4
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        inputs_of(model, folder=tmp_path)


def test_fused_attention_tells_its_head_dim(genai):
    inputs = ModelInputs.from_path(genai)
    feeds = inputs.feed(IDS)
    session = ort.InferenceSession(str(genai), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run([inputs.logits], feeds)[0]).all()


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("use_cache_branch", TensorProto.BOOL, [1], "merged decoder"),
        ("token_type_ids", TensorProto.INT64, ["b", "s"], "'token_type_ids'"),
        ("pixel_values", TensorProto.FLOAT, ["b", 3], "'pixel_values'"),
    ],
)
def test_unknown_input_is_named(name: str, dtype: int, shape: list, message: str):
    model = tiny.build()
    model.graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    model.graph.node.insert(0, helper.make_node("Identity", [name], ["read"]))
    with pytest.raises(ModelError, match=message):
        inputs_of(model)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "expected"),
    [
        ("use_cache_branch", TensorProto.BOOL, [1], (1,)),
        ("token_type_ids", TensorProto.INT64, ["b", "s"], (1, 8)),
        ("pos", TensorProto.INT64, ["b", "s"], (1, 8)),
        ("pixel_values", TensorProto.FLOAT16, ["b", 3, "h", "w"], (1, 3, 1, 1)),
        ("scale", TensorProto.DOUBLE, [], ()),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_an_input_that_nothing_reads_is_fed_zeros(first: bool, name: str, dtype: int, shape: list, expected: tuple):
    model = tiny.build()
    model.graph.input.insert(0 if first else len(model.graph.input), helper.make_tensor_value_info(name, dtype, shape))
    inputs = inputs_of(model)
    assert inputs.roles["attention_mask"].name == "MASK"
    feeds = inputs.feed(IDS)
    assert feeds[name].shape == expected
    assert feeds[name].dtype == helper.tensor_dtype_to_np_dtype(dtype)
    assert not feeds[name].any()
    alone = {given: array for given, array in feeds.items() if given != name}
    np.testing.assert_array_equal(
        open_session(model).run(None, feeds)[0], open_session(tiny.build()).run(None, alone)[0]
    )


def lone(kind: str, dtype: int, shape: list, *nodes: onnx.NodeProto, name: str = "extra") -> np.ndarray:
    """What is fed to an input beside those of the tiny decoder, which the given nodes read, for 3 tokens after 5."""
    model = tiny.build()
    model.graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    constants = {"one": np.array(1), "table": np.zeros((16, 2), np.float32), "data": np.zeros((2, 9, 4), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    inputs = inputs_of(model)
    assert inputs.roles[name].name == kind
    cache = {past: np.zeros((2, 2, 5, 4), np.float32) for past, _ in inputs.presents}
    return inputs.feed(np.zeros((2, 3), np.int64), cache)[name]


NODE = helper.make_node
COSINE, CUT = NODE("Cos", ["angle"], ["c"]), NODE("Slice", ["data", "n", "one"], ["made"])
POSITIONS = [NODE("Gather", ["table", "extra"], ["rows"])]


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "nodes", "expected"),
    [
        ("POSITIONS", TensorProto.INT64, ["s"], POSITIONS, [5, 6, 7]),
        ("POSITIONS", TensorProto.INT32, ["b", "s"], POSITIONS, [[5, 6, 7]] * 2),
        ("POSITIONS", TensorProto.INT64, [3, "b", "s"], POSITIONS, [[[5, 6, 7]] * 2] * 3),
        (
            "POSITIONS",
            TensorProto.INT64,
            [1, "s"],
            [NODE("Add", ["extra", "one"], ["angle"]), NODE("Cos", ["angle"], ["c"])],
            [[5, 6, 7]],
        ),
        ("KEPT", TensorProto.INT64, [1], [NODE("Neg", ["extra"], ["n"]), CUT], [3]),
        (
            "KEPT",
            TensorProto.INT64,
            [],
            [NODE("Sub", ["one", "extra"], ["n"]), NODE("Slice", ["data", "n", "one"], ["made"])],
            3,
        ),
        ("PAST_LENGTH", TensorProto.INT64, [1], [NODE("Slice", ["data", "extra", "one"], ["made"])], [5]),
        ("PAST_LENGTH", TensorProto.INT64, [], [NODE("Range", ["extra", "one", "one"], ["r"])], 5),
        ("TOTAL_LENGTH", TensorProto.INT64, [], [NODE("Range", ["one", "extra", "one"], ["r"])], 8),
    ],
)
def test_numbers_and_positions_by_what_reads_them(kind: str, dtype: int, shape: list, nodes: list, expected: list):
    fed = lone(kind, dtype, shape, *nodes)
    assert fed.dtype == helper.tensor_dtype_to_np_dtype(dtype)
    np.testing.assert_array_equal(fed, expected)


def test_masks_by_what_reads_them():
    hidden = 1 - np.tri(3, 8, 5)
    add = [NODE("Add", ["scores", "extra"], ["sum"]), NODE("Softmax", ["sum"], ["w"])]
    shape = ["b", 1, "s", "t"]
    fed = lone("BIAS", TensorProto.FLOAT, shape, NODE("Identity", ["data"], ["scores"]), *add)
    np.testing.assert_array_equal(fed, np.float32(-1e9) * np.tile(hidden, (2, 1, 1, 1)))
    low = lone("BIAS", TensorProto.FLOAT16, shape, NODE("Identity", ["data"], ["scores"]), *add)
    assert np.isfinite(low).all()
    ones = lone("MASK", TensorProto.FLOAT, shape, NODE("Sub", ["one", "extra"], ["n"]))
    np.testing.assert_array_equal(ones, np.tile(1 - hidden, (2, 1, 1, 1)))
    # What is joined to keys, or multiplied with queries, is a cache.
    for node in (NODE("Concat", ["extra", "data"], ["made"], axis=2), NODE("MatMul", ["data", "extra"], ["made"])):
        assert lone("PAST", TensorProto.FLOAT, ["b", 2, "past", 4], node).shape == (2, 2, 0, 4)


def test_a_cache_that_is_written_in_place():
    model = tiny.build()
    for value in (*model.graph.input, *model.graph.output):
        if "key" in value.name or "value" in value.name:
            value.type.tensor_type.shape.dim[2].dim_value = 12
    joined = inputs_of(model)
    assert (joined.lengths.past, joined.lengths.in_place) == (12, False)
    for node in model.graph.node:
        if node.op_type == "Concat":
            node.op_type = "Sum"  # whatever is no Concat
    assert inputs_of(model).lengths.in_place
    feeds = inputs_of(model).feed(IDS[:, :3])
    np.testing.assert_array_equal(feeds["attention_mask"], [[1, 1, 1]])
    np.testing.assert_array_equal(joined.feed(IDS[:, :3])["attention_mask"], [[0] * 12 + [1] * 3])
    assert feeds["past_key_values.0.key"].shape == (1, 2, 12, 4)


def test_ids_outside_the_vocabulary():
    with pytest.raises(CalibrationError, match=r"token id 32 is outside .* 32"):
        inputs_of(tiny.build()).feed(np.array([[1, 32]]))


@pytest.mark.parametrize("ids", [np.zeros(3, np.int64), np.zeros((1, 0), np.int64), np.zeros((1, 3))])
def test_malformed_ids(ids: np.ndarray):
    with pytest.raises(CalibrationError, match="token ids"):
        inputs_of(tiny.build()).feed(ids)
