"""What is generated is what the model says, however its graph, its cache and its prefix are spelt."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import odd_decoders as odd
import onnx
import pytest
import tiny_decoders as tiny
from exports import BOS, EOS, EXPORTS, genai_like
from lowbit_runs import LAYERS, TOKEN
from tokenizers import pre_tokenizers

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig, QuarotConfig, RTNConfig, SinkPrefixConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.stops import end_ids
from quarot_onnx.calibration.tokenizer import load_tokenizer
from quarot_onnx.errors import CalibrationError, FeedError, ModelError
from quarot_onnx.generation.generator import Generated, Generator, generate
from quarot_onnx.generation.sampling import Sampling
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.run.prefixing import prefix_files, put_prefix
from quarot_onnx.sessions import runtime

PROMPT, COUNT = "The quick", 12
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
W8 = QLayerConfig(TOKEN, UInt8Spec(symmetric=True, quant_granularity="Channel"))


def ids_of(text: str) -> tuple[int, ...]:
    """A token for each byte, in the order of their letters in the vocabulary of the tiny models."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return tuple(LETTERS.index(letter) for word, _ in words for letter in word)


def assert_greedy(found: Generated, source: Path, before: tuple[int, ...] = (), tolerance: float = 1e-4) -> None:
    """Each token is the likeliest of a whole run of the model on what precedes it.

    Args:
        found: What was generated.
        source: A model that knows no prefix.
        before: The prefix, where it is no part of the prompt.
        tolerance: Of the largest logit; the float32 caches of a step and of a whole run differ by roundings.
    """
    assert found.ids
    inputs = ModelInputs.from_path(source)
    said = (*found.ids, EOS) if found.ended else found.ids
    ids = np.array([[*before, *found.task.ids, *said]])
    (logits,) = runtime.session(source).run([inputs.logits], inputs.feed(ids))
    rows = logits[0, -len(said) - 1 : -1].astype(np.float64)
    chosen = rows[np.arange(len(said)), list(said)]
    assert (rows.max(axis=1) - chosen).max() <= tolerance * np.abs(rows).max()


@pytest.mark.parametrize("case", EXPORTS)
def test_greedy_is_the_likeliest_of_whole_runs(case: str) -> None:
    source = EXPORTS[case]()
    found = generate(source, PROMPT, max_new_tokens=COUNT)
    assert found.task.ids == (BOS, *ids_of(PROMPT))
    assert found.ended or len(found.ids) == COUNT
    assert found.fed == 1 + len(PROMPT)
    assert found.steps == len(found.ids) + found.ended - 1
    assert_greedy(found, source, tolerance=0.02 if "fp16" in case else 1e-4)


@pytest.mark.parametrize("case", ["optimum llama", "dynamo llama", "dynamo cache", "genai", "genai RoPE outside"])
@pytest.mark.parametrize("ids", [(BOS,), (7, 3), (BOS, *ids_of("T"))], ids=["BOS", "other", "BOS and a letter"])
def test_behind_a_prefix_inside_the_graph(case: str, ids: tuple[int, ...], tmp_path: Path) -> None:
    source = EXPORTS[case]()
    found = generate(prefixed(source, tmp_path, "graph", ids), PROMPT, max_new_tokens=COUNT)
    shared = len(ids) if ids[0] == BOS else 0
    assert found.fed == 1 + len(PROMPT) - shared
    assert_greedy(found, source, before=() if shared else ids)


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
@pytest.mark.parametrize("ids", [(BOS,), (7, 3)], ids=["BOS", "other"])
def test_behind_a_prefix_beside_the_graph(case: str, ids: tuple[int, ...], tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target = prefixed(source, tmp_path, "npz", ids)
    generator = Generator(target)
    task = generator.task(PROMPT, max_new_tokens=COUNT)
    found, again = generator.run(task), generator.run(task)
    assert found.ids == again.ids
    assert_greedy(found, source, before=() if ids == (BOS,) else ids)
    (target.parent / "prefix.npz").unlink()
    with pytest.raises(ModelError, match=r"prefix\.npz is missing"):
        Generator(target)


@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "dynamo llama", "dynamo cache", "genai"])
def test_piece_by_piece_it_says_the_same(case: str) -> None:
    source = EXPORTS[case]()
    pieces = generate(source, PROMPT, max_new_tokens=COUNT, memory=Memory(100_000, by_stages=True))
    assert pieces.ids == generate(source, PROMPT, max_new_tokens=COUNT, memory=WHOLE).ids


