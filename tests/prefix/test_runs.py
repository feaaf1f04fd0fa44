"""A sink is found, kept out of the integers, and told of, from the command line to the finished model."""

import json
import re
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Shell, files
from lowbit_runs import text_reader
from onnx import numpy_helper
from planted_sink import SINK, plant

from quarot_onnx import (
    GPTQConfig,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QuarotConfig,
    SinkPrefixConfig,
    SmoothQuantConfig,
    UInt8Spec,
)
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.leading import texts_of
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.calibration.text import windows
from quarot_onnx.calibration.tokenizer import load_tokenizer
from quarot_onnx.config import Int4Spec, Int8Spec
from quarot_onnx.errors import ConfigError, InputError, ModelError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.metadata import prefix_of, recorded
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.prefix.sinks import Sinks
from quarot_onnx.sessions import runtime

STATIC = QLayerConfig(UInt8Spec(), Int8Spec())
FEW = ("--calib-samples", 4, "--calib-seq-len", 65)


@pytest.fixture(scope="module", params=["optimum", "genai"])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one token makes the down projections' inputs some hundred times as large."""
    return plant(request.param, tmp_path_factory.mktemp(request.param))


def test_the_sink_is_found(planted: Path) -> None:
    reader = text_reader(planted, 4, 65)
    assert set(reader.token_windows[:, 0].tolist()) == {SINK}
    model = model_io.load(planted)
    names = [linear.input.name for linear in linears(model.graph)]
    sinks = Sinks(model, reader.inputs, names, [reader.token_windows])
    found = sinks.search(4)
    assert [loss.ids for loss in found] == [(), (SINK,)]
    assert found[0].outliers == ((SINK, len(sinks.pieces)),)
    assert found[0].pieces == len(sinks.pieces)
    assert not found[1].outliers
    assert found[0].bits > found[1].bits + 0.4
    assert "down_proj" in found[0].worst[1] or "Mul" in found[0].worst[1]
    assert sinks.loss((9, SINK)).ids == (9, SINK)
    assert sinks.loss((9,)).pieces == 0


def test_piece_by_piece_the_same_is_lost(planted: Path) -> None:
    reader, model = text_reader(planted, 4, 65), model_io.load(planted)
    names = [linear.input.name for linear in linears(model.graph)]
    whole, pieces = (
        Sinks(model, reader.inputs, names, [reader.token_windows], memory=memory)
        for memory in (WHOLE, Memory(300_000, by_stages=True))
    )
    assert pieces.search(4) == whole.search(4)
    assert pieces.loss((9, 4)) == whole.loss((9, 4))
    assert whole._peaks._latest[0] is model
    assert len(pieces._peaks._latest[0].graph) < len(model.graph) / 2, "the last piece of many"


@pytest.mark.parametrize("form", ["graph", "npz"])
def test_piece_by_piece_the_output_is_the_same(form: str, planted: Path, shell: Shell, tmp_path: Path) -> None:
    for way, more in (("--whole", ()), ("--by-stages", ("--max-memory", 300_000))):
        out = tmp_path / way / "m.onnx"
        shell.ok("quantize", planted, out, "--scheme", "w8a8-static", *FEW, "--prefix", form, "--no-check", way, *more)
    assert len(files(tmp_path / "--whole")) >= 3 + (form == "npz")
    pair = [files(tmp_path / way) for way in ("--whole", "--by-stages")]
    assert {name: content for name, content in pair[0].items() if not name.endswith("quarot.json")} == {
        name: content for name, content in pair[1].items() if not name.endswith("quarot.json")
    }


def scale_of(path: Path, name: str) -> float:
    """The largest step of the fixed grids before the down projections."""
    model = onnx.load(path)
    scales = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    down = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and name in n.name]
    return max(float(scales[node.input[1]]) for node in down)


