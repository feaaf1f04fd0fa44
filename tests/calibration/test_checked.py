"""What a reader gives is looked at, and told in its own name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_decoders as tiny

from quarot_onnx.calibration.changed import ChangedReader
from quarot_onnx.calibration.checked import RewindableReader, wrap
from quarot_onnx.calibration.ranges import collect_ranges
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.errors import CalibrationError

IDS = np.array([[5, 6, 7]])
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(3)[None]}


class Mine:
    """A reader with get_next alone."""

    def __init__(self, *samples: Any) -> None:
        self.samples: Iterator[Any] = iter(samples)

    def get_next(self) -> Any:
        return next(self.samples, None)


class Stops(Mine):
    def get_next(self) -> Any:
        return next(self.samples)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([[5, 6, 7]], "a list for 'input_ids'"),
        ((5, 6), "a tuple for 'input_ids'"),
        (5, "a int for 'input_ids'"),
        (np.array([[5], None], object), "an array of objects for 'input_ids'"),
    ],
)
def test_lists_are_refused_by_name(value: object, what: str) -> None:
    reader = wrap(Mine(FEEDS, FEEDS | {"input_ids": value}))
    reader.get_next()
    with pytest.raises(CalibrationError, match=f"^Mine gives {what} in sample 1: need a NumPy array"):
        reader.get_next()
    with pytest.raises(CalibrationError, match=r"^SampleReader gives a list"):
        list(wrap(SampleReader([{"input_ids": [[5]]}])))  # type: ignore[dict-item]
    assert wrap(Mine({"x": np.int64(3)})).get_next() == {"x": np.array(3)}


def test_stop_iteration_is_told() -> None:
    with pytest.raises(
        CalibrationError, match=r"^Stops.get_next\(\) raised StopIteration after 2 samples: return None"
    ):
        list(wrap(Stops(FEEDS, FEEDS)))


def test_empty_readers_are_told_early() -> None:
    for reader in (Mine(), SampleReader([])):
        with pytest.raises(CalibrationError, match=f"reader {type(reader).__name__} is empty: it gave no sample"):
            wrap(reader).require_sample()
    reader = wrap(Mine(FEEDS, FEEDS))
    reader.require_sample()
    reader.require_sample()
    assert len(list(reader)) == 2, "what was read to find out is given all the same"
    assert reader.count == 2


def test_fewer_samples_than_were_asked_for() -> None:
    reader = wrap(Mine(FEEDS))
    assert reader.notes(3) == ()
    list(reader)
    assert reader.notes(None) == reader.notes(1) == ()
    assert reader.notes(3) == ("Mine gave 1 samples, fewer than CalibDataSize 3: calibrated on these",)


def test_negative_ids_are_refused_unless_hidden() -> None:
    model = ir.from_proto(tiny.build(tiny.Spec(cache=False)))
    wrong = FEEDS | {"input_ids": np.array([[5, -100, 7]])}
    with pytest.raises(CalibrationError, match=r"^Mine gives the token id -100 in sample 1: ids begin at 0"):
        collect_ranges(model, ["h"], Mine(FEEDS, wrong))
    hidden = wrong | {"input_ids": np.array([[5, 6, -100]]), "attention_mask": np.array([[1, 1, 0]])}
    assert collect_ranges(model, ["h"], Mine(hidden))["h"].max > 0


def test_a_changed_reader_speaks_for_the_one_that_it_reads() -> None:
    def doubled(feeds: dict[str, Any]) -> dict[str, Any]:
        return {name: 2 * array for name, array in feeds.items()}

    once = wrap(Mine(FEEDS, FEEDS))
    once.require_sample()
    reader = wrap(ChangedReader(once, doubled))
    assert [feeds["input_ids"].tolist() for feeds in reader] == [[[10, 12, 14]]] * 2
    assert once.count == 2
    assert reader.notes(3) == once.notes(3) != ()
    with pytest.raises(CalibrationError, match=r"^Mine has no rewind\(\) and has been read already"):
        list(reader)
    once = ChangedReader(wrap(Mine(FEEDS, FEEDS)), doubled)
    once.require_sample()
    assert len(list(once)) == 2, "what was read to find out is given all the same"
    own = SampleReader([FEEDS, FEEDS])
    again = ChangedReader(wrap(own), doubled)
    assert (again.name, again.size, again.bos, again.decode_steps) == ("SampleReader", 2, None, 0)
    assert len(list(again)) == len(list(again)) == 2


@pytest.mark.parametrize("kind", [Mine, SampleReader, dict])
def test_a_class_is_no_reader(kind: Any) -> None:
    with pytest.raises(
        CalibrationError, match=rf"^the class {kind.__name__} is no .*: pass {kind.__name__}\(\.\.\.\)$"
    ):
        wrap(kind)


class Reuses(Mine):
    """Writes every sample into the same arrays."""

    def get_next(self) -> Any:
        sample = super().get_next()
        if sample is None:
            return None
        self.array = getattr(self, "array", np.zeros_like(IDS))
        self.array[:] = sample
        return {"input_ids": self.array}


class RewindableReuses(Reuses, RewindableReader):
    def rewind(self) -> None:
        self.samples = iter((IDS, IDS + 1))


@pytest.mark.parametrize("kind", [Reuses, RewindableReuses])
def test_a_reader_may_use_its_arrays_again(kind: type[Reuses]) -> None:
    reader = wrap(kind(IDS, IDS + 1))
    first, second = list(reader)
    np.testing.assert_array_equal(first["input_ids"], IDS)
    np.testing.assert_array_equal(second["input_ids"], IDS + 1)
    kept = wrap(SampleReader([first]))
    assert next(iter(kept))["input_ids"] is first["input_ids"], "of readers of our own nothing is copied"
