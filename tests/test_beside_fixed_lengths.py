"""Models whose lengths are fixed, beside others: what is compared is what both take, and what both see."""

import shutil
from pathlib import Path

import exports
import pytest
from command_line import Shell

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.pieces import common_window, fitting_window, takes
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.io.lengths import fix_lengths

RUNS = {"batch_size": 1, "sequence_length": 16, "past_sequence_length": 48}
TOKEN = {"batch_size": 1, "sequence_length": 1, "past_sequence_length": 63}
BATCH = {"batch_size": 3}
TOTAL = {"total_sequence_length": 64}


def fixed(case: str, lengths: dict[str, int], folder: Path) -> Path:
    """The export with its lengths fixed and nothing else changed."""
    shutil.copytree(exports.EXPORTS[case]().parent, folder)
    fix_lengths(folder / "model.onnx", lengths)
    return folder / "model.onnx"


def options(lengths: dict[str, int]) -> list[str]:
    return [word for name, value in lengths.items() for word in ("--fix-shape", f"{name}={value}")]


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
@pytest.mark.parametrize("lengths", [RUNS, TOKEN, BATCH], ids=["16 tokens", "a token", "3 rows"])
def test_both_are_run_with_the_lengths_of_one(case: str, lengths: dict[str, int], shell: Shell, tmp_path: Path) -> None:
    free, more = exports.EXPORTS[case](), {} if case != "genai" or "sequence_length" not in lengths else TOTAL
    one = fixed(case, lengths | more, tmp_path / "fixed")
    for pair in ((free, one), (one, free)):
        found = shell.ok("verify", *pair, "--json").json
        assert found["max_abs_logit_diff"] == 0
        assert found["decode_steps"] > 0


def test_other_lengths_are_refused_by_name(shell: Shell, tmp_path: Path) -> None:
    one = fixed("optimum llama", RUNS, tmp_path / "one")
    rows = fixed("optimum llama", BATCH, tmp_path / "rows")
    longer = fixed("optimum llama", {"batch_size": 1, "sequence_length": 32}, tmp_path / "longer")
    assert f"{rows} takes 3 texts at once and the model before it 1" in shell.fails("verify", one, rows)
    assert f"{longer} takes 32 tokens at once and the model before it 16" in shell.fails("verify", one, longer)


@pytest.mark.parametrize("lengths", [RUNS, TOKEN], ids=["16 tokens", "a token"])
def test_compare_does_not_go_past_the_cache(lengths: dict[str, int], shell: Shell, text: Path, tmp_path: Path) -> None:
    """Of 64 positions; the same integers in both, whose figures are those of the same windows."""
    source, small = exports.EXPORTS["optimum llama"](), ("--scheme", "w8", "--no-check", "--no-verify")
    for name, more in (("free", []), ("fixed", options(lengths))):
        shell.ok("quantize", source, tmp_path / name / "model.onnx", *small, *more)
    for words in ((), ("--text", text)):
        free, held = (
            shell.ok("compare", source, tmp_path / name, *words, "--tokens", tokens, "--json").json
            for name, tokens in (("free", 64), ("fixed", 512))
        )
        assert held["tokens"] == 512
        assert held["kl"] == pytest.approx(free["kl"], rel=0.3)
        assert held["decode_kl"] < 2 * held["kl"]


def test_windows_behind_a_prefix_fit(shell: Shell, text: Path, tmp_path: Path) -> None:
    """A BOS that the model brings is not fed: one token more makes up for it."""
    source, small = exports.EXPORTS["optimum llama"](), ("--scheme", "w8", "--no-check", "--no-verify")
    prefix = ("--prefix", "graph", "--prefix-ids", "256,84")  # a text that begins with a T shares both
    for name, more in (("free", []), ("fixed", options(RUNS))):
        shell.ok("quantize", source, tmp_path / name / "model.onnx", *small, *prefix, *more)
    model = tmp_path / "fixed" / "model.onnx"
    found = perplexity(model, text, model.parent, windows=10)
    assert found.seq_len == 65
    free = perplexity(tmp_path / "free" / "model.onnx", text, model.parent, windows=10, seq_len=65)
    assert found.perplexity == pytest.approx(free.perplexity, rel=0.02), "the first window shares one token more there"
    said = shell.fails("evaluate", model, "--text", text, "--seq-len", 64)
    assert "windows have 64 tokens, of which the model brings 1 itself" in said
    assert "take windows of 17 or 16 more, and so on" in said
    for length in (17, 33):
        assert perplexity(model, text, model.parent, windows=2, seq_len=length).notes[1:] == ()
    assert shell.ok("compare", source, model, "--tokens", 64, "--json").json["decode_steps"] == 4
    assert shell.ok("compare", source, model, "--text", text, "--tokens", 64, "--json").json["tokens"] == 64


