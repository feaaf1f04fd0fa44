"""The fixtures themselves: every exporter's graph computes its torch model, and decoding continues the prefill."""

from pathlib import Path

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

# float32: 2 layers of width 64 round at about 2e-7 relative per op; two spellings of some 50 ops stay well within 1e-5
# of the largest logit. float16 rounds at 5e-4 per op.
RTOL = {"fp32": 1e-5, "fp16": 1e-2}
PROMPT = np.array([[256, 5, 80, 33, 7, 200, 91, 14], [256, 9, 9, 120, 61, 3, 250, 44]])


def run(session: onnxruntime.InferenceSession, ids: NDArray[np.int64], past: dict[str, NDArray]) -> dict[str, NDArray]:
    """Outputs by name of one step; an empty ``past`` means a prefill."""
    old = next(iter(past.values())).shape[2] if past else 0
    batch, new = ids.shape
    positions = np.tile(np.arange(old, old + new), (batch, 1))
    known = {"input_ids": ids, "attention_mask": np.ones((batch, old + new), np.int64), "position_ids": positions}
    feeds = {}
    for value in session.get_inputs():
        if value.name in known:
            feeds[value.name] = known[value.name]
        elif past:
            feeds[value.name] = past[value.name.replace("past_key_values", "present")]
        else:
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
            head_dim = value.shape[3] if isinstance(value.shape[3], int) else 32
            feeds[value.name] = np.zeros((batch, value.shape[1], 0, head_dim), dtype)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(actual: NDArray, expected: NDArray, rtol: float) -> None:
    error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < rtol
    assert expected.std() > 0.1, "a flat model proves nothing"


def decode_continues_prefill(path: Path, rtol: float) -> None:
    session = open_session(path)
    whole = run(session, PROMPT, {})["logits"]
    outputs = run(session, PROMPT[:, :5], {})
    steps = [outputs["logits"]]
    for i in range(5, PROMPT.shape[1]):
        past = {name: value for name, value in outputs.items() if name.startswith("present")}
        outputs = run(session, PROMPT[:, i : i + 1], past)
        steps.append(outputs["logits"])
    close(np.concatenate(steps, axis=1), whole.astype(np.float64), rtol)


@pytest.mark.parametrize("arch", exports.ARCHITECTURES)
def test_optimum_computes_its_torch_model(arch: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(exports.hf_folder(arch), local_files_only=True).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(PROMPT)).logits.double().numpy()
    path = exports.optimum_export(arch)
    close(run(open_session(path), PROMPT, {})["logits"], expected, RTOL["fp32"])
    decode_continues_prefill(path, RTOL["fp32"])


@pytest.mark.parametrize(
    "options",
    [{"tied": True}, {"num_key_value_heads": 4}, {"dtype": "fp16"}],
    ids=["tied", "mha", "fp16"],
)
def test_optimum_options(options: dict) -> None:
    decode_continues_prefill(exports.optimum_export("llama", **options), RTOL[options.get("dtype", "fp32")])


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"attention": "eager"}),
        ("llama", {"tied": True}),
        ("llama", {"opset": 23}),
        ("llama", {"dtype": "fp16"}),
        ("qwen3", {}),
    ],
    ids=str,
)
def test_dynamo_computes_what_optimum_does(arch: str, options: dict) -> None:
    tied = options.get("tied", False)
    # At opset 23 the exporter's RotaryEmbedding has cos and sin of batch 1, which onnxruntime does not broadcast.
    prompt = PROMPT[:1] if options.get("opset") == 23 else PROMPT
    expected = run(open_session(exports.optimum_export(arch, tied=tied)), prompt, {})["logits"].astype(np.float64)
    actual = run(open_session(exports.dynamo_export(arch, **options)), prompt, {})["logits"]
    close(actual, expected, RTOL[options.get("dtype", "fp32")])


@pytest.mark.parametrize("opset", [20, 23])
def test_dynamo_with_cache_decodes(opset: int) -> None:
    decode_continues_prefill(exports.dynamo_export("qwen2", with_cache=True, opset=opset), RTOL["fp32"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"packed_qkv": False, "bias": True},
        {"rotary_outside": True},
        {"qk_norm": True},
        {"tied_transposed": False},
        {"dtype": "fp16"},
    ],
    ids=str,
)
def test_genai_like_decodes(options: dict) -> None:
    decode_continues_prefill(exports.genai_like(**options), RTOL[options.get("dtype", "fp32")])


def test_genai_like_rotary_may_stand_inside_or_outside() -> None:
    inside, outside = (
        run(open_session(exports.genai_like(packed_qkv=False, rotary_outside=outside)), PROMPT, {})["logits"]
        for outside in (False, True)
    )
    close(outside, inside.astype(np.float64), RTOL["fp32"])


def test_opset23_module_uses_the_fused_ops_and_is_causal() -> None:
    path = exports.opset23_module_export()
    ops = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"RMSNormalization", "RotaryEmbedding", "Attention"} <= ops
    session = open_session(path)
    whole = run(session, PROMPT, {})["logits"]
    close(run(session, PROMPT[:, :5], {})["logits"], whole[:, :5].astype(np.float64), RTOL["fp32"])
