"""What a checkpoint lacks is not made up by its export, and what it holds is not left out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quarot_onnx.errors import ModelError
from quarot_onnx.export.export import export
from quarot_onnx.export.loading import RefusalError, check_architecture, load_folder

DOWN = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


def changed(place: Path, change: Callable[[Tensors], object] = len, *, tied: bool = False, **config: Any) -> Path:
    """A tiny Llama with other tensors, or other keys in its config.json."""
    shutil.copytree(exports.hf_folder("llama", tied=tied), place)
    weights, settings = place / "model.safetensors", place / "config.json"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return place


def without_prefix(tensors: Tensors) -> None:
    """The tensors of the class that has no head."""
    tensors.pop("lm_head.weight")
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_a_classifier(tensors: Tensors) -> None:
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:2].clone()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without_prefix, {"architectures": ["LlamaModel"]}, r"is a LlamaModel, .*no language model head \(lm_head\.w"),
        (
            with_a_classifier,
            {"architectures": ["LlamaForSequenceClassification"]},
            "is a LlamaForSequenceClassification, which has no language model head",
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), {}, "lacks lm_head.weight, which a LlamaForCausalLM"),
        (lambda tensors: tensors.pop(DOWN), {}, f"lacks {DOWN}, .* fetch its weights again"),
        (len, {"num_hidden_layers": 3}, r"lacks model\.layers\.2\..* and 6 more, which"),
        (len, {"num_hidden_layers": 1}, r"holds model\.layers\.1\..* and 6 more, for which .* mend config.json"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}),
            {},
            r"holds model\.layers\.0\.self_attn\.q_proj\.bias, for which a LlamaForCausalLM .* without it",
        ),
        (lambda tensors: tensors.update({"lm_head.bias": torch.ones(264)}), {}, r"holds lm_head\.bias, for which"),
        (
            len,
            {"intermediate_size": 128},
            r"mlp\.down_proj\.weight, .* and 3 more are of another shape than its config",
        ),
    ],
)
def test_a_checkpoint_that_is_not_the_model_of_its_config(
    change: Callable[[Tensors], object], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusalError, match=message):
        load_folder(changed(tmp_path / "source", change, **config), "fp32")


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "parts"])
def test_a_head_that_its_config_takes_for_the_embedding(form: str, tmp_path: Path) -> None:
    source = changed(tmp_path / "source", tie_word_embeddings=True)
    if form == "parts":
        model = AutoModelForCausalLM.from_pretrained(exports.hf_folder("llama"))
        (source / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
        for path in (tmp_path / "parts").glob("model*"):
            path.rename(source / path.name)
        assert not (source / "model.safetensors").exists()
    elif form != "safetensors":
        tensors = load_file(source / "model.safetensors")
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
        (source / "model.safetensors").unlink()
    message = r'holds a lm_head\.weight that is not model\.embed_tokens\.weight, .*"tie_word_embeddings": true'
    with pytest.raises(RefusalError, match=message):
        load_folder(source, "fp16")


def stored_twice(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    source = changed(tmp_path / "source", stored_twice, tie_word_embeddings=True)
    assert load_folder(source, "fp16")[1] == []


def test_the_export_of_such_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source = changed(tmp_path / "source", lambda tensors: tensors.pop(DOWN))
    with pytest.raises(ModelError, match=f"lacks {DOWN}"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def with_old_buffers(tensors: Tensors) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors[f"model.layers.{layer}.self_attn.masked_bias"] = torch.tensor(-1e9)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_and_old_buffers_are_no_weights(tied: bool, tmp_path: Path) -> None:
    model, notes = load_folder(changed(tmp_path / "source", with_old_buffers, tied=tied), "fp16")
    assert not notes
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    expected = AutoModelForCausalLM.from_pretrained(exports.hf_folder("llama", tied=tied), dtype=torch.float16)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_another_head_beside_the_language_model_is_told_of(tmp_path: Path) -> None:
    source = changed(tmp_path / "source", lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 64)}))
    assert load_folder(source, "fp32")[1] == [
        "not exported, as a LlamaForCausalLM has no such part: v_head.summary.weight"
    ]


@pytest.mark.parametrize(
    ("scaling", "note"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, r"rope_scaling dynamic\): past 128 positions it differs"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 2.0},
            r"rope_scaling longrope\): past 64 positions it differs",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, None),
        (None, None),
    ],
)
def test_rotary_frequencies_that_a_trace_freezes(scaling: dict[str, Any], note: str | None, tmp_path: Path) -> None:
    config: dict[str, Any] = {"rope_scaling": scaling}
    if scaling and scaling["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = 64
    _, notes = load_folder(changed(tmp_path / "source", **config), "fp32")
    assert len(notes) == (note is not None)
    assert note is None or re.search(note, notes[0])


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


@pytest.mark.parametrize("model_type", ["x", "internlm2"])
def test_a_model_of_code_of_its_own_is_refused(model_type: str, tmp_path: Path) -> None:
    source = changed(tmp_path / "source", model_type=model_type, auto_map=CODE)
    message = (
        rf"own \(modeling_x\.XForCausalLM, by auto_map .*not run, and transformers knows no architecture "
        rf"'{model_type}'; .*torch\.onnx\.export, or: optimum-cli .*--trust-remote-code"
    )
    with pytest.raises(RefusalError, match=message):
        check_architecture(source, model_type)


@pytest.mark.parametrize(("classes", "told"), [(CODE, True), ({"AutoTokenizer": ["tokenization_x.X", None]}, False)])
def test_code_of_its_own_that_transformers_has_in_its_own_way_is_told_of(
    classes: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    source = changed(tmp_path / "source", auto_map=classes)
    (source / "modeling_x.py").write_text("raise AssertionError('it was run')")
    (source / "configuration_x.py").write_text("raise AssertionError('it was run')")
    check_architecture(source, "llama")
    notes = load_folder(source, "fp32")[1]
    assert len(notes) == told
    if told:
        assert re.search(r"modeling_x\.XForCausalLM, .*not run: the export is transformers' LlamaForCausalLM", notes[0])
