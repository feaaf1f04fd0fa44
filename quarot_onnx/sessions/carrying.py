"""Whether a provider carries on GroupQueryAttention's cache of integers, where past and present are two arrays.

The operator of onnxruntime-gpu 1.31 writes what is new behind the past where both lie in one buffer, as in
onnxruntime-genai (``past_present_share_buffer``). Fed an array, as everything here feeds it, CUDA's leaves the present
without the past, in silence: a decode step sees its own token and noise. Caches of floats are carried on. So a provider
is asked once, with a small cache and the model's floats.
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.sessions.providers import CPU, current, open_session

_TOKENS, _HEADS, _KV_HEADS, _WIDTH = 7, 8, 2, 64


INSTEAD = (
    "run the model on the CPU (--provider cpu), or in onnxruntime-genai, which holds both in one buffer "
    "(past_present_share_buffer; not with a prefix in the graph)"
)
"""Where such a cache is carried on."""

_found: dict[tuple[object, ...], bool] = {}


def dropped(dtype: ir.DataType) -> str:
    """Why the provider that sessions run on loses a cache of integers between two runs; empty where it does not.

    Args:
        dtype: The floats that the operator computes in: where a provider has it for others alone, the CPU computes it.
    """
    provider = current()
    if provider.name == CPU or dtype not in (ir.DataType.FLOAT16, ir.DataType.FLOAT):
        return ""
    key = (provider.name, *sorted(provider.options.items()), dtype)
    if key not in _found:
        carried = _carries(dtype)
        if carried is None:
            return ""  # what cannot run this says so of the user's model, too
        _found[key] = carried
    if _found[key]:
        return ""
    return (
        f"{provider.name} loses what GroupQueryAttention's cache of integers holds where past and present are two "
        "arrays, as here"
    )


def _carries(dtype: ir.DataType) -> bool | None:
    """Whether the provider carries one on; None where that cannot be run."""
    import onnxruntime as ort  # noqa: PLC0415 - a quarter of a second that most commands can do without

    past = np.resize(np.arange(-127, 128, dtype=np.int8), (1, _KV_HEADS, _TOKENS, _WIDTH))
    query, new = (np.ones((1, 1, heads * _WIDTH), dtype.numpy()) for heads in (_HEADS, _KV_HEADS))
    feeds = {"query": query, "key": new, "value": new, "past_key": past, "past_value": past}
    feeds |= {"last": np.array([_TOKENS], np.int32), "length": np.array(_TOKENS + 1, np.int32)}
    try:
        outputs = open_session(_one_node(dtype).SerializeToString(), ort.SessionOptions()).run(None, feeds)
    except Exception:  # noqa: BLE001 - onnxruntime's exceptions share no other base
        return None
    return all((present[:, :, :_TOKENS] == past).all() for present in outputs[1:])


def _one_node(dtype: ir.DataType) -> onnx.ModelProto:
    """A GroupQueryAttention whose cache is int8."""
    kind = int(dtype)

    def cached(name: str, positions: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT8, [1, _KV_HEADS, positions, _WIDTH])

    inputs = [
        helper.make_tensor_value_info("query", kind, [1, 1, _HEADS * _WIDTH]),
        *(helper.make_tensor_value_info(name, kind, [1, 1, _KV_HEADS * _WIDTH]) for name in ("key", "value")),
        *(cached(name, "past") for name in ("past_key", "past_value")),
        helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("length", TensorProto.INT32, []),
    ]
    outputs = [
        helper.make_tensor_value_info("output", kind, [1, 1, _HEADS * _WIDTH]),
        *(cached(name, "total") for name in ("present_key", "present_value")),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [*(value.name for value in inputs), *[""] * 5, "key_scale", "value_scale"],
        [value.name for value in outputs],
        domain="com.microsoft",
        num_heads=_HEADS,
        kv_num_heads=_KV_HEADS,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        kv_cache_bit_width=8,
    )
    scale = np.array([1 / 127], np.float32)
    scales = [numpy_helper.from_array(scale, name) for name in ("key_scale", "value_scale")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "carrying", inputs, outputs, scales)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