def test_auto_keeps_it_out_of_the_integers(planted: Path, shell: Shell, tmp_path: Path) -> None:
    plain, better = tmp_path / "plain" / "m.onnx", tmp_path / "better" / "m.onnx"
    common = ("--scheme", "w8a8-static", "--no-rotate", *FEW)
    shell.ok("quantize", planted, plain, *common)
    told = shell.ok("quantize", planted, better, *common, "--prefix", "auto")
    assert "sink_prefix: at 2 places" in told.out
    assert f"sink prefix [{SINK}]: without it peaks up to" in told.err
    assert f"the graph holds the prefix [{SINK}]: feed what comes after it, without a BOS" in told.err
    assert "calibrated: BOS" not in told.out
    assert prefix_of(recorded(model_io.load(better))) == ("graph", (SINK,))
    assert scale_of(better, "down_proj") < scale_of(plain, "down_proj") / 3
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    before, after = (
        shell.ok("compare", planted, path, "--text", text, "--tokens", 256, "--json").json for path in (plain, better)
    )
    assert after["kl"] < before["kl"]
    found = shell.ok("evaluate", better, "--text", text, "--seq-len", 65, "--windows", 3)
    assert f"the model brings the prefix [{SINK}]: windows are fed without their first 1" in found.err
    same = [perplexity(path, text, planted.parent, seq_len=65, windows=3, unscored=2) for path in (planted, better)]
    assert same[0].tokens == same[1].tokens == 3 * 63
    assert abs(same[1].nll - same[0].nll) < 0.2
    assert f"sink prefix: [{SINK}], in the graph" in shell.ok("inspect", better).out


def test_a_float_model_that_has_a_prefix_is_the_original(planted: Path, shell: Shell, tmp_path: Path) -> None:
    text, held = tmp_path / "text.txt", tmp_path / "held" / "m.onnx"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    shell.ok("rotate", planted, held, "--prefix-ids", SINK)
    on = ("--text", text, "--tokens", 256, "--json")
    itself = shell.ok("compare", held, held, *on).json
    assert itself["kl"] < 1e-6
    assert itself["top1_agreement"] == 1
    once, twice = tmp_path / "once" / "m.onnx", tmp_path / "twice" / "m.onnx"
    shell.ok("quantize", planted, once, "--scheme", "w8a8-static", *FEW, "--prefix", "graph", "--prefix-ids", SINK)
    done = shell.ok("quantize", held, twice, "--scheme", "w8a8-static", *FEW, "--json").json
    a, b, c = (
        shell.ok("compare", first, second, *on).json
        for first, second in ((planted, once), (held, twice), (planted, twice))
    )
    assert a["kl"] == pytest.approx(c["kl"], rel=0.2)
    assert b["kl"] == pytest.approx(a["kl"], rel=0.2)
    assert done["check"]["kl"] < 2 * b["kl"]
    backwards = shell.ok("compare", held, planted, *on).json
    assert backwards["tokens"] == a["tokens"]
    assert backwards["kl"] < 1e-6
    assert "has the prefix" in shell.fails("inspect", held, "--sinks", "--text", text)


def test_windows_that_begin_with_more_of_the_prefix_or_less(planted: Path, shell: Shell, tmp_path: Path) -> None:
    text, better = tmp_path / "text.txt", tmp_path / "better" / "m.onnx"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    loaded = load_tokenizer(planted.parent)
    ids = windows(text.read_text(), loaded, length=16, count=4, bos_id=SINK)
    second = next(int(token) for token in ids[:, 1] if token != ids[0, 1])
    command = ("--scheme", "w8a8-static", "--no-rotate", *FEW, "--prefix", "graph", "--prefix-ids", f"{SINK},{second}")
    shell.ok("quantize", planted, better, *command)
    evaluation = ("--text", text, "--seq-len", 16, "--windows", 4, "--bos-id", SINK)
    assert "without their first 1 to 2, and" in shell.ok("evaluate", better, *evaluation).err
    same = (*evaluation, "--unscored", 3, "--json")
    counted = [shell.ok("evaluate", path, *same).json["tokens"] for path in (planted, better)]
    assert counted == [4 * 13, 4 * 13]


def test_beside_the_model_it_is_a_cache(planted: Path, shell: Shell, tmp_path: Path) -> None:
    common = ("--scheme", "w8a8-static", "--no-r4", *FEW)
    graph, npz = tmp_path / "graph" / "m.onnx", tmp_path / "npz" / "m.onnx"
    shell.ok("quantize", planted, graph, *common, "--prefix", "graph")
    told = shell.ok("quantize", planted, npz, *common, "--prefix", "npz")
    assert "feed prefix.npz as past inputs, 1 positions" in told.err
    past = dict(np.load(npz.parent / "prefix.npz"))
    inputs = ModelInputs.from_path(npz)
    assert set(past) == {name for name, _ in inputs.presents}
    assert {array.shape[::2] for array in past.values()} == {(1, 1)}
    ids = np.random.default_rng(0).integers(0, 250, (1, 20))
    (one,) = runtime.session(graph).run([inputs.logits], inputs.feed(ids))
    (other,) = runtime.session(npz).run([inputs.logits], inputs.feed(ids, past))
    assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()
    report = json.loads((npz.parent / "m.quarot.json").read_text())
    assert "prefix.npz" in report["beside"]["companions"]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    values = [perplexity(path, text, planted.parent, seq_len=65, windows=3).perplexity for path in (graph, npz)]
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    (npz.parent / "prefix.npz").unlink()
    assert "prefix.npz is missing" in shell.fails("evaluate", npz, "--text", text)


