"""Caches of integers on a provider that loses them between two runs, as CUDA's GroupQueryAttention does.

The provider here is another one, on which all is computed right; that it loses caches is pretended.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx_ir as ir
import pytest
from command_line import Shell

from quarot_onnx import KVCacheConfig, QConfig, SinkPrefixConfig
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.errors import ModelError
from quarot_onnx.evaluation.check import Check
from quarot_onnx.evaluation.fidelity import Fidelity
from quarot_onnx.generation.generator import generate
from quarot_onnx.graph.caches import IntegerCache, reads_integers
from quarot_onnx.io import model_io
from quarot_onnx.io.companions import genai_providers
from quarot_onnx.pipeline import Outcome, quantize
from quarot_onnx.sessions import carrying
from quarot_onnx.sessions.providers import Provider, running_on

OTHER = Provider("AzureExecutionProvider")
FLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
LOSES = "AzureExecutionProvider loses what GroupQueryAttention's cache of integers holds"


LOSING = {np.dtype(np.float16), np.dtype(np.float32)}
"""Floats beside which it loses them."""


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All providers but the CPU lose them: what comes out holds nothing of what came in."""
    opened = carrying.open_session

    class Session:
        """Loses caches beside 16-bit floats alone: others are left to the CPU."""

        def __init__(self, *model: Any) -> None:
            self._session = opened(*model)

        def run(self, names: Any, feeds: dict[str, Any]) -> list[Any]:
            output, *presents = self._session.run(names, feeds)
            return [output, *(map(np.zeros_like, presents) if output.dtype in LOSING else presents)]

    monkeypatch.setattr(carrying, "open_session", Session)
    carrying._found.clear()
    yield
    carrying._found.clear()


def quantized(folder: Path, bits: int = 8, *, source: Path | None = None, **more: Any) -> tuple[Path, Outcome]:
    source = source or exports.genai_like()
    ids = np.random.default_rng(0).integers(5, 100, (4, 24))
    reader = TokenReader(ModelInputs.from_path(source), ids)
    prefix = [SinkPrefixConfig(form="graph", ids=(7, 9))] if more.pop("prefix", False) else []
    config = QConfig(None, algo_config=[*prefix, KVCacheConfig(bits=bits)])
    target = folder / "model.onnx"
    return target, quantize(source, target, config, reader, **{"check": None, **more})


def test_a_provider_is_asked(losing: None) -> None:
    assert carrying.dropped(FLOAT16) == ""
    with running_on(OTHER):
        assert carrying.dropped(FLOAT16).startswith(LOSES)


def test_it_is_asked_with_the_models_floats(losing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_lost_caches.LOSING", {np.dtype(np.float16)})
    with running_on(OTHER):
        assert carrying.dropped(FLOAT16)
        assert not carrying.dropped(FLOAT)


def test_one_that_carries_them_on() -> None:
    carrying._found.clear()
    with running_on(OTHER):
        assert carrying.dropped(FLOAT16) == ""


def test_one_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_model: object) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(carrying, "open_session", refused)
    carrying._found.clear()
    with running_on(OTHER):
        assert carrying.dropped(FLOAT16) == ""
    assert not carrying._found  # and is asked again


def test_where_they_are_read(tmp_path: Path) -> None:
    found = {
        name: reads_integers(model_io.load(path))
        for name, path in {
            "float": exports.genai_like(),
            "8": quantized(tmp_path / "8")[0],
            "4": quantized(tmp_path / "4", 4)[0],
            "prefix": quantized(tmp_path / "p", prefix=True)[0],
            "fp16": quantized(tmp_path / "h", source=exports.genai_like(dtype="fp16"))[0],
        }.items()
    }
    assert found == {
        "float": None,
        "8": IntegerCache(made=False, dtype=FLOAT),
        "4": None,
        "prefix": IntegerCache(made=True, dtype=FLOAT),
        "fp16": IntegerCache(made=False, dtype=FLOAT16),
    }


def test_text_is_generated_without_the_cache(losing: None, tmp_path: Path) -> None:
    path, _ = quantized(tmp_path)
    expected = generate(path, "The quick", max_new_tokens=8)
    with running_on(OTHER):
        found = generate(path, "The quick", max_new_tokens=8)
    assert found.ids == expected.ids
    assert len(found.ids) == 8


def test_the_check_goes_without_decode_steps(losing: None, tmp_path: Path) -> None:
    here = quantized(tmp_path / "a", check=Check(tokens=64))[1]
    assert here.fidelity is not None
    assert here.fidelity.decode_steps == 4
    with running_on(OTHER):
        there = quantized(tmp_path / "b", check=Check(tokens=64))[1]
        of_rows = quantized(tmp_path / "c", 4, check=Check(tokens=64))[1]
    assert there.fidelity is not None
    assert (there.fidelity.decode_steps, there.fidelity.decode_kl) == (0, None)
    assert there.fidelity.tokens == here.fidelity.tokens
    assert there.fidelity.kl == pytest.approx(here.fidelity.kl, rel=0.05)
    assert any(note.startswith(LOSES) and note.endswith("no decode step was checked") for note in there.notes)
    assert of_rows.fidelity is not None
    assert of_rows.fidelity.decode_steps == 4


