"""GPTQ, GPTAQ and Qronos against their papers' formulas, their bounds, and inputs that are not nice."""

import numpy as np
import pytest
from weights_by_hand import gptq_by_hand, inputs, qronos_by_hand, statistics

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.choices import Method
from quarot_onnx.config.rounding import (
    GPTAQConfig,
    GPTQConfig,
    HessianConfig,
    QronosConfig,
    RoundingConfig,
    RTNConfig,
)
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding import correcting, gptaq, solve
from quarot_onnx.rounding.factor import factorise
from quarot_onnx.rounding.methods import METHODS, round_weight
from quarot_onnx.rounding.solve import Rounded
from quarot_onnx.threads import one_blas_thread

SEQUENTIAL = [GPTQConfig(), GPTAQConfig(), GPTAQConfig(alpha=1.0), QronosConfig(), QronosConfig(alpha=1.0)]
SETTINGS = {
    "plain": (WeightScheme(4), {}),
    "2 bits": (WeightScheme(2), {"block_size": 8}),
    "3 bits asymmetric": (WeightScheme(3, symmetric=False), {"block_size": 7}),
    "8 bits unsigned": (WeightScheme(8, signed=False), {"block_size": 1}),
    "asymmetric unsigned": (WeightScheme(4, symmetric=False, signed=False), {"perc_damp": 0.1}),
    "per tensor": (WeightScheme(4, per_channel=False), {"block_size": 10}),
    "act order": (WeightScheme(4), {"act_order": True, "block_size": 6}),
    "moving groups": (WeightScheme(4, group_size=5), {"block_size": 8}),
    "moving groups, asymmetric": (WeightScheme(3, symmetric=False, group_size=16), {"block_size": 5}),
    "static groups": (WeightScheme(4, group_size=8), {"static_groups": True, "block_size": 6}),
    "static groups, act order": (
        WeightScheme(4, symmetric=False, signed=False, group_size=4),
        {"static_groups": True, "act_order": True, "block_size": 5},
    ),
}


