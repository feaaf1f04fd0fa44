import numpy as np
import pytest
import tiny_decoders as tiny
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import CalibrationError, ModelError, VerificationError
from quarot_onnx.evaluation.equivalence import Tolerance, compare, require


@pytest.fixture
def original(tmp_path):
    return tiny.save(tiny.build(), tmp_path / "a")


def other(tmp_path, spec: tiny.Spec | None = None, arrays: dict | None = None):
    return tiny.save(tiny.build(spec, arrays), tmp_path / "b")


def test_a_rotated_model_passes(original, tmp_path):
    found = compare(original, other(tmp_path, arrays=tiny.rotated(tiny.weights())))
    assert found.passed
    # Float32 roundoff is 6e-8; eight-term sums over up to 34 positions make it a few dozen of these.
    assert 0 < found.rel_l2 < 5e-6
    assert (found.tokens, found.decode_steps, found.top1_agreement) == (2 * (32 + 2), 4, 1.0)
    assert found.kl < 1e-10
    require(found)


@pytest.mark.parametrize("name", ["E", "P", "Wk", "Wv", "Wo", "Wh"])
def test_one_weight_off_by_one_percent_fails(original, tmp_path, name: str):
    found = compare(original, other(tmp_path, arrays=tiny.spoiled(tiny.weights(), name)))
    assert not found.passed
    with pytest.raises(VerificationError, match=r"relative L2 .* \(allowed 2e-05\)"):
        require(found)


def test_a_fault_in_decoding_alone_is_found(original, tmp_path):
    path = other(tmp_path, tiny.Spec(forget=0.9))
    assert compare(original, path, decode_steps=0).passed
    assert not compare(original, path).passed


def test_real_text_is_used_where_a_tokenizer_lies_beside(original, tmp_path):
    path = other(tmp_path, arrays=tiny.rotated(tiny.weights()))
    tiny.tokenizer().save(str(original.parent / "tokenizer.json"))
    assert compare(original, path, random_tokens=0, real_tokens=100, seq_len=50, decode_steps=2).tokens == 104
    assert compare(original, path, seq_len=50).tokens == 2 * 2 * 52


def test_given_token_ids(original, tmp_path):
    path = other(tmp_path, arrays=tiny.rotated(tiny.weights()))
    ids = np.arange(20).reshape(2, 10)
    found = compare(original, path, token_ids=ids, random_tokens=0, decode_steps=3)
    assert (found.tokens, found.decode_steps) == (20, 6)
    with pytest.raises(CalibrationError, match="longer than 10 steps"):
        compare(original, path, token_ids=ids, decode_steps=10)
    with pytest.raises(CalibrationError, match="nothing to compare"):
        compare(original, path, random_tokens=0)


def test_the_seed_chooses_the_tokens(original, tmp_path):
    path = other(tmp_path, arrays=tiny.spoiled(tiny.weights(), "Wk"))
    first, again, different = (compare(original, path, seed=seed).rel_l2 for seed in (0, 0, 1))
    assert first == again != different


def test_no_cache_no_decode_steps(tmp_path):
    spec = tiny.Spec(cache=False)
    path_a, path_b = tiny.save(tiny.build(spec), tmp_path / "a"), other(tmp_path, spec, tiny.rotated(tiny.weights()))
    found = compare(path_a, path_b)
    assert found.passed
    assert (found.tokens, found.decode_steps) == (64, 0)


def test_float16_has_the_tolerance_of_float16(tmp_path):
    spec = tiny.Spec(dtype=TensorProto.FLOAT16)
    path_a, path_b = tiny.save(tiny.build(spec), tmp_path / "a"), other(tmp_path, spec, tiny.rotated(tiny.weights()))
    found = compare(path_a, path_b)
    assert found.passed
    assert found.dtype.name == "FLOAT16"
    # It is rounding to 11 bits that is seen here, far above the tolerance of float32.
    assert found.rel_l2 > 2e-5


def test_a_tolerance_of_ones_own(original, tmp_path):
    path = other(tmp_path, arrays=tiny.spoiled(tiny.weights(), "Wo"))
    assert compare(original, path, tolerance=Tolerance(max_rel=0.1, rel_l2=0.1, top1=0.5)).passed


def test_nan_in_the_other_model_fails_and_in_the_original_is_refused(original, tmp_path):
    arrays = tiny.weights()
    arrays["Wh"][0, 0] = np.nan
    path = other(tmp_path, arrays=arrays)
    assert not compare(original, path).passed
    with pytest.raises(ModelError, match="NaN or infinity on its own"):
        compare(path, original)


@pytest.mark.parametrize(("weight", "value"), [("Wh", np.nan), ("Wo", np.inf), ("Wo", -np.inf), ("E", np.nan)])
def test_a_weight_that_is_damaged_is_named(original, tmp_path, weight: str, value: float):
    arrays = tiny.weights()
    arrays[weight][...] = np.where(np.arange(arrays[weight].shape[-1]) == 1, value, arrays[weight])
    with pytest.raises(
        ModelError, match=rf"on its own: the weight '{weight}' of '\S+' holds some, .*; export the model"
    ):
        compare(other(tmp_path, arrays=arrays), original)


@pytest.mark.parametrize("never", [-1e9, float(np.finfo(np.float32).min), -np.inf, -1e4])
def test_tokens_that_never_come_hide_no_fault(tmp_path, never: float):
    cacheless = tiny.Spec(cache=False)  # caches would show the fault, too
    path = tiny.masked(tiny.save(tiny.build(cacheless), tmp_path / "a"), never)
    same = tiny.masked(other(tmp_path, cacheless, tiny.rotated(tiny.weights())), never)
    found = compare(path, same)
    assert found.passed
    assert found.top1_agreement == 1.0
    for name in ("E", "Wo", "Wh"):
        faulty = tiny.masked(other(tmp_path / name, cacheless, tiny.spoiled(tiny.weights(), name)), never)
        found = compare(path, faulty)
        assert not found.passed
        assert found.rel_l2 > 1e-4


def test_different_vocabularies(original, tmp_path):
    with pytest.raises(ModelError, match=r"vocabulary of 32 .* 40"):
        compare(original, other(tmp_path, tiny.Spec(vocab=40)))


def generic(folder, scale: float = 1.0, name: str = "x"):
    info = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * np.float32(scale), "w")
    nodes = [helper.make_node("MatMul", [name, "w"], ["y"])]
    shapes = info(name, TensorProto.FLOAT, ["b", "n", 4]), info("y", TensorProto.FLOAT, ["b", "n", 4])
    graph = helper.make_graph(nodes, "g", [shapes[0]], [shapes[1]], [weight])
    return tiny.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder)


def test_graphs_that_are_no_decoders(tmp_path):
    path = generic(tmp_path / "a")
    found = compare(path, generic(tmp_path / "b"))
    assert found.passed
    assert (found.kl, found.top1_agreement, found.decode_steps) == (None, None, 0)
    found = compare(path, generic(tmp_path / "c", scale=1.01))
    assert not found.passed
    assert found.rel_l2 == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(VerificationError):
        require(found)
    with pytest.raises(ModelError, match="different inputs"):
        compare(path, generic(tmp_path / "d", name="z"))


def test_nothing_is_written_beside_the_models(original, tmp_path):
    path = other(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    compare(original, path)
    assert sorted(tmp_path.rglob("*")) == before