@pytest.mark.parametrize("form", ["graph", "npz"])
def test_piece_by_piece_behind_a_prefix(form: str, tmp_path: Path) -> None:
    target = prefixed(EXPORTS["optimum llama"](), tmp_path, form, (7, 3))
    generator = Generator(target, memory=Memory(100_000))
    assert generator.by_pieces
    task = generator.task(PROMPT, max_new_tokens=4)
    assert generator.run(task).ids == generator.run(task).ids == Generator(target).run(task).ids


def prefixed(source: Path, folder: Path, form: str, ids: tuple[int, ...]) -> Path:
    model = model_io.load(source)
    made, _ = put_prefix(model, source, SinkPrefixConfig(form=form, ids=ids), source.parent)
    target = folder / "prefixed" / "model.onnx"
    model_io.save(model, target, companions_from=source.parent)
    for name, content in prefix_files(made.lead).items():
        (target.parent / name).write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, kind) for case in ("optimum llama", "genai") for kind in ("w8a8", "w4a8", "nbits", "fake")),
        ("dynamo llama", "w8a8"),
        ("dynamo cache", "w8a8"),
    ],
)
def test_quantized(case: str, kind: str, tmp_path: Path) -> None:
    source, target = EXPORTS[case](), tmp_path / "model.onnx"
    layers, rounding = (W8, []) if kind == "w8a8" else (LAYERS[kind], [RTNConfig()])
    config = QConfig(layers, algo_config=[QuarotConfig(r4=False), *rounding])
    ModelQuantizer(config).quantize_model(source, target, check=None)
    # A rounding of float32 may move an activation by a step of its 8 (fake: 4) bits.
    assert_greedy(generate(target, PROMPT, max_new_tokens=COUNT), target, tolerance=0.05)


@pytest.mark.parametrize("axes", [0, 2, 3, 4])
def test_a_cache_of_integers_and_scales(axes: int, tmp_path: Path) -> None:
    path = words(tiny.save(tiny.build(tiny.Spec(scales=axes)), tmp_path), tiny.VOCAB)
    assert_greedy(generate(path, "w5 w6 w7", max_new_tokens=COUNT), path)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_that_fused_attention_quantizes(bits: int, tmp_path: Path) -> None:
    """GroupQueryAttention's own integers, of a width that the graph leaves open; 4 bits are two to a byte."""
    source = genai_like(packed_qkv=False)
    path = copied(source, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.elem_type = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.UINT8}[bits]
    # Keys and values reach some 4 in size.
    scale = onnx.numpy_helper.from_array(np.array([4 / 2 ** (bits - 1)], np.float32), "kv_scale")
    proto.graph.initializer.append(scale)
    for node in (node for node in proto.graph.node if node.op_type == "GroupQueryAttention"):
        node.input.extend([*[""] * (12 - len(node.input)), "kv_scale", "kv_scale"])
        attributes = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": bits}
        node.attribute.extend(onnx.helper.make_attribute(*pair) for pair in attributes.items())
    onnx.save(proto, path)
    found = generate(path, PROMPT, max_new_tokens=COUNT)
    assert_greedy(found, path, tolerance=0.05)


def words(model: Path, vocab: int) -> Path:
    tiny.tokenizer(vocab).save(str(model.with_name("tokenizer.json")))
    return model


FITTING = {
    "fixed batch": odd.Spec(batch=3),
    "a token at a time": odd.Spec(batch=1, seq=1),
    "a token at a time, fixed past": odd.Spec(batch=1, seq=1, past=15, mask="ones"),
    "fixed past": odd.Spec(batch=1, past=80, mask="ones"),
    "number of logits": odd.Spec(number="keep"),
}


@pytest.mark.parametrize("case", FITTING)
def test_lengths_that_leave_room_for_a_token(case: str, tmp_path: Path) -> None:
    path = words(odd.write(tmp_path / "a", FITTING[case]), odd.VOCAB)
    free = odd.write(tmp_path / "b", replace(FITTING[case], batch="batch", seq="seq", past="past"))
    assert_greedy(generate(path, "w5 w6 w7", max_new_tokens=9), free)


REFUSED: dict[str, tuple[odd.Spec, type[Exception], str]] = {
    "fixed length": (odd.Spec(batch=1, seq=16, past=0), ModelError, "takes 16 tokens at a time"),
    "fixed mask": (odd.Spec(mask="ones", total=16), ModelError, "takes 16 tokens at a time"),
    "pieces": (odd.Spec(batch=1, seq=4, past=12, mask="bias"), ModelError, "takes 4 tokens at a time"),
    "one token, no cache": (odd.Spec(batch=1, seq=1, past=0), ModelError, "no cache holds what was before"),
    "embeddings": (odd.Spec(ids="embedded", mask="ones"), FeedError, "takes embeddings in place of token ids"),
    "unknown input": (odd.Spec(unknown=True), FeedError, "'temperature' .* is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_decode_is_refused(case: str, tmp_path: Path) -> None:
    spec, error, message = REFUSED[case]
    path = words(odd.write(tmp_path, spec), odd.VOCAB)
    with pytest.raises(error, match=message):
        Generator(path)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source.parent, folder / "model")) / source.name


