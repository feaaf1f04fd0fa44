"""Lazy tensors that cannot lie, and reading without keeping."""

from contextlib import closing

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.errors import ModelError
from quarot_onnx.io.tensors import computed_ahead, lazy_tensor, read_array, read_rows
from quarot_onnx.threads import limited_to, thread_count

ARRAYS = {
    ir.DataType.FLOAT: np.arange(12, dtype=np.float32).reshape(4, 3),
    ir.DataType.FLOAT16: np.arange(12, dtype=np.float16).reshape(4, 3),
    ir.DataType.BFLOAT16: np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16),
    ir.DataType.INT8: (np.arange(12) - 6).astype(np.int8).reshape(4, 3),
    ir.DataType.UINT8: np.arange(12).astype(np.uint8).reshape(4, 3),
    ir.DataType.INT4: (np.arange(12) - 6).astype(ml_dtypes.int4).reshape(4, 3),
    ir.DataType.UINT4: np.arange(12).astype(ml_dtypes.uint4).reshape(4, 3),
    ir.DataType.INT32: np.arange(12, dtype=np.int32).reshape(4, 3),
    ir.DataType.INT64: np.arange(12, dtype=np.int64).reshape(4, 3),
}


def external(tmp_path, dtype: ir.DataType) -> ir.ExternalTensor:
    """A tensor in a file, 64 bytes from its start."""
    tensor = ir.Tensor(ARRAYS[dtype], dtype=dtype)
    path = tmp_path / "data"
    path.write_bytes(bytes(64) + tensor.tobytes() + b"behind")
    return ir.ExternalTensor(str(path), 64, tensor.nbytes, dtype, shape=ir.Shape([4, 3]), name="w")


@pytest.mark.parametrize("dtype", ARRAYS)
def test_lazy_tensor_writes_the_same_bytes_as_an_eager_one(dtype):
    lazy = lazy_tensor(lambda: ARRAYS[dtype], dtype=dtype, shape=[4, 3], name="w")
    assert (lazy.dtype, lazy.shape, lazy.name) == (dtype, ir.Shape([4, 3]), "w")
    assert lazy.tobytes() == ir.Tensor(ARRAYS[dtype], dtype=dtype).tobytes()
    np.testing.assert_array_equal(read_array(lazy), ARRAYS[dtype])


@pytest.mark.parametrize(("dtype", "plain"), [(ir.DataType.INT4, np.int8), (ir.DataType.UINT4, np.uint8)])
def test_lazy_4_bit_tensors_take_plain_integers(dtype, plain):
    lazy = lazy_tensor(lambda: ARRAYS[dtype].astype(plain), dtype=dtype, shape=[4, 3], name="w")
    assert lazy.nbytes == 6
    assert lazy.tobytes() == ir.Tensor(ARRAYS[dtype], dtype=dtype).tobytes()


@pytest.mark.parametrize(
    ("dtype", "value", "plain"), [("INT4", 8, np.int8), ("INT4", -9, np.int8), ("UINT4", 16, np.uint8)]
)
def test_lazy_4_bit_tensors_refuse_values_out_of_range(dtype, value, plain):
    lazy = lazy_tensor(lambda: np.full((2,), value, plain), dtype=ir.DataType[dtype], shape=[2], name="w")
    with pytest.raises(AssertionError, match=f"'w' has values beyond {dtype}"):
        lazy.tobytes()


def test_lazy_tensor_names_both_types_or_both_shapes():
    array = np.zeros((2, 3), np.float64)
    with pytest.raises(AssertionError, match="'w' has type float64, declared FLOAT"):
        lazy_tensor(lambda: array, dtype=ir.DataType.FLOAT, shape=[2, 3], name="w").numpy()
    with pytest.raises(AssertionError, match=r"'w' has shape \(2, 3\), declared \(3, 2\)"):
        lazy_tensor(lambda: array, dtype=ir.DataType.DOUBLE, shape=[3, 2], name="w").numpy()


def test_lazy_tensor_is_computed_each_time():
    calls = []
    lazy = lazy_tensor(lambda: calls.append(1) or np.ones(2, np.float32), dtype=ir.DataType.FLOAT, shape=[2], name="w")
    assert not calls
    lazy.numpy()
    lazy.numpy()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", ARRAYS)
