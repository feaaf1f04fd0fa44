"""``generate``: text on standard output, the rest on standard error; prompts from anywhere; contradictions refused."""

import io
import json
import sys
from pathlib import Path

import exports
import linear_graphs as graphs
import pytest
from command_line import Shell, files

from quarot_onnx.generation.generator import generate
from quarot_onnx.generation.sampling import Sampling

FEW = ("--max-new-tokens", 8)


def test_text_goes_to_standard_output_and_speeds_to_standard_error(shell: Shell, model: Path) -> None:
    result = shell.ok("generate", model, "--prompt", "The quick", *FEW)
    said = generate(model, "The quick", max_new_tokens=8)
    assert result.out == f"{said.text}\n"
    (line,) = result.err.splitlines()
    assert line.startswith("prefill 10 tokens, ")
    assert "; decode 7 tokens, " in line
    assert line.endswith(" tokens/s; stopped after 8 tokens")
    assert shell.ok("generate", model.parent, "--prompt", "The quick", "--greedy", *FEW).out == result.out


def test_a_model_that_does_not_fit_is_read_for_every_token(shell: Shell, model: Path) -> None:
    asked = ("generate", model, "--prompt", "The quick", "--max-new-tokens", 2)
    whole = shell.ok(*asked)
    small = shell.ok(*asked, "--max-memory", "100kB")
    assert small.out == shell.ok(*asked, "--by-stages").out == whole.out
    kept, read = [line for line in small.err.splitlines() if line.startswith("note: ")]
    assert kept.startswith("note: --max-memory of 0 MB cannot be kept: the process takes some 250 MB where it has")
    assert read == (
        f"note: {model} does not fit into memory: every token is a pass over the file (--whole opens it all the same)"
    )
    opened = shell.ok(*asked, "--max-memory", "100kB", "--whole")
    assert (opened.out, "note" in opened.err) == (whole.out, False)
    assert "--max-memory 'much' is no size" in shell.fails("generate", model, "--prompt", "a", "--max-memory", "much")


def test_json(shell: Shell, model: Path) -> None:
    content = shell.ok("generate", model, "--prompt", "The quick", *FEW, "--json").json
    said = generate(model, "The quick", max_new_tokens=8)
    (run,) = content["runs"]
    assert content["sampling"] is None
    assert run["prefill_tokens_per_s"] > 0
    assert run["decode_tokens_per_s"] > 0
    expected = {
        "prompt": "The quick", "prompt_ids": list(said.task.ids), "text": said.text, "ids": list(said.ids),
        "ended": False, "prefill_tokens": 10, "decode_tokens": 7,
    }  # fmt: skip
    assert {key: run[key] for key in expected} == expected
    one = shell.ok("generate", model, "--prompt", "The quick", "--max-new-tokens", 1, "--json").json["runs"][0]
    assert (one["decode_tokens"], one["decode_tokens_per_s"]) == (0, None)