def set_ends(model: Path, **files: object) -> None:
    """Let these files alone name the tokens that end a text."""
    for name in ("generation_config", "genai_config", "config", "tokenizer_config"):
        path = model.with_name(f"{name}.json")
        content = json.loads(path.read_text()) if path.is_file() else {}
        for key in ("eos_token", "eos_token_id", "model", "text_config"):
            content.pop(key, None)
        content |= files.get(name, {})  # type: ignore[arg-type]
        path.write_text(json.dumps(content))


def test_a_text_ends_where_the_files_say(llama_optimum: Path, tmp_path: Path) -> None:
    model = copied(llama_optimum, tmp_path)
    set_ends(model)
    whole = generate(model, PROMPT, max_new_tokens=COUNT)
    assert len(whole.ids) == COUNT
    assert not whole.ended
    end = whole.ids[5]
    first = whole.ids.index(end)
    for files in (
        {"generation_config": {"eos_token_id": end}, "config": {"eos_token_id": whole.ids[0]}},
        {"genai_config": {"model": {"eos_token_id": [EOS, end]}}},
        {"config": {"eos_token_id": end}},
        {"config": {"text_config": {"eos_token_id": [end]}}},
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": end}},
    ):
        set_ends(model, **files)
        found = generate(model, PROMPT, max_new_tokens=COUNT)
        assert (found.ids, found.ended) == (whole.ids[:first], True), files
    set_ends(model, config={"eos_token_id": "two"})
    with pytest.raises(CalibrationError, match="eos_token_id 'two' is no token id"):
        Generator(model)


def test_the_tokenizer_names_an_end_where_no_config_does(llama_optimum: Path, tmp_path: Path) -> None:
    model = copied(llama_optimum, tmp_path)
    set_ends(model, tokenizer_config={"eos_token": {"content": "</s>"}})
    assert end_ids(model.parent, model.with_name("tokenizer.json")) == {EOS}
    set_ends(model)
    assert end_ids(model.parent, model.with_name("tokenizer.json")) == frozenset()


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
def test_room(case: str, tmp_path: Path) -> None:
    """128 positions: of the config, or of the tables for RoPE."""
    source = EXPORTS[case]()
    generator, prompt = Generator(source), "x" * 100  # and BOS
    assert generator.task(prompt).count == 27
    assert generator.task("x").count == 126
    assert generator.task(prompt, max_new_tokens=27).count == 27
    with pytest.raises(
        CalibrationError, match=r"101 tokens of the prompt and 28 new ones .* 128 .* ask for 27 or fewer"
    ):
        generator.task(prompt, max_new_tokens=28)
    with pytest.raises(CalibrationError, match=r"prompt has 128 tokens, .* room for 128"):
        generator.task("x" * 127)
    behind = Generator(prefixed(source, tmp_path, "graph", (7, 3)))
    assert behind.task(prompt).count == 25
    # The last token that fits is the last that can be computed.
    assert len(generator.run(generator.task(prompt)).ids) <= 27