def weights(rows: int, columns: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def by_hand(weight: np.ndarray, found: Statistics, scheme: WeightScheme, options: HessianConfig) -> np.ndarray:
    exact = weight.astype(np.float64)
    match options:
        case QronosConfig():
            return qronos_by_hand(exact, found, scheme, options)
        case GPTAQConfig():
            return gptq_by_hand(exact, found, scheme, options, options.alpha)
        case _:
            return gptq_by_hand(exact, found, scheme, options)


@pytest.mark.parametrize("features", [1, 2, 23, 40])
@pytest.mark.parametrize("options", SEQUENTIAL, ids=repr)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_integers_are_those_of_the_papers_formula(setting: str, options: HessianConfig, features: int) -> None:
    scheme, changes = SETTINGS[setting]
    options = options.model_copy(update=changes)
    found = statistics(*inputs(90, features))
    weight = weights(features, 6)
    rounded = round_weight(weight, found, scheme, options, "w")
    assert rounded.damping == options.perc_damp
    assert rounded.weight.integers.dtype == scheme.dtype
    assert (rounded.weight.integers == by_hand(weight, found, scheme, options)).all()


@pytest.mark.parametrize("options", SEQUENTIAL, ids=repr)
def test_tiles_of_columns_do_not_matter(options: HessianConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found, weight = statistics(*inputs(90, 24)), weights(24, 13)
    for scheme in (WeightScheme(4), WeightScheme(4, group_size=6), WeightScheme(4, per_channel=False)):
        whole = round_weight(weight, found, scheme, options, "w").weight
        with monkeypatch.context() as patch:
            patch.setattr(solve, "_TILE", 5)
            tiled = round_weight(weight, found, scheme, options, "w").weight
        assert (whole.integers == tiled.integers).all()
        assert (whole.scale == tiled.scale).all()
        assert (whole.zero_point == tiled.zero_point).all()


@pytest.mark.parametrize("options", [RTNConfig(), *SEQUENTIAL], ids=repr)
def test_same_inputs_same_bits_and_nothing_is_written_to(options: RoundingConfig) -> None:
    found, weight = statistics(*inputs(200, 96)), weights(96, 40)
    kept = weight.copy(), found.hessian.copy(), found.drift.copy()
    scheme = WeightScheme(4, symmetric=False, group_size=32)
    first, second = (round_weight(weight, found, scheme, options, "w").weight for _ in range(2))
    for name in ("integers", "scale", "zero_point"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    for before, after in zip(kept, (weight, found.hessian, found.drift), strict=True):
        assert (before == after).all()


def errors(weight: np.ndarray, exact: np.ndarray, moved: np.ndarray, rounded: Rounded) -> tuple[float, float]:
    """||X̃(W - Q)|| and ||XW - X̃Q||."""
    values = rounded.weight.dequantized().astype(np.float64)
    return float(np.linalg.norm(moved @ (weight - values))), float(np.linalg.norm(exact @ weight - moved @ values))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_method_beats_the_one_before_and_none_the_least_squares_bound(bits: int, seed: int) -> None:
    exact, moved = inputs(400, 64, drift=0.05, seed=seed)
    weight = weights(64, 32, seed)
    found, scheme = statistics(exact, moved), WeightScheme(bits)
    rtn, gptq, gptaq, qronos = (
        errors(weight, exact, moved, round_weight(weight, found, scheme, options, "w"))
        for options in (RTNConfig(), GPTQConfig(), GPTAQConfig(perc_damp=0.01), QronosConfig(perc_damp=0.01, alpha=1.0))
    )
    assert gptq[0] < 0.8 * rtn[0]
    assert gptaq[1] < gptq[1] < rtn[1]
    assert qronos[1] < gptq[1]
    best = np.linalg.lstsq(moved, exact @ weight.astype(np.float64), rcond=None)[0]
    bound = np.linalg.norm(exact @ weight - moved @ best)
    assert bound > 0.0
    assert bound < min(rtn[1], gptq[1], gptaq[1], qronos[1])


def test_at_eight_bits_qronos_comes_near_the_bound_and_gptq_does_not() -> None:
    exact, moved = inputs(400, 64)
    weight = weights(64, 32)
    best = np.linalg.lstsq(moved, exact @ weight.astype(np.float64), rcond=None)[0]
    bound = np.linalg.norm(exact @ weight - moved @ best)
    found = statistics(exact, moved)
    gptq, qronos = (
        errors(weight, exact, moved, round_weight(weight, found, WeightScheme(8), options, "w"))[1]
        for options in (GPTQConfig(perc_damp=1e-4), QronosConfig(perc_damp=1e-4, alpha=1.0))
    )
    assert qronos < 1.05 * bound
    assert gptq > 1.3 * bound


def test_a_scale_is_taken_where_it_costs_its_column_less_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = inputs(400, 64)
    found, weight = statistics(exact, exact), weights(64, 200)

    def rounded() -> tuple[np.ndarray, np.ndarray]:
        result = round_weight(weight, found, WeightScheme(4), GPTQConfig(perc_damp=1e-6), "w").weight
        return result.scale[0], np.linalg.norm(exact @ (weight - result.dequantized()), axis=0)

    scales, errors_ = rounded()
    monkeypatch.setattr(solve, "MULTIPLES", (1.0,))
    alone, more = rounded()
    same = scales == alone
    assert 20 < same.sum() < 180
    assert (errors_[same] == more[same]).all()
    assert (errors_[~same] < more[~same]).all()


@pytest.mark.parametrize(
    "options", [GPTAQConfig(perc_damp=0.01, alpha=1.0), QronosConfig(perc_damp=0.01, alpha=1.0)], ids=repr
)
def test_without_drift_all_is_gptq(options: HessianConfig) -> None:
    exact, _ = inputs(100, 30)
    found, weight = statistics(exact, exact), weights(30, 8)
    assert found.drift is not None
    assert not found.drift.any()
    plain = round_weight(weight, found, WeightScheme(3), GPTQConfig(), "w").weight
    same = round_weight(weight, found, WeightScheme(3), options, "w").weight
    assert (plain.integers == same.integers).all()
    assert (plain.scale == same.scale).all()


def test_a_diagonal_hessian_makes_gptq_round_to_nearest() -> None:
    found = Statistics(np.diag(np.geomspace(1, 1e6, 20)), None, 7)
    weight = weights(20, 9)
    for scheme in (WeightScheme(4), WeightScheme(4, group_size=4, symmetric=False)):
        rounded = round_weight(weight, found, scheme, GPTQConfig(mse=False), "w").weight
        nearest = round_weight(weight, None, scheme, RTNConfig(mse=False), "w").weight
        assert (rounded.integers == nearest.integers).all()


@pytest.mark.parametrize("options", SEQUENTIAL, ids=repr)
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing(options: HessianConfig) -> None:
    exact, moved = inputs(120, 31)
    dead, live = [4, 17, 30], [i for i in range(31) if i not in (4, 17, 30)]
    exact[:, dead] = moved[:, dead] = 0.0
    weight = weights(31, 5)
    weight[dead] *= 0.5  # small enough to leave the grids to the others
    plain = options.model_copy(update={"mse": False})
    whole = round_weight(weight, statistics(exact, moved), WeightScheme(4), plain, "w").weight
    without = round_weight(weight[live], statistics(exact[:, live], moved[:, live]), WeightScheme(4), plain, "w").weight
    # The products of a narrower matrix are summed in another order: float32's rounding, amplified by the correction.
    np.testing.assert_allclose(whole.scale, without.scale, rtol=1e-5)
    assert (whole.integers[live] == without.integers).all()
    assert (whole.integers[dead] == np.rint(weight[dead] / whole.scale.astype(np.float64))).all()


@pytest.mark.parametrize(
    "options", [GPTAQConfig(perc_damp=0.01, alpha=1.0), QronosConfig(perc_damp=0.01, alpha=1.0)], ids=repr
)
def test_what_only_the_float_path_feels_of_an_input_is_made_good_by_the_others(options: HessianConfig) -> None:
    exact, moved = inputs(300, 20, drift=0.0)
    exact[:, 3] += exact[:, 8]
    moved[:, 3] = 0.0
    found, weight = statistics(exact, moved), weights(20, 16)
    assert (
        round_weight(weight, found, WeightScheme(4), options, "w").weight.integers
        == by_hand(weight, found, WeightScheme(4), options)
    ).all()
    plain = errors(weight, exact, moved, round_weight(weight, found, WeightScheme(4), GPTQConfig(), "w"))[1]
    assert errors(weight, exact, moved, round_weight(weight, found, WeightScheme(4), options, "w"))[1] < 0.8 * plain


@pytest.mark.parametrize("options", [RTNConfig(), *SEQUENTIAL], ids=repr)
def test_inputs_that_are_all_dead_leave_rounding_to_nearest(options: RoundingConfig) -> None:
    found = Statistics(np.zeros((9, 9)), np.zeros((9, 9)), 50)
    weight = weights(9, 4)
    rounded = round_weight(weight, found, WeightScheme(4), options, "w").weight
    assert (rounded.integers == round_weight(weight, None, WeightScheme(4), RTNConfig(), "w").weight.integers).all()


@pytest.mark.parametrize("options", SEQUENTIAL, ids=repr)
def test_fewer_tokens_than_inputs(options: HessianConfig) -> None:
    exact, moved = inputs(10, 48)
    found, weight = statistics(exact, moved), weights(48, 12)
    rounded = round_weight(weight, found, WeightScheme(4), options, "w")
    assert rounded.damping == options.perc_damp
    assert (rounded.weight.integers == by_hand(weight, found, WeightScheme(4), options)).all()
    nearest = round_weight(weight, None, WeightScheme(4), RTNConfig(), "w")
    assert errors(weight, exact, moved, rounded)[1] < errors(weight, exact, moved, nearest)[1]


@pytest.mark.parametrize("options", [RTNConfig(), *SEQUENTIAL], ids=repr)
def test_zero_and_constant_columns_and_rows(options: RoundingConfig) -> None:
    found, weight = statistics(*inputs(100, 24)), weights(24, 6)
    weight[5], weight[6], weight[:, 1], weight[:, 2] = 0.0, 0.5, 0.0, 0.25
    for scheme in (WeightScheme(4), WeightScheme(4, symmetric=False, signed=False, group_size=8)):
        rounded = round_weight(weight, found, scheme, options, "w").weight
        assert np.isfinite(rounded.dequantized()).all()
        assert rounded.integers.min() >= scheme.low
        assert rounded.integers.max() <= scheme.high
        assert (rounded.dequantized()[:, 1] == 0.0).all()


def test_a_hessian_that_cannot_be_factorised_raises_the_damping_and_tells() -> None:
    exact, _ = inputs(10, 48)
    hessian = exact.T @ exact / 10  # of rank 10
    found, weight = Statistics(hessian, None, 10), weights(48, 6)
    rounded = round_weight(weight, found, WeightScheme(4), GPTQConfig(perc_damp=1e-300), "w")
    assert rounded.damping == pytest.approx(1e-3)
    expected = round_weight(weight, found, WeightScheme(4), GPTQConfig(perc_damp=rounded.damping), "w")
    assert (rounded.weight.integers == expected.weight.integers).all()
    indefinite = hessian - 0.05 * np.diag(hessian).mean() * np.eye(48)
    assert factorise(indefinite, 0.01, "w").damping == pytest.approx(0.1)


def test_a_pivot_that_is_all_rounding_counts_as_a_failure() -> None:
    twins = np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    assert factorise(twins, 0.0, "w").damping == pytest.approx(1e-3)
    assert factorise(np.diag([1e-300, 1.0]), 0.0, "w").damping == 0.0


def test_dead_inputs_need_no_damping() -> None:
    factors = factorise(np.diag([2.0, 0.0, 4.0]), 0.0, "w")
    assert factors.damping == 0.0
    np.testing.assert_allclose(np.diag(factors.inverse) ** -2, [2.0, 1.0, 4.0], rtol=1e-15)


def test_a_hessian_beyond_all_damping_is_refused_by_name() -> None:
    hessian = np.eye(5)
    hessian[0, 4] = hessian[4, 0] = 3.0
    with pytest.raises(CalibrationError, match=r"'layers\.0/o_proj' is not positive definite even with damping 1;"):
        round_weight(weights(5, 2), Statistics(hessian, None, 9), WeightScheme(4), GPTQConfig(), "layers.0/o_proj")


@pytest.mark.parametrize("features", [1, 2, 17])
def test_the_factor_is_that_of_the_damped_hessians_inverse(features: int) -> None:
    exact, _ = inputs(60, features)
    hessian = exact.T @ exact / 60
    factors = factorise(hessian, 0.02, "w")
    damped = hessian + 0.02 * np.diag(hessian).mean() * np.eye(features)
    # The condition number is below 1e4: float64 leaves 1e-11.
    np.testing.assert_array_equal(factors.first, damped[0])
    np.testing.assert_allclose(factors.inverse.T @ factors.inverse @ damped, np.eye(features), atol=1e-11)
    assert (np.tril(factors.inverse, -1) == 0.0).all()


@pytest.mark.parametrize("options", [RTNConfig(), *SEQUENTIAL], ids=repr)
def test_nan_in_the_weight_is_the_models_fault(options: RoundingConfig) -> None:
    found, weight = statistics(*inputs(50, 8)), weights(8, 3)
    weight[2, 1] = np.nan
    with pytest.raises(ModelError, match="'q_proj' holds NaN or infinity"):
        round_weight(weight, found, WeightScheme(4), options, "q_proj")


@pytest.mark.parametrize("field", ["hessian", "drift"])
def test_nan_in_the_statistics_is_the_calibrations_fault(field: str) -> None:
    found = statistics(*inputs(50, 8))
    getattr(found, field)[3, 3] = np.nan
    with pytest.raises(CalibrationError, match="calibration inputs of 'q_proj' hold NaN"):
        round_weight(weights(8, 3), found, WeightScheme(4), QronosConfig(), "q_proj")


def test_act_order_needs_static_groups() -> None:
    found = statistics(*inputs(50, 8))
    with pytest.raises(ConfigError, match=r"act_order with group_size 4 .* 'q_proj' .*static_groups"):
        round_weight(weights(8, 3), found, WeightScheme(4, group_size=4), GPTQConfig(act_order=True), "q_proj")


def test_the_configuration_says_which_method_and_what_it_needs() -> None:
    table = {
        RTNConfig: (False, False),
        GPTQConfig: (True, False),
        GPTAQConfig: (True, True),
        QronosConfig: (True, True),
    }
    for owner, expected in table.items():
        assert (owner().needs_statistics, owner().needs_drift) == expected
    assert METHODS.keys() == {owner for owner, (statistics_, _) in table.items() if statistics_}
    assert {owner().name for owner in table} == set(Method)


@pytest.mark.parametrize("options", SEQUENTIAL[:4:3], ids=repr)
@pytest.mark.parametrize("setting", ["plain", "moving groups", "per tensor"])
def test_the_number_of_threads_changes_no_bit(
    setting: str, options: HessianConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, extra = SETTINGS[setting]
    options = options.model_copy(update=extra)
    monkeypatch.setattr(solve, "_TILE", 24)
    weight, found = weights(40, 100), []
    with one_blas_thread():
        for threads in (1, 2, 5):
            monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
            found.append(round_weight(weight, statistics(*inputs(200, 40)), scheme, options, "w").weight)
    for other in found[1:]:
        np.testing.assert_array_equal(other.integers, found[0].integers)
        np.testing.assert_array_equal(other.scale, found[0].scale)


@pytest.mark.parametrize("options", [GPTAQConfig(alpha=1.0), QronosConfig(alpha=1.0)], ids=repr)
@pytest.mark.parametrize("features", [1, 6, 7, 40])
def test_panels_and_tiles_change_nothing(
    features: int, options: HessianConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, found = weights(features, 21), statistics(*inputs(200, features))
    whole = round_weight(weight, found, WeightScheme(4), options, "w").weight
    for module in (gptaq, correcting):
        monkeypatch.setattr(module, "_PANEL", 6)
    monkeypatch.setattr(correcting, "_TILE", 3)
    monkeypatch.setattr(solve, "_TILE", 4)
    cut = round_weight(weight, found, WeightScheme(4), options, "w").weight
    np.testing.assert_array_equal(cut.integers, whole.integers)
