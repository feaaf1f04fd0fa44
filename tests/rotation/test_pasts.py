"""A past that is fed becomes what the changed model's caches hold; of others nothing is guessed."""

import numpy as np
import odd_decoders as odd
import onnx_ir as ir
import pytest
from linear_graphs import two_linears

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.errors import CalibrationError
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.rotation.pasts import PastChange, past_change

MODEL = ir.from_proto(odd.build())
KEY, VALUE = (f"past_key_values.0.{part}" for part in ("key", "value"))
R = Rotation.hadamard(odd.HEAD_DIM, seed=1)
TURNED = Plan((), {"R2[16]": R}, {}, (), {"present.0.value": "R2[16]"})
FACTOR = np.random.default_rng(1).uniform(0.5, 2, (odd.HEADS, odd.HEAD_DIM))
SCALED = Plan((), {}, {}, (), {"present.0.value": "scales"}, scales={"present.0.value": FACTOR})


def change_of(plan: Plan) -> PastChange:
    change = past_change(plan, MODEL)
    assert change is not None
    return change


def past(*shape: int, dtype: type = np.float32) -> Feeds:
    rng = np.random.default_rng(2)
    return {name: (8 * rng.standard_normal(shape)).astype(dtype) for name in (KEY, VALUE)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_heads_are_rotated_in_the_caches_that_the_plan_names(dtype: type) -> None:
    feeds = past(2, odd.HEADS, 5, odd.HEAD_DIM, dtype=dtype)
    before = {name: array.copy() for name, array in feeds.items()}
    found = change_of(TURNED)(feeds)
    assert found[VALUE].dtype == dtype
    np.testing.assert_array_equal(found[VALUE], (feeds[VALUE].astype(np.float64) @ R.matrix()).astype(dtype))
    assert found[KEY] is feeds[KEY]
    for name, array in before.items():
        np.testing.assert_array_equal(feeds[name], array)


def test_values_are_scaled_head_by_head() -> None:
    feeds = past(2, odd.HEADS, 5, odd.HEAD_DIM)
    found = change_of(SCALED)(feeds)
    for head in range(odd.HEADS):
        np.testing.assert_allclose(found[VALUE][:, head], feeds[VALUE][:, head] * FACTOR[head], rtol=1e-6)
    # Once for each of six query heads, of which three share a KV head; and heads side by side.
    feeds = past(2, 3 * odd.HEADS, 5, odd.HEAD_DIM)
    found = change_of(SCALED)(feeds)
    for head in range(3 * odd.HEADS):
        np.testing.assert_allclose(found[VALUE][:, head], feeds[VALUE][:, head] * FACTOR[head // 3], rtol=1e-6)
    feeds = past(2, 5, odd.HEADS * odd.HEAD_DIM)
    np.testing.assert_allclose(change_of(SCALED)(feeds)[VALUE], feeds[VALUE] * FACTOR.reshape(-1), rtol=1e-6)


def test_keys_are_centred_and_multiplied_head_by_head() -> None:
    rng = np.random.default_rng(3)
    matrices, centres = (
        rng.standard_normal((odd.HEADS, odd.HEAD_DIM, odd.HEAD_DIM)),
        rng.random((odd.HEADS, odd.HEAD_DIM)),
    )
    name, feeds = "present.0.key", past(2, odd.HEADS, 5, odd.HEAD_DIM)
    for centre in (None, centres):
        more = {} if centre is None else {"centres": {name: centre}}
        found = change_of(Plan((), {}, {}, (), {name: "balances"}, matrices={name: matrices}, **more))(feeds)[KEY]
        for head in range(odd.HEADS):
            own = feeds[KEY][:, head] - (0 if centre is None else centre[head])
            np.testing.assert_allclose(found[:, head], own @ matrices[head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "given", "what"),
    [
        (TURNED, past(1, odd.HEADS, 5, odd.HEAD_DIM, dtype=np.int8), r"rotates \(R2\[16\]\)"),
        (TURNED, past(1, odd.HEADS, 5, odd.HEAD_DIM - 1), "rotates"),
        (SCALED, past(1, odd.HEADS, 5, odd.HEAD_DIM, dtype=np.uint8), "scales"),
        (SCALED, past(1, odd.HEADS + 1, 5, odd.HEAD_DIM), "scales"),
        (SCALED, past(1, odd.HEADS, odd.HEAD_DIM, 5), "scales"),
    ],
)
def test_what_it_becomes_is_not_known(plan: Plan, given: Feeds, what: str) -> None:
    with pytest.raises(
        CalibrationError, match=rf"the past 'past_key_values.0.value' \(.*\), whose values this run {what}"
    ):
        change_of(plan)(given)
    unused = {name: np.zeros_like(array) for name, array in given.items()}
    assert change_of(plan)(unused)[VALUE] is unused[VALUE]


def test_nothing_changes() -> None:
    assert past_change(Plan((), {}, {}, ()), MODEL) is None
    assert past_change(TURNED, ir.from_proto(two_linears())) is None