def test_every_prompt_is_a_run_of_its_own(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffGrüße\nan alle\r\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n\n")))
    given = ("--prompt", "one", "--prompt-file", file, "--prompt", "two", "--prompt-file", "-")
    result = shell.ok("generate", model, *given, *FEW)
    prompts = ["one", "two", "Grüße\nan alle", "from a pipe\n"]
    assert result.out == "".join(f"{generate(model, prompt, max_new_tokens=8).text}\n" for prompt in prompts)
    told = [line for line in result.err.splitlines() if line.startswith("[")]
    assert told == ["[1/4] one", "[2/4] two", "[3/4] Grüße an alle", "[4/4] from a pipe"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.ndjson", "prompts.json"])
def test_a_prompt_file_is_one_prompt_whatever_its_name(name: str, shell: Shell, model: Path, tmp_path: Path) -> None:
    content = '{"text": "one"}\n{"text": "two"}'
    (tmp_path / name).write_bytes(f"\ufeff{content}\r\n".encode())
    (run,) = shell.ok("generate", model, "--prompt-file", tmp_path / name, *FEW, "--json").json["runs"]
    assert run["prompt"] == content
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
    assert f"{name} is not UTF-8 (byte 13)" in shell.fails("generate", model, "--prompt-file", tmp_path / name)


def test_sampling(shell: Shell, model: Path) -> None:
    def said(*options: object) -> dict:
        return shell.ok("generate", model, "--prompt", "one", "--prompt", "one", *FEW, "--json", *options).json

    first, again = said("--temperature", 2, "--top-k", 50, "--top-p", 0.9), said("--top-p", 0.9, "--seed", 3)
    assert first["sampling"] == {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "seed": 0}
    sampling = Sampling(temperature=2.0, top_k=50, top_p=0.9)
    text = generate(model, "one", max_new_tokens=8, sampling=sampling).text
    assert [run["text"] for run in first["runs"]] == [text, text]
    assert again["sampling"] == {"temperature": 1.0, "top_k": None, "top_p": 0.9, "seed": 3}
    assert again["runs"][0]["ids"] != first["runs"][0]["ids"]
    line = shell.ok("generate", model, "--prompt", "one", *FEW, "--top-k", 5).err
    assert line.endswith("; seed 0\n")


def test_chat(shell: Shell, model: Path) -> None:
    model.with_name("chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    plain, chat = (shell.ok("generate", model, "--prompt", "hi", *FEW, *more).out for more in ((), ("--chat",)))
    assert chat == plain
    model.with_name("chat_template.jinja").write_text("<s>Q: {{ messages[0].content }} A:")
    asked = shell.ok("generate", model, "--prompt", "hi", *FEW, "--chat").out
    assert asked == shell.ok("generate", model, "--prompt", "Q: hi A:", *FEW).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --prompt TEXT, or --prompt-file FILE"),
        (("--prompt", "a", "--greedy", "--top-k", 3), "--greedy draws nothing and contradicts --top-k 3"),
        (("--prompt", "a", "--greedy", "--seed", 3), "contradicts --seed 3"),
        (("--prompt", "a", "--seed", 3), "--seed 3 is for tokens that are drawn"),
        (("--prompt", "a", "--temperature", 0), "temperature=0.0: need a number above 0"),
        (("--prompt", "a", "--top-p", 1.5), "top_p=1.5"),
        (("--prompt", "a", "--top-k", 0), "'--top-k'"),
        (("--prompt", "a", "--max-new-tokens", 0), "'--max-new-tokens'"),
        (("--prompt", "a", "--chat"), "holds no chat template"),
        (("--prompt", "a", "--chat", "--no-bos"), "the template says what comes first"),
        (("--prompt", "a", "--bos", "--bos-id", 3), "--bos-id 3 contradicts --bos"),
        (("--prompt", "", "--no-bos"), "the prompt is empty"),
        (("--prompt", "caf\udce9"), "the prompt is not UTF-8 (byte 0xe9 behind 'caf'): convert it first"),
        (("--prompt", "a", "--prompt", "b" * 200), "the prompt has 201 tokens"),
        (("--prompt", "a", "--max-new-tokens", 127), "ask for 126 or fewer"),
        (("--prompt", "a", "--bos-id", 999), "token id 999 is outside"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--prompt-file", "/dev/null"), "the text /dev/null is empty: write one into it, or give --prompt TEXT"),
        (("--prompt", "a", "--tokenizer", "nowhere"), "no tokenizer at nowhere"),
    ],
)
def test_bad_input(options: tuple[object, ...], message: str, shell: Shell, model: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    assert message in shell.fails("generate", model, *options)
    assert files(tmp_path) == before


def test_standard_input_that_is_no_text(shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in ((b" \n", "standard input is empty"), (b"\xff", "on standard input is not UTF-8 (byte 0)")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert message in shell.fails("generate", model, "--prompt-file", "-")


def test_graphs_that_cannot_decode(shell: Shell, tmp_path: Path, model: Path) -> None:
    fixed = tmp_path / "fixed"
    lengths = ("--fix-shape", "sequence_length=8", "--fix-shape", "past_sequence_length=24")
    shell.ok("quantize", model, fixed, "--scheme", "w8", "--no-rotate", *lengths)
    assert "takes 8 tokens at a time" in shell.fails("generate", fixed, "--prompt", "a")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "model.onnx"
    other.write_bytes(graphs.two_linears().SerializeToString())
    model.with_name("tokenizer.json").rename(other.with_name("tokenizer.json"))
    assert "takes embeddings in place of token ids" in shell.fails("generate", other, "--prompt", "a")
    assert "no tokenizer.json beside" in shell.fails("generate", model, "--prompt", "a")


def test_a_record_of_the_bos(shell: Shell) -> None:
    """What --bos-id says stands in the record, as any other token of the prompt."""
    source = exports.genai_like()
    run = shell.ok("generate", source, "--prompt", "a", "--bos-id", 9, *FEW, "--json").json["runs"][0]
    assert run["prompt_ids"][0] == 9
    assert json.loads(json.dumps(run))["prefill_tokens"] == 2