@pytest.mark.further
def test_all_doors_lead_to_the_same_bytes(planted: Path, shell: Shell, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rotation: {r4: false}\nsmoothing: {alpha: 0.4}\nprefix: {form: graph}\n"
        "weights: {method: gptq, bits: 4}\nactivations: {bits: 8}\n"
    )
    typed = ("--w-bits", 4, "--weights", "gptq", "--a-bits", 8, "--no-r4", "--smooth-alpha", 0.4, "--prefix", "graph")
    for name, options in (("file", ("--recipe", recipe)), ("typed", typed)):
        shell.ok(
            "quantize", planted, tmp_path / name / "m.onnx", *options, *FEW, "--calib-own", 0, "--no-check", "--quiet"
        )
    layer = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int4Spec())
    head = [linear.name for linear in linears(model_io.load(planted).graph) if linear.out_features == 264]
    algorithms = [QuarotConfig(r4=False), SmoothQuantConfig(0.4), SinkPrefixConfig(form="graph"), GPTQConfig()]
    quantizer = ModelQuantizer(QConfig(layer, exclude=head, algo_config=algorithms))
    quantizer.quantize_model(planted, tmp_path / "python" / "m.onnx", text_reader(planted, 4, 65), check=None)
    data = [[p.read_bytes() for p in sorted((tmp_path / name).glob("m.onnx*"))] for name in ("file", "typed", "python")]
    assert data[0]
    assert data[0] == data[1] == data[2]
    done = recorded(model_io.load(tmp_path / "python" / "m.onnx"))
    assert [entry["name"] for entry in done["transforms"]] == ["smooth_quant", "sink_prefix"]


def test_a_float_model_with_a_prefix(planted: Path, shell: Shell, tmp_path: Path) -> None:
    held = tmp_path / "held" / "model.onnx"
    done = shell.ok("rotate", planted, held, "--prefix-ids", f"{SINK}, 9")
    assert "sink_prefix: at 2 places" in done.out
    assert shell.ok("verify", planted, held).out.count("the same") > 2
    for arguments, message in (
        (("rotate", held, tmp_path / "a.onnx"), "has the sink prefix .256, 9., so it cannot be rotated any more"),
        (("quantize", held, tmp_path / "a.onnx", "--prefix", "graph"), "cannot be given another any more"),
        (("quantize", held, tmp_path / "a.onnx", "--smooth-alpha", 0.5, "--no-rotate"), "cannot be smoothed any more"),
    ):
        assert re.search(message, shell.fails(*arguments, *(() if arguments[0] == "rotate" else FEW)))
    quantized = tmp_path / "q" / "m.onnx"
    shell.ok("quantize", held, quantized, "--scheme", "w8a8-static", "--no-rotate", *FEW, "--max-ppl-ratio", 1.1)
    direct = tmp_path / "direct" / "m.onnx"
    layer = QConfig(STATIC, algo_config=[QuarotConfig(r3=False), SinkPrefixConfig(form="graph", ids=[SINK, 9])])
    quantize(planted, direct, layer, text_reader(planted, 4, 65), check=None)
    assert scale_of(direct, "down_proj") == pytest.approx(scale_of(quantized, "down_proj"), rel=0.05)


def test_two_models_with_different_prefixes_are_not_compared(planted: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name / "model.onnx" for name in ("a", "b")]
    for path, ids in zip(paths, ([SINK], [9]), strict=True):
        rotate(planted, path, QuarotConfig(), prefix=SinkPrefixConfig(form="graph", ids=ids), verify=False)
    with pytest.raises(ModelError, match=r"different prefixes, \(9,\) and \(256,\)"):
        compare(*paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefix", "graf"), "--prefix"),
        (("--prefix", "none", "--prefix-ids", "1"), "--prefix none contradicts --prefix-ids 1; leave"),
        (("--prefix", "graph", "--prefix-ids", "1;2"), "numbers with commas between them"),
        (
            ("--prefix", "graph", "--prefix-ids", "9999"),
            "outside the model's vocabulary of 264: use the tokenizer that belongs to the model, and ids that it has",
        ),
        (("--prefix", "graph", "--prefix-ids", ",".join(["1"] * 200)), "a prefix of 200 tokens leaves nothing"),
    ],
    ids=str,
)
def test_what_cannot_be(options: tuple, message: str, planted: Path, shell: Shell, tmp_path: Path) -> None:
    before = files(planted.parent)
    said = shell.fails("quantize", planted, tmp_path / "m.onnx", "--scheme", "w8a8-static", *options, *FEW)
    assert message in said
    assert not list(tmp_path.iterdir())
    assert files(planted.parent) == before


