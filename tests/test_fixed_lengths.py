"""Lengths that the output fixes: by name, sums too, and the model runs at them."""

from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Shell, run

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config import Int8Spec, SinkPrefixConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.io import model_io
from quarot_onnx.io.lengths import checked_lengths, parse_lengths
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.run.prefixing import prefix_files, put_prefix
from quarot_onnx.sessions import runtime

W8 = QConfig(QLayerConfig(weight=Int8Spec()))


def shapes(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_sums_follow_their_terms(tmp_path: Path) -> None:
    source, target = exports.optimum_export("llama"), tmp_path / "m.onnx"
    wanted = {"batch_size": 1, "sequence_length": 8, "past_sequence_length": 24}
    before = source.read_bytes()
    ModelQuantizer(W8).quantize_model(source, target, fix_shapes=wanted, check=None)
    assert source.read_bytes() == before
    found = shapes(target)
    assert found["input_ids"] == [1, 8]
    assert found["attention_mask"] == [1, 32]
    assert found["past_key_values.0.key"][2] == 24
    assert found["logits"][:2] == [1, 8]
    assert found["present.0.key"][2] == 32
    free = ModelQuantizer(W8)
    free.quantize_model(source, tmp_path / "free.onnx", check=None)
    inputs = ModelInputs.from_path(target)
    assert (inputs.lengths.batch, inputs.lengths.seq, inputs.lengths.past) == (1, 8, 24)
    feeds = inputs.feed(np.arange(8)[None])
    one, other = (runtime.session(path).run(["logits"], feeds)[0] for path in (target, tmp_path / "free.onnx"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "source", [lambda: exports.optimum_export("llama"), exports.genai_like], ids=["optimum", "genai"]
)
def test_a_prefix_in_a_file_needs_a_cache_of_free_length(source: Any, tmp_path: Path, shell: Shell) -> None:
    """Asked for now, or brought by the model; in the graph it does not."""
    path = source()
    fixed = ("--fix-shape", "batch_size=1", "--fix-shape", "past_sequence_length=62")
    small = ("--scheme", "w8", "--no-check", "--no-rotate")
    beside = ("--prefix", "npz", "--prefix-ids", "256,84")
    said = shell.fails("quantize", path, tmp_path / "q" / "m.onnx", *small, *fixed, *beside)
    assert "past_sequence_length=62 fixes the length of the cache" in said
    assert "(--prefix graph)" in said
    assert not (tmp_path / "q").exists()
    model = model_io.load(path)
    given, _ = put_prefix(model, path, SinkPrefixConfig(form="npz", ids=[256, 84]), path.parent, WHOLE)
    model_io.save(model, tmp_path / "p" / "m.onnx", companions_from=path.parent, beside=prefix_files(given.lead))
    later = shell.fails("quantize", tmp_path / "p" / "m.onnx", tmp_path / "q" / "m.onnx", *small, *fixed)
    assert "past_sequence_length=62 fixes the length of the cache" in later
    shell.ok("quantize", path, tmp_path / "free" / "m.onnx", *small, "--fix-shape", "batch_size=1", *beside)
    shell.ok("quantize", path, tmp_path / "graph" / "m.onnx", *small, *fixed, "--prefix", "graph", *beside[2:])


@pytest.mark.parametrize("source", ["optimum llama", "dynamo cache 23"])
def test_a_prefix_in_a_file_serves_all_rows_of_a_fixed_batch(
    source: str, tmp_path: Path, shell: Shell, text: Path
) -> None:
    """In what is written: where it is evaluated on fewer windows than rows, and where it goes on with a text."""
    path, options = exports.EXPORTS[source](), ("--scheme", "w8a8-static", "--prefix", "npz", "--prefix-ids", "256,84")
    few = ("--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 32, "--check-tokens", 96)
    batch, found = next(str(value.shape[0]) for value in model_io.load(path).graph.inputs), []
    values = []
    for name, more in (("free", ()), ("fixed", ("--fix-shape", f"{batch}=3"))):
        shell.ok("quantize", path, tmp_path / name / "m.onnx", *options, *few, *more)
        decoder = Decoder(tmp_path / name / "m.onnx")
        found.append([decoder.feed(ids) for ids in ([10, 20, 30], [5], [6])])
        values.append(perplexity(tmp_path / name / "m.onnx", text, path.parent, seq_len=33, windows=2).perplexity)
    np.testing.assert_allclose(*found, atol=1e-4)
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("where", ["option", "graph", "brought"])
def test_one_row_at_a_time_behind_a_prefix_in_a_file(where: str, tmp_path: Path, shell: Shell, text: Path) -> None:
    """GroupQueryAttention takes several new tokens behind a cache in a batch of 1 alone."""
    path, target = exports.genai_like(), tmp_path / "out" / "m.onnx"
    fixed, beside = ("--fix-shape", "batch_size=3"), ("--prefix", "npz", "--prefix-ids", "256,84")
    model = model_io.load(path)
    if where == "graph":
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape([3, *list(value.shape)[1:]])
        path = tmp_path / "fixed" / "m.onnx"
        model_io.save(model, path, companions_from=exports.genai_like().parent)
        fixed = ()
    elif where == "brought":
        given, _ = put_prefix(model, path, SinkPrefixConfig(form="npz", ids=[256, 84]), path.parent, WHOLE)
        path = tmp_path / "brought" / "m.onnx"
        model_io.save(model, path, companions_from=exports.genai_like().parent, beside=prefix_files(given.lead))
        beside = ()
    small = ("--scheme", "w8a8-static", "--no-check", "--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 32)
    said = shell.fails("quantize", path, target, *small, *fixed, *beside)
    assert "the batch is fixed at 3 (by the graph, or --fix-shape), and GroupQueryAttention takes one row" in said
    assert not target.parent.exists()
    if where != "brought":
        shell.ok("quantize", path, target, *small, *fixed, "--prefix", "graph", *beside[2:])
        assert perplexity(target, text, target.parent, seq_len=33, windows=4).perplexity > 1
    if where != "graph":
        shell.ok("quantize", path, target, *small, "--no-rotate", "--fix-shape", "batch_size=1", *beside)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_by_stages_the_output_is_opened_with_its_weights_left_in_the_file(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, opened = list[dict[str, Any]](), runtime.session

    def session(path: Path, **more: Any) -> Any:
        options.append(more)
        return opened(path, **more)

    monkeypatch.setattr(runtime, "session", session)
    source, wanted = exports.optimum_export("llama", dtype=dtype), {"batch_size": 1, "sequence_length": 8}
    for by_stages in (False, True):
        target = tmp_path / f"{by_stages}.onnx"
        memory = Memory(by_stages=by_stages)
        ModelQuantizer(W8).quantize_model(source, target, fix_shapes=wanted, check=None, memory=memory)
        assert options[-1] == {"optimize": not by_stages, "low_memory": by_stages}
    assert (tmp_path / "True.onnx").read_bytes() == (tmp_path / "False.onnx").read_bytes()


@pytest.mark.parametrize(
    "source", [exports.genai_like, lambda: exports.dynamo_export("llama")], ids=["genai", "dynamo"]
)
def test_a_part_of_the_lengths_from_the_command_line(source: object, tmp_path: Path) -> None:
    path = source()  # type: ignore[operator]
    name = next(dim for dim in shapes(path)[next(iter(shapes(path)))] if isinstance(dim, str))
    arguments = ["--scheme", "w8", "--no-rotate", "--fix-shape", f"{name}=1", "--quiet"]
    assert run(["quantize", str(path), str(tmp_path / "m.onnx"), *arguments]) == 0
    found = shapes(tmp_path / "m.onnx")
    assert next(iter(found.values()))[0] == 1
    assert not any(name == dim for shape in found.values() for dim in shape)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["batch_size"], "--fix-shape batch_size: write NAME=VALUE"),
        (["batch_size=0"], "VALUE is 1 or more"),
        (["batch_size=x"], "write NAME=VALUE"),
        ([f"batch_size={'9' * 5000}"], "fits into 31 bits"),
        (["batch_size=1", "batch_size=2"], "--fix-shape batch_size=2 contradicts batch_size=1"),
    ],
)
def test_what_is_no_length(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lengths(given)


@pytest.mark.parametrize("length", [0, -1, True, 2.0, "1", "x", None, 1 << 31, 10**30])
def test_what_is_no_length_in_python(length: Any) -> None:
    model = model_io.load(exports.optimum_export("llama"))
    with pytest.raises(
        ConfigError, match=r"fix_shapes \(--fix-shape\) batch_size=.*: a length is a whole number from 1"
    ):
        checked_lengths(model, {"batch_size": length})
    assert checked_lengths(model, {"batch_size": np.int64(2)}) == {"batch_size": 2}
    names: Any = ["batch_size"]
    with pytest.raises(ConfigError, match="fix_shapes is a list: give lengths by name"):
        checked_lengths(model, names)


def test_names_that_the_graph_does_not_have(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    assert run(["quantize", str(source), str(tmp_path / "m.onnx"), "--fix-shape", "batch=1"]) == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"batch=1: no input has such a length \(did you mean 'batch_size'\?\)"):
        checked_lengths(model_io.load(source), {"batch": 1})
    with pytest.raises(ConfigError, match="its free lengths are batch_size, sequence_length, past_sequence_length"):
        checked_lengths(model_io.load(source), {"zzz": 1})