def test_a_prefix_before_it_is_refused_before_the_work(losing: None, tmp_path: Path) -> None:
    class Unread(TokenReader):
        def get_next(self) -> None:
            raise AssertionError("calibrated")

    source = exports.genai_like()
    reader = Unread(ModelInputs.from_path(source), np.full((4, 24), 5))
    config = QConfig(None, algo_config=[SinkPrefixConfig(form="graph", ids=(7, 9)), KVCacheConfig(bits=8)])
    with running_on(OTHER), pytest.raises(ModelError, match="a prefix in the graph would always stand before it"):
        quantize(source, tmp_path / "model.onnx", config, reader)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}", '{"model": [1]}', '{"model": {"decoder": {"session_options": 3}}}'])
def test_a_config_that_names_nothing(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(exports.optimum_export("llama").parent, folder)
    (folder / "genai_config.json").write_text(content)
    path = quantized(tmp_path / "out", source=folder / "model.onnx")[0]
    assert (path.parent / "genai_config.json").read_text() == content


def test_providers_of_what_is_no_config(tmp_path: Path) -> None:
    for content in (
        "[]",
        "null",
        "{",
        '{"model": {"decoder": {"session_options": {"provider_options": {"cuda": 1}}}}}',
    ):
        (tmp_path / "genai_config.json").write_text(content)
        assert not genai_providers(tmp_path)


def test_what_needs_the_cache_is_refused(losing: None, shell: Shell, tmp_path: Path) -> None:
    path, _ = quantized(tmp_path)
    behind, _ = quantized(tmp_path / "p", prefix=True)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ("--text", text, "--seq-len", 32, "--provider", "azure")
    error = shell.fails("evaluate", path, *options, "--decode", 8)
    assert LOSES in error
    assert "evaluate it without (--decode, decode=)" in error
    shell.ok("evaluate", path, *options)
    for command in (("evaluate", behind, *options), ("generate", behind, "--prompt", "a", "--provider", "azure")):
        error = shell.fails(*command)
        assert LOSES in error
        assert "(--provider cpu)" in error
    inputs = ModelInputs.from_path(path)
    with running_on(OTHER), pytest.raises(ModelError, match=LOSES):
        inputs.feed(np.array([[5]]), {name: np.zeros((1, 2, 3, 16), np.int8) for name, _ in inputs.presents})


@pytest.mark.parametrize(
    ("decode_kl", "kl", "steps", "broken"),
    [(0.9, 0.01, 8, False), (1.2, 0.1, 8, False), (9.7, 0.2, 8, True), (6.0, 1.5, 8, False), (1.4, 1.39, 510, False)],
)
def test_decode_steps_that_no_rounding_explains(decode_kl: float, kl: float, steps: int, broken: bool) -> None:
    found = Fidelity(kl, decode_kl, 0.9, 10.0, 11.0, 11.0, 0, 512, steps, "text")
    assert bool(found.broken) is broken
    if broken:
        assert "KL 9.7 in decode steps, 0.04921 in the prefill: the cache is not what it should be" in found.broken[0]


@pytest.fixture
def for_cuda(tmp_path: Path) -> Path:
    """The export, as the builder writes it for CUDA."""
    folder = tmp_path / "cuda"
    shutil.copytree(exports.genai_like().parent, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"] = {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}
    config["search"] = {"past_present_share_buffer": False}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder / "model.onnx"


@pytest.mark.parametrize(("bits", "shares"), [(8, True), (4, False)])
def test_onnxruntime_genai_is_told_to_share_the_buffer(bits: int, shares: bool, for_cuda: Path, tmp_path: Path) -> None:
    path, outcome = quantized(tmp_path / "out", bits, source=for_cuda)
    config = json.loads((path.parent / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is shares
    assert not any("loses" in note for note in outcome.notes)


def test_activations_gain_nothing_on_cuda(for_cuda: Path, shell: Shell, tmp_path: Path) -> None:
    told = "genai_config.json runs the model on CUDA, where onnxruntime computes 8-bit activations in float or leaves"
    options = ("--no-verify", "--no-check")
    assert told in shell.ok("quantize", for_cuda, tmp_path / "a" / "model.onnx", *options).err
    assert told not in shell.ok("quantize", for_cuda, tmp_path / "b" / "model.onnx", "--scheme", "w8", *options).err
    study = ("--w-bits", 8, "--a-bits", 8, "--format", "fake")
    assert told not in shell.ok("quantize", for_cuda, tmp_path / "c" / "model.onnx", *study, *options).err
    assert told not in shell.ok("quantize", exports.genai_like(), tmp_path / "d" / "model.onnx", *options).err


def test_a_prefix_in_front_of_it_is_told_of(for_cuda: Path, tmp_path: Path) -> None:
    told = "genai_config.json runs the model on CUDA, where GroupQueryAttention loses"
    assert any(note.startswith(told) for note in quantized(tmp_path / "a", source=for_cuda, prefix=True)[1].notes)
    assert not any(note.startswith(told) for note in quantized(tmp_path / "b", prefix=True)[1].notes)
