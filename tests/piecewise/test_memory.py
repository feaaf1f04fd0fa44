"""What a run may take: as options say it, and what follows for a model."""

import ctypes
import os
from pathlib import Path

import exports
import onnx_ir as ir
import pytest
from command_line import Shell

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.spec import QLayerConfig, UInt8Spec
from quarot_onnx.errors import ConfigError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise import memory as module
from quarot_onnx.piecewise.memory import Memory, available, give_back, opened_bytes
from quarot_onnx.piecewise.panels import light
from quarot_onnx.pipeline import quantize, rotate


@pytest.mark.parametrize(
    ("words", "size"),
    [("1GB", 10**9), ("800 MiB", 800 << 20), ("1.5gb", 1_500_000_000), ("2000000000", 2 * 10**9), ("64kb", 64_000)],
)
def test_sizes_in_words(words: str, size: int) -> None:
    assert Memory.of(words, None) == Memory(size)


@pytest.mark.parametrize("words", ["", "GB", "-1GB", "0", "much", "1TBB", "inf", "nanGB"])
def test_what_is_no_size_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="is no size: give bytes"):
        Memory.of(words, None)


def test_a_model_is_divided_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(exports.genai_like(dtype="fp16"))
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    halves = sum(tensor.nbytes for tensor in tensors if tensor.dtype.bitwidth == 16)
    # Weights of 16 bits, and beside them what onnxruntime computes with on a CPU.
    assert opened_bytes(model) == sum(tensor.nbytes for tensor in tensors) + 2 * halves
    need = opened_bytes(model)
    assert Memory(need).divides(model)
    assert not Memory(2 * need).divides(model)
    assert Memory(2 * need, by_stages=True).divides(model)
    assert not Memory(1, by_stages=False).divides(model)
    monkeypatch.setattr(module, "available", lambda: need)
    assert Memory().divides(model)
    monkeypatch.setattr(module, "available", lambda: None)
    assert not Memory().divides(model)


def test_the_system_tells_what_it_has() -> None:
    found = available()
    assert found is None or found > 1 << 20


@pytest.mark.parametrize("command", ["rotate", "verify", "quantize", "compare"])
def test_commands_take_a_limit(shell: Shell, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = exports.genai_like(tied_transposed=False)
    second = source if command in {"verify", "compare"} else tmp_path / "out" / "model.onnx"
    refused = shell(command, source, second, "--max-memory", "lots")
    assert refused.status == 2
    assert "--max-memory 'lots' is no size" in refused.err
    assert not list(tmp_path.iterdir())
    pieces: list[Memory] = []
    usual = Memory.divides

    def divides(memory: Memory, model: object) -> bool:
        pieces.append(memory)
        return usual(memory, model)  # type: ignore[arg-type]

    monkeypatch.setattr(Memory, "divides", divides)
    done = shell(command, source, second, "--max-memory", "300kB", "--by-stages", "--json")
    assert done.status == 0
    assert set(pieces) == {Memory(300_000, by_stages=True)}


def test_the_smallest_limit_is_told_of_and_makes_the_smallest_pieces(shell: Shell) -> None:
    source = exports.genai_like(tied_transposed=False)
    done = shell("verify", source, source, "--max-memory", "1", "--tokens", 8)
    assert done.status == 0
    assert "--max-memory of 0 MB cannot be kept" in done.err


def test_a_limit_that_one_weight_exceeds_is_told_of(tmp_path: Path) -> None:
    source = exports.genai_like(dtype="fp16", tied_transposed=False)
    model = model_io.load(source)
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    ends = light(model)
    assert {tensor.name for tensor in ends} == {"lm_head.MatMul.weight", "model.embed_tokens.weight"}
    for apart, copies in ((set[ir.TensorProtocol](), {}), (ends, dict.fromkeys(ends, 2))):
        needed = 250 * 10**6 + max(copies.get(tensor, 3) * tensor.nbytes for tensor in tensors)
        assert Memory().notes(model, light=apart) == Memory(needed).notes(model, light=apart) == ()
        note = Memory(needed - 1).notes(model, light=apart)
        assert len(note) == 1
        assert "cannot be kept" in note[0]
    more = 300 * 10**6
    needed = 250 * 10**6 + more + max((1 if tensor in ends else 3) * tensor.nbytes for tensor in tensors)
    assert Memory(needed).notes(model, more, ends) == ()
    assert Memory(needed - 1).notes(model, more, ends)
    small = Memory(10**6)
    assert set(small.notes(model, light=ends)) <= set(
        rotate(source, tmp_path / "r.onnx", QuarotConfig(), memory=small).notes
    )
    layer = QLayerConfig(weight=UInt8Spec(symmetric=True, quant_granularity="Channel"))
    done = quantize(source, tmp_path / "q.onnx", QConfig(layer), memory=small, check=None)
    assert set(small.notes(model, more, ends)) <= set(done.notes)
    assert small.notes(model, more) != small.notes(model)


def test_what_was_freed_is_given_back() -> None:
    """Many blocks with one behind them that stays: they lie below the end of the heap."""
    blocks = [bytes(1000) for _ in range(100_000)]
    kept = bytes(1000)
    before = resident()
    del blocks
    give_back()
    assert kept == bytes(1000)
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        assert before - resident() > 50 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
