import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from onnx import TensorProto, helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import InputRole
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


def test_session_and_graph_tell_the_same():
    model = tiny.build()
    assert ModelInputs.from_session(open_session(model)) == inputs_of(model)


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
    with pytest.raises(ModelError, match=message):
        inputs_of(model)


def test_ids_outside_the_vocabulary():
    with pytest.raises(CalibrationError, match=r"token id 32 is outside .* 32"):
        inputs_of(tiny.build()).feed(np.array([[1, 32]]))


@pytest.mark.parametrize("ids", [np.zeros(3, np.int64), np.zeros((1, 0), np.int64), np.zeros((1, 3))])
def test_malformed_ids(ids: np.ndarray):
    with pytest.raises(CalibrationError, match="token ids"):
        inputs_of(tiny.build()).feed(ids)
