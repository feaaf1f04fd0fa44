"""What AMD Quark's published ONNX examples set: taken, or refused by the key that asks for what is missing."""

from collections.abc import Callable

import pytest

from quarot_onnx.config import CalibMethod, GPTQConfig, Int8Spec, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.errors import ConfigError

LAYER = QLayerConfig(UInt8Spec(), Int8Spec())


def test_the_options_of_the_quarot_example():
    config = QConfig(
        LAYER,
        algo_config=[QuarotConfig(r_matrix_dim=64, use_random_had=False)],
        extra_options={
            "RemoveInputInit": False,
            "SimplifyModel": False,
            "CopySharedInit": None,
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            "CalibMovingAverage": False,
            "ActivationSymmetric": True,
            "MatMulConstBOnly": True,
            "TmpDir": ".",
            "Percentile": 99.99,
        },
    )
    assert config.activation_symmetric is True
    assert config.percentile == 99.99
    assert {"RemoveInputInit", "SimplifyModel", "TmpDir"} <= set(config.ignored_options)


def test_weights_alone_and_gptq():
    QConfig(LAYER, use_external_data_format=True, OpTypesToQuantize=["MatMul"], WeightsOnly=True, UseFP32Scale=True)
    gptq = GPTQConfig(bits=8, block_size=128, perc_damp=0.01, act_order=False, per_channel=True, mse=False)
    assert QConfig(LAYER, algo_config=[gptq]).rounding is not None


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Int8Spec().set_symmetric(False), r"set_symmetric: .*Int8Spec\(symmetric=False\)"),
        (lambda: UInt8Spec().set_calibration_method(CalibMethod.MinMax), "set_calibration_method: specs do not change"),
        (lambda: QConfig.get_default_config("A8W8"), r"get_default_config\('A8W8'\) is not supported"),
        (lambda: QConfig(LAYER, QuantizeFP16=True), "QuantizeFP16=True is not supported"),
        (lambda: QConfig(LAYER, UseRandomData=True), "UseRandomData=True is not supported"),
        (lambda: QConfig(LAYER, extra_options={"UseGPTQ": True}), "UseGPTQ=True is not supported"),
        (lambda: QConfig(LAYER, extra_options={"UseMatMulNBits": True}), "UseMatMulNBits=True is not supported"),
        (lambda: QConfig(LAYER, TensorQuantOverrides={"a": [{}]}), "TensorQuantOverrides="),
        (lambda: QConfig(LAYER, exclude=["/a", (["s"], ["e"])]), r"exclude\[1\].*subgraphs \(start, end\)"),
        (lambda: QConfig.from_dict({"global_config": LAYER, "algo_config": [{"name": "cle"}]}), "'cle'"),
        (lambda: QLayerConfig(input_tensors=Int8Spec, weight=Int8Spec()), r"write Int8Spec\(\)"),
    ],
)
def test_what_is_missing_is_named(build: Callable[[], object], named: str):
    with pytest.raises(ConfigError, match=named):
        build()
