"""What a mask hides is taken off samples, or its rows are passed over."""

import numpy as np
import onnx_ir as ir
import pytest
import tiny_decoders as tiny
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.padding import Padding, Sample
from quarot_onnx.errors import CalibrationError

ROWS = [[5, 6, 7, 8], [9, 10]]


def model(*, fixed: tuple[int | None, int | None] = (None, None), positions: bool = True) -> ir.Model:
    proto = tiny.build(tiny.Spec(cache=False, positions=positions))
    for value in proto.graph.input:
        for dim, length in zip(value.type.tensor_type.shape.dim, fixed, strict=True):
            if length is not None:
                dim.dim_value = length
    return ir.from_proto(proto)


def padded(side: str, length: int = 6, *, pad: int = 2, positions: bool = True) -> Feeds:
    ids, mask, place = (np.zeros((len(ROWS), length), np.int64) for _ in range(3))
    for row, tokens in enumerate(ROWS):
        where = slice(length - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row] = pad
        ids[row, where], mask[row, where], place[row, where] = tokens, 1, np.arange(len(tokens))
    return {"input_ids": ids, "attention_mask": mask} | ({"position_ids": place} if positions else {})


def ids_of(samples: list[Sample]) -> list[list[int]]:
    return [sample.feeds["input_ids"][0].tolist() for sample in samples]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.bool_, np.float32])
def test_each_row_is_a_sample_of_its_own(side: str, kind: type) -> None:
    feeds = padded(side)
    feeds["attention_mask"] = feeds["attention_mask"].astype(kind)
    samples = list(Padding(model()).samples(feeds, 3))
    assert ids_of(samples) == ROWS
    for sample, tokens in zip(samples, ROWS, strict=True):
        assert (sample.number, sample.visible) == (3, None)
        assert sample.feeds["position_ids"].tolist() == [list(range(len(tokens)))]
        assert sample.feeds["attention_mask"].all()
        assert sample.feeds["attention_mask"].dtype == kind


def test_what_has_no_padding_stays_one_sample() -> None:
    feeds = padded("left", 4)
    feeds["attention_mask"][:] = 1
    (sample,) = Padding(model()).samples(feeds, 0)
    assert sample.feeds is feeds
    assert sample.visible is None


def test_rows_that_are_hidden_as_a_whole_are_none() -> None:
    feeds = padded("left")
    feeds["attention_mask"][0] = 0
    padding = Padding(model())
    assert ids_of(list(padding.samples(feeds, 0))) == ROWS[1:]
    feeds["attention_mask"][:] = 0
    assert not list(padding.samples(feeds, 0))
    found = padding.tokens(feeds, 0)
    assert found is not None
    assert found.size == 0


