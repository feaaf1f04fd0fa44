# ruff: noqa: FBT003 - positions are what is tested
"""What AMD Quark's documentation shows must run with `quark.onnx` replaced by `quarot_onnx`."""

from pathlib import Path

from quarot_onnx.config import CalibMethod, OpType, QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.config import QConfig as QConfigOfModule
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, UInt8Spec


def test_snippet_of_the_quarot_page():
    quant_config = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec())

    quarot_config = QuarotConfig(
                       r_matrix_dim=4096,
                       use_random_had=False,
                       r_config_path="rotation_config.json")  # fmt: skip

    config = QConfig(
        global_config=quant_config,
        algo_config=[quarot_config],
        OpTypesToQuantize=['MatMul', 'Gemm'],
    )  # fmt: skip

    assert config.global_config == quant_config
    assert config.quarot == quarot_config
    assert config.quarot.r_config_path == Path("rotation_config.json")
    assert config.op_types_to_quantize == (OpType.MatMul, OpType.Gemm) == ("MatMul", "Gemm")
    (note,) = config.notes
    assert "without VNNI" in note
    assert "UInt8Spec" in note


def test_newer_snippet_names_input_tensors():
    quant_config = QLayerConfig(input_tensors=UInt8Spec(), weight=Int8Spec())
    assert quant_config == QLayerConfig(activation=UInt8Spec(), weight=Int8Spec())
    assert quant_config.input_tensors is quant_config.activation


def test_both_modules_export_one_class():
    assert QConfigOfModule is QConfig


def test_positions_are_quarks():
    layer, rotation = QLayerConfig(UInt8Spec(), Int8Spec()), QuarotConfig(64, True, "r.json")
    special = QLayerConfig(UInt8Spec(False, "Float32", CalibMethod.Percentile), Int8Spec(True))
    config = QConfig(layer, {special: ["/a"]}, {None: ["Gemm"]}, ["/b"], [rotation], True)
    assert config.specific_layer_config[0].config == special
    assert config.layer_type_config[0].config is None
    assert config.exclude == ("/b",)
    assert (config.quarot.r_matrix_dim, config.quarot.use_random_had) == (64, True)
    assert config.use_external_data_format


def test_more_than_two_positions_of_a_layer_config_follow_the_newer_order():
    layer = QLayerConfig(UInt8Spec(), None, Int8Spec(), None, UInt8Spec(True))
    assert (layer.activation, layer.weight, layer.output_tensors) == (UInt8Spec(), Int8Spec(), UInt8Spec(True))


def test_what_quark_writes_with_to_dict_is_read():
    tensor = {
        "symmetric": False,
        "scale_type": "ScaleType.Float32",
        "calibration_method": "CalibMethod.Percentile",
        "quant_granularity": "QuantGranularity.Tensor",
        "data_type": "UInt8",
    }
    weight = tensor | {"symmetric": True, "data_type": "Int8", "quant_granularity": "QuantGranularity.Channel"}
    layer = {"input_tensors": tensor, "weight": weight}
    config = QConfig.from_dict(
        {
            "global_config": layer,
            "specific_layer_config": [[layer, ["/a", "/b"]]],
            "layer_type_config": [[None, ["Gemm"]]],
            "exclude": [],
            "algo_config": [{"name": "quarot", "r_matrix_dim": 64}],
            "use_external_data_format": False,
            "extra_options": {"SimplifyModel": False, "Percentile": 99.9},
        }
    )
    assert config.global_config.activation.calibration_method is CalibMethod.Percentile
    assert config.global_config.activation.percentile == 99.9
    assert config.specific_layer_config[0].layers == ("/a", "/b")
    assert config.ignored_options == ("SimplifyModel",)
