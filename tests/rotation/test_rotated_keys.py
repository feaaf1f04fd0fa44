"""R3 leaves rotated keys in the cache, in every phase of decoding, and the logits as they were."""

from pathlib import Path

import exports
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from rotating import request, rotate

from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.sites.model import Kind

# Two layers of float32, as in rotating.RTOL.
RTOL = 1e-5
IDS = np.random.default_rng(0).integers(0, 256, (2, 10))

Outputs = dict[str, NDArray[np.float32]]


class Decoder:
    """Feeds one model; ``lengths`` are the true lengths of right-padded rows."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]

    def step(self, ids: NDArray[np.int64], past: Outputs | None = None, lengths: tuple[int, ...] = ()) -> Outputs:
        batch, new = ids.shape
        old = 0 if past is None else next(v for k, v in past.items() if k.startswith("present")).shape[2]
        mask = np.ones((batch, old + new), np.int64)
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
        positions = np.tile(np.arange(old, old + new), (batch, 1))
        feeds: dict[str, NDArray] = {}
        for value in self.session.get_inputs():
            known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            if value.name in known:
                feeds[value.name] = known[value.name]
            elif past is not None:
                feeds[value.name] = past[value.name.replace("past_key_values", "present")]
            else:
                width = value.shape[3] if isinstance(value.shape[3], int) else 32
                feeds[value.name] = np.zeros((batch, value.shape[1], 0, width), np.float32)
        return dict(zip(self.names, self.session.run(None, feeds), strict=True))


def check(before: Outputs, after: Outputs, *, lengths: tuple[int, ...] = ()) -> None:
    """Logits and values as they were, keys rotated; padding does not count."""
    rows = [(row, length) for row, length in enumerate(lengths)] or [(row, None) for row in range(len(IDS))]
    for name, a in before.items():
        expected = a
        if name.endswith("key"):
            expected = a.astype(np.float64) @ Rotation.hadamard(a.shape[-1]).matrix()
            assert np.abs(expected - a).max() > 0.1 * np.abs(a).max()
        for row, length in rows:
            e, b = (x[row, ..., :length, :] for x in (expected, after[name]))
            assert np.abs(b - e).max() < RTOL * np.abs(e).max(), name


EXPORTS = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum partial layouts": lambda: exports.optimum_export("phi3"),
    "optimum qk-norm": lambda: exports.optimum_export("qwen3"),
    "dynamo": lambda: exports.dynamo_export("qwen2", with_cache=True),
    "dynamo Attention": lambda: exports.dynamo_export("qwen2", with_cache=True, opset=23),
    "genai": exports.genai_like,
    "genai unpacked": lambda: exports.genai_like(packed_qkv=False, bias=True),
    "genai RoPE outside": lambda: exports.genai_like(rotary_outside=True),
    "genai qk-norm": lambda: exports.genai_like(qk_norm=True),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_prefill_continued_prompt_and_decode_in_a_batch(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, _, plan = rotate(source, tmp_path, request(Kind.R3))
    assert plan.counts == {"R3": 2}
    a, b = Decoder(source), Decoder(target)
    past_a, past_b = a.step(IDS[:, :4]), b.step(IDS[:, :4])
    check(past_a, past_b)
    # A batch of continued prompts of several tokens is beyond GroupQueryAttention, in the original as well.
    rows = 1 if case.startswith("genai") else 2
    many_a, many_b = (
        m.step(IDS[:rows, 4:8], {k: v[:rows] for k, v in past.items()}) for m, past in ((a, past_a), (b, past_b))
    )
    for name in ("logits", "present.1.value"):
        assert np.abs(many_b[name] - many_a[name]).max() < RTOL * np.abs(many_a[name]).max()
    key = many_a["present.1.key"] @ Rotation.hadamard(many_a["present.1.key"].shape[-1]).matrix()
    assert np.abs(many_b["present.1.key"] - key).max() < RTOL * np.abs(key).max()
    check(a.step(IDS[:, 4:5], past_a), b.step(IDS[:, 4:5], past_b))


@pytest.mark.parametrize("case", [name for name in EXPORTS if name.startswith("genai") and "outside" not in name])
def test_right_padded_rows(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, _, _ = rotate(source, tmp_path, request(Kind.R3))
    lengths = (7, 4)
    before, after = (Decoder(path).step(IDS[:, :7], lengths=lengths) for path in (source, target))
    check(before, after, lengths=lengths)


def test_keys_of_an_export_without_a_cache_still_agree(tmp_path: Path) -> None:
    source = exports.dynamo_export("llama")
    target, _, _ = rotate(source, tmp_path, request(Kind.R3))
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    before, after = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (source, target)
    )
    assert np.abs(after - before).max() < RTOL * np.abs(before).max()


def test_one_computation_of_positions_serves_all_layers(tmp_path: Path) -> None:
    from quarot_onnx.io import model_io  # noqa: PLC0415

    target, _, _ = rotate(exports.genai_like(layers=3), tmp_path, request(Kind.R3))
    ops = [node.op_type for node in model_io.load(target).graph]
    assert ops.count("Range") == 1
    assert ops.count("RotaryEmbedding") == 6