@pytest.mark.parametrize("fixed", [(2, 6), (2, None), (None, 6)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_fixed_lengths_choose_rows_instead(fixed: tuple[int | None, int | None], side: str) -> None:
    padding = Padding(model(fixed=fixed))
    (sample,) = padding.samples(padded(side), 0)
    assert sample.visible is not None
    x = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    expected = np.concatenate([x[0, 2:], x[1, 4:]] if side == "left" else [x[0, :4], x[1, :2]])
    np.testing.assert_array_equal(sample.rows(x, "x"), expected)
    np.testing.assert_array_equal(sample.rows(x.reshape(12, 3), "x"), expected)
    heads = np.repeat(x, 2, axis=2).reshape(2, 6, 2, 3)
    assert sample.rows(heads, "x").shape == (12, 3)
    found = padding.tokens(padded(side), 0)
    assert found is not None
    assert found.tolist() == [*ROWS[0], *ROWS[1]]
    for other in (x.transpose(1, 0, 2), x[:, :1], x.reshape(-1)):
        with pytest.raises(CalibrationError, match=r"activation 'x' .* are not those of its tokens \[2, 6\]"):
            sample.rows(other, "x")


@pytest.mark.parametrize("side", ["left", "right"])
def test_heads_of_different_texts_stay_apart(side: str) -> None:
    """What attends to what is looked at in them."""
    (sample,) = Padding(model(fixed=(2, 6))).samples(padded(side), 0)
    x = np.arange(2 * 3 * 6 * 5).reshape(2, 3, 6, 5)
    for found in (sample.heads(x, "x"), sample.cached(x, "x")):
        cuts = (slice(2, 6), slice(4, 6)) if side == "left" else (slice(0, 4), slice(0, 2))
        for row, (part, cut) in enumerate(zip(found, cuts, strict=True)):
            np.testing.assert_array_equal(part, x[row : row + 1, :, cut])


def test_gaps_need_position_ids() -> None:
    def with_gap(*, positions: bool) -> Feeds:
        feeds = padded("right", 4, positions=positions)
        feeds["attention_mask"][0, 1] = 0
        return feeds

    assert ids_of(list(Padding(model()).samples(with_gap(positions=True), 0))) == [[5, 7, 8], [9, 10]]
    (sample,) = Padding(model(positions=False)).samples(with_gap(positions=False), 0)
    assert sample.visible is not None
    assert sample.visible.tolist() == [[True, False, True, True], [True, True, False, False]]


def test_a_cache_is_cut_along_its_positions() -> None:
    def cache(batch: int, length: int) -> NDArray[np.float32]:
        return np.arange(batch * 2 * length * 4, dtype=np.float32).reshape(batch, 2, length, 4)

    feeds: Feeds = {
        "input_ids": np.array([[5], [6]]),
        "position_ids": np.array([[3], [1]]),
        "attention_mask": np.array([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }
    feeds |= {f"past_key_values.0.{part}": cache(2, 3) for part in ("key", "value")}
    first, second = Padding(ir.from_proto(tiny.build())).samples(feeds, 0)
    np.testing.assert_array_equal(first.feeds["past_key_values.0.key"], cache(2, 3)[:1])
    np.testing.assert_array_equal(second.feeds["past_key_values.0.value"], cache(2, 3)[1:, :, 2:])
    assert (second.feeds["attention_mask"].tolist(), second.feeds["position_ids"].tolist()) == ([[1, 1]], [[1]])


def test_positions_may_serve_the_whole_batch() -> None:
    feeds = padded("right") | {"position_ids": np.arange(6)[None]}
    samples = list(Padding(model()).samples(feeds, 0))
    assert [sample.feeds["position_ids"].tolist() for sample in samples] == [[[0, 1, 2, 3]], [[0, 1]]]


def test_axes_that_are_not_known_are_refused() -> None:
    feeds = padded("left") | {"bias": np.zeros((3, 6), np.float32)}
    with pytest.raises(CalibrationError, match=r"sample 4 hides positions .* the input 'bias' \[3, 6\]"):
        list(Padding(model()).samples(feeds, 4))


def test_of_other_graphs_the_name_tells() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["b", "s", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g")
    feeds: Feeds = {"x": np.zeros((2, 3, 3), np.float32), "mask": np.array([[0, -1e9, -1e9], [0, 0, 0]], np.float32)}
    samples = list(Padding(ir.Model(graph, ir_version=10)).samples(feeds, 0))
    assert [sample.feeds["x"].shape for sample in samples] == [(1, 1, 3), (1, 3, 3)]


def test_rows_of_a_sample() -> None:
    """Tokens, not positions of a cache or features; what the mask hides is none."""
    padding = Padding(model())
    assert [padding.rows(sample) for sample in padding.samples(padded("left"), 0)] == [4, 2]
    fixed = Padding(model(fixed=(2, 6)))
    assert [fixed.rows(sample) for sample in fixed.samples(padded("left"), 0)] == [6]
    cached = tiny.Spec(cache=True)
    past = Padding(ir.from_proto(tiny.build(cached)))
    ids = np.ones((2, 3), np.int64)
    feeds = {"input_ids": ids, "past_key_values.0.key": np.zeros((2, 2, 900, 8), np.float32)}
    assert past.rows(Sample(feeds, 0)) == 6
    other = Padding(ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10))
    assert other.rows(Sample({"x": np.zeros((1, 5, 64), np.float32)}, 0)) == 5
    assert other.rows(Sample({"n": np.array(3)}, 0)) == 1