def test_auto_does_without_where_there_is_nothing_to_gain(shell: Shell, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    dynamic = shell.ok("quantize", source, tmp_path / "d.onnx", "--prefix", "auto", *FEW)
    assert "no activation has a fixed scale" in dynamic.err
    static = ("--scheme", "w8a8-static", "--no-rotate", *FEW)
    quiet = shell.ok("quantize", source, tmp_path / "s.onnx", *static, "--prefix", "auto")
    assert "no sink prefix: no token stands out (peaks up to" in quiet.err
    assert prefix_of(recorded(model_io.load(tmp_path / "s.onnx"))) is None
    line = shell.fails("quantize", source, tmp_path / "x.onnx", *static, "--prefix", "graph")
    assert "no token stands out (peaks up to" in line
    assert line.endswith("; leave it out, or name tokens (--prefix-ids; ids in Python and recipes)")
    assert not (tmp_path / "x.onnx").exists()


def test_samples_that_are_no_whole_texts(planted: Path, tmp_path: Path) -> None:
    inputs = ModelInputs.from_path(planted)
    ids = np.random.default_rng(0).integers(0, 250, (1, 40))
    past = {name: np.zeros((1, *inputs.feed(ids)[name].shape[1:2], 3, inputs.feed(ids)[name].shape[3]), np.float32)
            for name, _ in inputs.presents}  # fmt: skip
    config = QConfig(STATIC, algo_config=[SinkPrefixConfig(form="graph")])
    reader = SampleReader([inputs.feed(ids, past)])
    with pytest.raises(InputError, match="calibration sample 0 holds a past, and a sink prefix needs whole texts"):
        quantize(planted, tmp_path / "m.onnx", config, reader, check=None)
    with pytest.raises(ConfigError, match="the prefix stands too early"):
        QConfig(STATIC, algo_config=[SinkPrefixConfig(), SmoothQuantConfig()])
    assert not list(tmp_path.iterdir())


def test_a_graph_without_room_says_why(shell: Shell, tmp_path: Path) -> None:
    source = exports.dynamo_export("llama")
    said = shell.fails("quantize", source, tmp_path / "m.onnx", "--scheme", "w8a8-static", "--prefix", "npz", *FEW)
    assert "the graph takes no cache of free length, so a prefix cannot be fed as one; keep it in the graph" in said
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_sinks(planted: Path, shell: Shell, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    shown = shell.ok("inspect", planted, "--sinks").out
    assert "Attention sinks" in shown
    assert f"{SINK} '<s>'" in shown
    found = shell.ok("inspect", planted, "--sinks", "--text", text, "--json").json["sinks"]
    assert [entry["prefix"] for entry in found] == [[], [SINK]]
    assert found[0]["outliers"][0][0] == "<s>"
    assert found[0]["bits"] > found[1]["bits"]
    assert "--text is read for --sinks alone; add it, or" in shell.fails("inspect", planted, "--text", text)
    shell.ok("quantize", planted, tmp_path / "q.onnx", "--scheme", "w8", "--no-check")
    assert "--sinks looks at float activations" in shell.fails("inspect", tmp_path / "q.onnx", "--sinks")


def test_nothing_is_left_to_score(planted: Path, shell: Shell, tmp_path: Path) -> None:
    held, text = tmp_path / "held" / "model.onnx", tmp_path / "text.txt"
    shell.ok("rotate", planted, held, "--prefix-ids", SINK, "--no-verify")
    text.write_text("The quick brown fox. " * 40)
    assert "hold none to score behind the prefix" in shell.fails("evaluate", held, "--text", text, "--seq-len", 2)


def test_rows_of_a_fixed_batch_stay_texts_of_their_own(planted: Path) -> None:
    model, inputs = model_io.load(planted), ModelInputs.from_path(planted)
    for value in model.graph.inputs:
        value.shape = ir.Shape([2, *list(value.shape)[1:]])
    mask = next(name for name, role in inputs.roles.items() if role is InputRole.MASK)
    feeds = inputs.feed(np.arange(16).reshape(2, 8))
    feeds[mask] = np.array([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2])
    found = texts_of(model, [feeds])
    assert [rows.tolist() for rows in found] == [[[3, 4, 5, 6, 7]], [[14, 15]]]