def test_a_buffer_that_past_and_present_share(tmp_path: Path) -> None:
    """GroupQueryAttention writes into a past of the longest length, of which the mask says what counts."""
    source = EXPORTS["genai"]()
    path = copied(source, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[2].dim_value = 32
    onnx.save(proto, path)
    generator = Generator(path)
    assert generator.task(PROMPT).count == 32 + 1 - 10
    found = generator.run(generator.task(PROMPT))
    assert found.ended or len(found.ids) == 23
    assert_greedy(found, source)
    with pytest.raises(CalibrationError, match="columns of its cache"):
        generator.task(PROMPT, max_new_tokens=24)


def test_columns_of_a_cache_are_room(tmp_path: Path) -> None:
    generator = Generator(words(odd.write(tmp_path, odd.Spec(batch=1, past=80, mask="ones")), odd.VOCAB))
    task = generator.task("w5 " * 80)
    assert task.count == 2
    assert len(generator.run(task).ids) == 2
    with pytest.raises(CalibrationError, match="columns of its cache"):
        generator.task("w5 " * 80, max_new_tokens=3)


def test_a_seed_tells_the_text(llama_optimum: Path) -> None:
    generator = Generator(llama_optimum)
    task = generator.task(PROMPT, max_new_tokens=24)

    def said(**options: object) -> tuple[int, ...]:
        return generator.run(task, Sampling.from_dict(options)).ids

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said(top_k=1, seed=5) == generator.run(task).ids == said(top_p=1e-9)


def test_the_text_is_told_as_it_comes(llama_optimum: Path) -> None:
    pieces: list[str] = []
    found = generate(llama_optimum, PROMPT, max_new_tokens=40, sampling=Sampling(), tell=pieces.append)
    assert "".join(pieces) == found.text == load_tokenizer(llama_optimum.parent).decode(list(found.ids))
    assert len(pieces) > 10


@pytest.mark.parametrize(
    ("text", "options", "ids"),
    [
        ("<s>hi", {}, (BOS, *ids_of("hi"))),
        ("hi", {"bos": None}, ids_of("hi")),
        ("hi", {"bos": 9}, (9, *ids_of("hi"))),
        ("", {}, (BOS,)),
    ],
)
def test_what_stands_before_a_prompt(
    text: str, options: dict[str, int], ids: tuple[int, ...], llama_optimum: Path
) -> None:
    assert Generator(llama_optimum).task(text, **options).ids == ids


def test_no_prompt_at_all(llama_optimum: Path) -> None:
    with pytest.raises(CalibrationError, match="the prompt is empty"):
        Generator(llama_optimum).task("", bos=None)


def test_a_chat_begins_as_its_template_says(llama_optimum: Path, tmp_path: Path) -> None:
    model = copied(llama_optimum, tmp_path)
    model.with_name("chat_template.jinja").write_text("<s>U: {{ messages[0].content }}</s>A:")
    assert Generator(model).task("hi", chat=True).ids == (BOS, *ids_of("U: hi"), EOS, *ids_of("A:"))
    model.with_name("chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Generator(model).task("hi", chat=True).ids == ids_of("hi")


def test_a_prompt_that_is_no_text(llama_optimum: Path, tmp_path: Path) -> None:
    model = copied(llama_optimum, tmp_path)
    model.with_name("chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    generator = Generator(model)
    for chat in (False, True):
        with pytest.raises(CalibrationError, match=r"^the prompt is not UTF-8 \(byte 0xe9 behind 'caf'\)"):
            generator.task("caf\udce9", chat=chat)
    config = model.with_name("tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "\ud83d"}))
    with pytest.raises(CalibrationError, match="the prompt as the chat template writes it holds half of a surrogate"):
        generator.task("caf", chat=True)
    set_ends(model, tokenizer_config={"eos_token": "\ud83d"})
    assert end_ids(model.parent, model.with_name("tokenizer.json")) == frozenset()


def test_a_tokenizer_of_another_model(llama_optimum: Path, tmp_path: Path) -> None:
    model = words(copied(llama_optimum, tmp_path), 999)
    with pytest.raises(CalibrationError, match="token id 998 is outside"):
        Generator(model).task("w998", bos=None)


def test_hidden_states_are_no_logits(tmp_path: Path) -> None:
    proto = tiny.build()
    del proto.graph.output[0]
    proto.graph.output.insert(
        0, tiny.helper.make_tensor_value_info("h", tiny.TensorProto.FLOAT, ["b", "s", tiny.HIDDEN])
    )
    model = words(tiny.save(proto, tmp_path), tiny.VOCAB)
    with pytest.raises(ModelError, match=r"has no logits.*language model head"):
        Generator(model)


def cut(keep: str) -> Callable[[tiny.onnx.ModelProto], None]:
    """Give the logits of the last token alone, with its axis or without it."""

    def change(proto: tiny.onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.output[0] == "logits")
        node.output[0] = "all_logits"
        index = np.array([-1] if keep == "axis" else -1)
        proto.graph.initializer.append(tiny.numpy_helper.from_array(index, "last"))
        proto.graph.node.append(tiny.helper.make_node("Gather", ["all_logits", "last"], ["logits"], axis=1))
        shape = ["b", 1, tiny.VOCAB] if keep == "axis" else ["b", tiny.VOCAB]
        output = next(o for o in proto.graph.output if o.name == "logits")
        output.CopyFrom(tiny.helper.make_tensor_value_info("logits", tiny.TensorProto.FLOAT, shape))

    return change


@pytest.mark.parametrize("keep", ["axis", "row"])
def test_logits_of_the_last_token_alone(keep: str, tmp_path: Path) -> None:
    whole = words(tiny.save(tiny.build(), tmp_path / "whole"), tiny.VOCAB)
    proto = tiny.build()
    cut(keep)(proto)
    last = words(tiny.save(proto, tmp_path / "last"), tiny.VOCAB)
    said = [generate(path, "w5 w6 w7", max_new_tokens=COUNT).ids for path in (whole, last)]
    assert said[0] == said[1]