def test_read_array_gives_an_own_writable_copy_and_holds_no_map(tmp_path, dtype):
    tensor = external(tmp_path, dtype)
    array = read_array(tensor)
    np.testing.assert_array_equal(array, ARRAYS[dtype])
    assert array.dtype == ARRAYS[dtype].dtype
    assert array.flags.writeable
    assert array.flags.owndata
    assert tensor.raw is None
    array[:] = 0
    np.testing.assert_array_equal(read_array(tensor), ARRAYS[dtype])


def test_read_array_copies_tensors_in_memory():
    original = np.ones((2, 2), np.float32)
    read_array(ir.Tensor(original))[:] = 0
    assert original.all()


@pytest.mark.parametrize("dtype", ARRAYS)
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (3, 9), (2, 2), (3, 1), (-2, 4)])
def test_read_rows_is_a_slice_of_read_array(tmp_path, dtype, start, stop):
    for tensor in (external(tmp_path, dtype), ir.Tensor(ARRAYS[dtype], dtype=dtype)):
        rows = read_rows(tensor, start, stop)
        np.testing.assert_array_equal(rows, ARRAYS[dtype][start:stop])
        assert rows.flags.writeable


def test_rows_are_read_into_an_array_that_is_there(tmp_path):
    tensor, into = external(tmp_path, ir.DataType.FLOAT), np.empty((2, 3), np.float32)
    assert read_rows(tensor, 1, 3, into) is into
    np.testing.assert_array_equal(into, ARRAYS[ir.DataType.FLOAT][1:3])
    for wrong in (np.empty((3, 3), np.float32), np.empty((2, 3), np.float64), np.empty((3, 2), np.float32).T):
        with pytest.raises(AssertionError):
            read_rows(tensor, 1, 3, wrong)


def test_scalars_and_empty_tensors_are_read(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.float32(2.5).tobytes())
    scalar = ir.ExternalTensor(str(path), 0, 4, ir.DataType.FLOAT, shape=ir.Shape([]), name="s")
    assert read_array(scalar) == np.float32(2.5)
    empty = ir.ExternalTensor(str(path), 0, 0, ir.DataType.FLOAT, shape=ir.Shape([0, 3]), name="e")
    assert read_array(empty).shape == (0, 3)


def test_a_data_file_that_shrank_is_a_model_error(tmp_path):
    tensor = external(tmp_path, ir.DataType.FLOAT)
    path = tmp_path / "data"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="shrank since the model was opened: tensor 'w' needs 48 bytes at 64"):
        read_array(tensor)


def test_tensors_are_computed_one_ahead_and_in_order() -> None:
    made: list[int] = []

    def made_of(number: int) -> ir.TensorProtocol:
        def compute() -> np.ndarray:
            made.append(number)
            return np.full(3, number, np.float32)

        return lazy_tensor(compute, dtype=ir.DataType.FLOAT, shape=[3], name=f"w{number}")

    plain = ir.tensor(np.full(3, 2, np.float32))
    with closing(computed_ahead([made_of(0), made_of(1), plain, made_of(3), made_of(4)])) as tensors:
        for number, tensor in enumerate(tensors):
            assert (tensor.numpy() == number).all()
            assert not isinstance(tensor, ir.LazyTensor)  # computed once
            assert set(made) <= set(range(number + 2))  # nothing beyond the next one
    assert made == [0, 1, 3, 4]


def test_what_fails_ahead_is_raised_in_its_turn() -> None:
    def compute() -> np.ndarray:
        raise ZeroDivisionError

    plain = ir.tensor(np.zeros(3, np.float32))
    bad = lazy_tensor(compute, dtype=ir.DataType.FLOAT, shape=[3], name="bad")
    with closing(computed_ahead([plain, bad, plain])) as tensors:
        assert next(tensors) is plain
        with pytest.raises(ZeroDivisionError):
            next(tensors)
    assert list(computed_ahead([])) == []


def test_the_threads_asked_for_are_those_of_what_is_computed() -> None:
    tensor = lazy_tensor(lambda: np.array([thread_count()]), dtype=ir.DataType.INT64, shape=[1], name="threads")
    with limited_to(7), closing(computed_ahead([tensor])) as tensors:
        assert [int(found.numpy()[0]) for found in tensors] == [7]
