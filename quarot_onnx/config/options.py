"""AMD Quark's extra options, each honoured, ignored or refused; none is passed over in silence.

============ ====================================================================================================
honoured     `HONOURED`: becomes a field of `QConfig`
ignored      `IGNORED`: cannot change the result here; taken, listed in ``QConfig.ignored_options`` and ``notes``
refused      `REFUSED`: would change the result in a way that is not implemented. Values that ask for nothing
             (False, None, an empty collection) are taken.
============ ====================================================================================================

Names and meanings are those of Quark's "Full List of Quantization Configuration Features". ``MatMulConstBOnly`` is
a case of its own: True is how this package always works, False is refused.
"""

from types import MappingProxyType
from typing import Any

HONOURED = MappingProxyType(
    {
        "OpTypesToQuantize": "op_types_to_quantize",
        "ExtraOpTypesToQuantize": "extra_op_types_to_quantize",
        "NodesToQuantize": "nodes_to_quantize",
        "ActivationSymmetric": "activation_symmetric",
        "WeightSymmetric": "weight_symmetric",
        "WeightsOnly": "weights_only",
        "Percentile": "percentile",
        "CalibDataSize": "calib_data_size",
    }
)

CONST_B_ONLY = "MatMulConstBOnly"

_WHY_IGNORED = {
    "the graph is kept as exported, apart from the rotations": """
        OptimizeModel SimplifyModel SimplifyModelOptions SkipPreprocess RemoveInputInit FoldBatchNorm FoldRelu
        FuseInstanceNorm FuseL2Norm FuseGelu FuseLayerNorm ReplaceClip6Relu ConvertClipToRelu ConvertBNToConv
        ConvertReduceMeanToGlobalAvgPool SplitLargeKernelPool ConvertSplitToSlice CopySharedInit CopyBiasInit
        FillAllValueInfo""",
    "it is for DPU and NPU targets, this package writes for stock onnxruntime": """
        SimulateDPU ConvertLeakyReluToDPUVersion ConvertSigmoidToHardSigmoid ConvertHardSigmoidToDPUVersion
        ConvertAvgPoolToDPUVersion ConvertClipToDPUVersion ConvertReduceMeanToDPUVersion ConvertSoftmaxToDPUVersion
        NPULimitationCheck MaxLoopNum AdjustShiftCut AdjustShiftBias AdjustShiftRead AdjustShiftWrite
        AdjustHardSigmoid AdjustShiftSwish AlignConcat AlignPool AlignPad AlignSlice AlignTranspose AlignReshape
        AlignEltwiseQuantType UseUnsignedReLU RemoveQDQConvClip RemoveQDQConvRelu RemoveQDQConvLeakyRelu
        RemoveQDQConvPRelu RemoveQDQConvGelu RemoveQDQMulAdd RemoveQDQBetweenOps RemoveQDQInstanceNorm
        RemoveFusedQDQ""",
    "it is for floating-point and block formats": """
        BF16WithClip BF16QDQToCast RefineBlockAxis ActivationScaled WeightScaled UseFP32Scale BFPAttributes
        MXAttributes""",
    "blocks of weights are set by output_format='nbits', the spec's group_size and accuracy_level": "MatMulNBitsParams",
    "biases are not quantized on their own": "QuantizeBias Int32Bias AdjustBiasScale",
    "only inputs and weights are quantized, outputs where output_tensors asks for it": """
        OpTypesToExcludeOutputQuantization NodesToExcludeOutputQuantization ForceQuantizeNoInputCheck""",
    "the channel axis is read from the graph": "QDQOpTypePerChannelSupportToAxis",
    "onnxruntime computes the same with shared and with dedicated Q/DQ pairs": "DedicatedQDQPair",
    "calibration streams, it has nothing to cache or to share out": """
        CalibOptimizeMem CalibOptimizeDisk CalibWorkerNum CalibPassthroughOpTypes SaveTensorHistFig TmpDir""",
    "it belongs to a calibration method that is not used": """
        LWPMetric PercentileCandidates MinMSEModePof2Scale MinMSEModeFloatScale CalibMovingAverageConstant
        RandomDataReaderInputShape RandomDataReaderInputDataRange""",
    "it changes what is printed, not the model": "PrintSummary IgnoreWarnings DebugMode",
    "the report holds perplexity and equivalence": "EvalMetrics EvalDataReader",
}
IGNORED = MappingProxyType({name: why for why, names in _WHY_IGNORED.items() for name in names.split()})

_WAY_OUT = {
    "attention and other operators stay in float; name operators in OpTypesToQuantize": """
        QuantizeAllOpTypes EnableSubgraph""",
    "use output_format='nbits'": "UseMatMulNBits",
    "use algo_config=[GPTQConfig(...)]": "UseGPTQ GPTQParams",
    "only integers of up to 8 bits with float32 scales are written; leave it out": """
        Int16Bias Int16Scale QuantizeFP16 EnableVaimlBF16 EnableDualQuantNodePairs""",
    "weights are stored as integers; leave it out": "AddQDQPairToWeight",
    "convert the model before": """
        PreprocessYAML ConvertFP16ToFP32 ConvertNCHWToNHWC ConvertOpsetVersion FixShapes CryptoMode
        EncryptionAlgorithm UserCustomOpLibPath""",
    "calibrate on real text; give a data reader": "UseRandomData",
    "ranges are measured anew and over all data; leave it out": """
        CalibMovingAverage CalibTensorRangeSymmetric TensorsRangeFile SaveAndRestore""",
    "weights take their true range; leave it out": "WeightCalibrateMethod",
    "use specific_layer_config": "TensorQuantOverrides MixedPrecisionTensor SpecificTensorPrecision",
    "onnxruntime's CPU execution provider is used; leave it out": "ExecutionProviders",
    "use algo_config=[QuarotConfig(r_matrix_dim=..., use_random_had=..., r_config_path=...)]": """
        RMatrixDim UseRandomHad RConfigPath""",
}
REFUSED = MappingProxyType({name: way for way, names in _WAY_OUT.items() for name in names.split()})

_ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {"ExecutionProviders": (["CPUExecutionProvider"],)}

ALL_OPTIONS = (*HONOURED, CONST_B_ONLY, *IGNORED, *REFUSED)


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether a refused option has a value that leaves everything as it is."""
    return value is None or value is False or value in ([], (), {}, "") or value in _ASKS_FOR_NOTHING.get(name, ())


def sort_option(name: str, value: object, data: dict[str, Any], ignored: list[str]) -> None:
    """Put one option where it belongs.

    Args:
        name: One of `ALL_OPTIONS`.
        value: What the user gave it.
        data: The fields of a `QConfig`; takes an honoured option.
        ignored: Takes the name of an ignored one.

    Raises:
        ValueError: The option is refused, or its field is given too.
    """
    if name in HONOURED:
        if HONOURED[name] in data:
            raise ValueError(f"{name} and {HONOURED[name]} are one and the same; give one of them")
        data[HONOURED[name]] = value
    elif name == CONST_B_ONLY:
        if value is not True:
            raise ValueError(f"{name}={value!r} is not supported: attention MatMuls stay in float; leave it out")
    elif name in IGNORED:
        ignored.append(name)
    elif not asks_for_nothing(name, value):
        raise ValueError(f"{name}={value!r} is not supported: {REFUSED[name]}")