@pytest.mark.parametrize("lengths", [RUNS, {"past_sequence_length": 48}], ids=["16 tokens", "48 positions"])
def test_a_prefix_is_not_fed_in_runs_of_fixed_length(lengths: dict[str, int], shell: Shell, tmp_path: Path) -> None:
    """Beside a model that holds it; two that do are verified."""
    source, path = exports.EXPORTS["optimum llama"](), tmp_path / "fixed" / "model.onnx"
    shell.ok("rotate", source, path, "--prefix-ids", "256,84", "--no-verify")
    shell.ok("verify", source, path)
    fix_lengths(path, lengths)
    for pair in ((source, path), (path, source)):
        said = shell.fails("verify", *pair)
        assert f"{path} holds the prefix [256, 84], which {source} would have to be fed" in said
        assert "verify the model as it was before its lengths were fixed" in said
    assert shell.ok("verify", path, path, "--json").json["max_abs_logit_diff"] == 0


def test_evaluate_tells_of_what_falls_out_of_the_cache(text: Path, tmp_path: Path) -> None:
    model = fixed("optimum llama", RUNS, tmp_path / "fixed")
    told = [perplexity(model, text, model.parent, windows=2, seq_len=length).notes for length in (64, 80)]
    assert told[0] == ()
    assert told[1][0].startswith("windows of 80 tokens are longer than what the graph's cache of 48 positions holds")
    assert told[1][0].endswith("use 64 or fewer (--seq-len)")


@pytest.mark.parametrize("first", [{}, BATCH, RUNS], ids=["free", "3 rows", "16 tokens"])
def test_rows_that_fill_up_a_batch_are_not_compared(first: dict[str, int], shell: Shell, tmp_path: Path) -> None:
    source = fixed("optimum llama", first, tmp_path / "first") if first else exports.EXPORTS["optimum llama"]()
    second = fixed("optimum llama", {"batch_size": 4}, tmp_path / "second")
    found = shell.ok("compare", source, second, "--tokens", 300, "--json").json
    assert found["kl"] == 0
    assert found["tokens"] % 4 == 0


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("lengths", [{}, RUNS, TOKEN, {"past_sequence_length": 40}], ids=str)
def test_a_common_window_is_one(lengths: dict[str, int], held: int, tmp_path: Path) -> None:
    a = ModelInputs.from_path(exports.EXPORTS["optimum llama"]())
    b = ModelInputs.from_path(fixed("optimum llama", lengths, tmp_path / "fixed"))
    for wanted in (5, 36, 63, 256):
        length = fitting_window(a, wanted, 4)[0]
        found = common_window(a, b, length, decode_steps=4, held=held, most=None)
        assert takes(a, found, 4)
        assert takes(b, found - held, 4)
        assert found >= min(length, 32)
        at_most = common_window(a, b, length, decode_steps=4, held=held, most=length)
        assert takes(b, at_most - held, 4)
        assert at_most <= length or length - held < 16


@pytest.mark.parametrize(
    "scheme",
    [
        ("--scheme", "w8", "--prefix", "graph", "--prefix-ids", "256,84"),
        ("--w-bits", 16, "--kv-bits", 4, "--no-k-balance"),
        ("--w-bits", 16, "--kv-bits", 4, "--prefix", "graph", "--prefix-ids", "256,84"),
        ("--w-bits", 16, "--kv-bits", 8),
    ],
    ids=["prefix", "4 bits", "4 bits and a prefix", "8 bits"],
)
def test_a_cache_of_fixed_length_is_fed_as_it_is_written(
    scheme: tuple[object, ...], shell: Shell, text: Path, tmp_path: Path
) -> None:
    """From its beginning, as GroupQueryAttention does, whatever stands before it."""
    lengths = options(
        {"batch_size": 1, "sequence_length": 1, "past_sequence_length": 31} | {"total_sequence_length": 32}
    )
    source, few = exports.EXPORTS["genai"](), ("--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 24)
    found = []
    for name, more in (("free", []), ("fixed", lengths)):
        path = tmp_path / name / "model.onnx"
        shell.ok("quantize", source, path, *scheme, *few, "--no-check", "--no-verify", *more)
        found.append(shell.ok("compare", source, path, "--text", text, "--tokens", 28, "--json").json)
    free, fixed_ = found
    assert fixed_["tokens"] == free["tokens"]
    for figure in ("kl", "decode_kl"):
        assert fixed_[figure] == pytest.approx(free[figure], rel=1e-3, abs=1e-9)
