"""A prompt as a chat template writes it: where templates are found, and what they may do."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quarot_onnx.errors import CalibrationError
from quarot_onnx.generation.chat import render

TURNS = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "chat_template": "other"})
    assert render(tmp_path, "Hi") == "other"
    write(tmp_path, "chat_template.jinja", TURNS)
    assert render(tmp_path, "Hi {{ x }}") == "<s>[user] Hi {{ x }}\n[assistant] "


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_templates_in_json(file: str, tmp_path: Path) -> None:
    write(tmp_path, file, {"chat_template": "one: {{ messages[0].content }}"})
    assert render(tmp_path, "Hi") == "one: Hi"


def test_the_default_of_several(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert render(tmp_path, "Hi") == "plain"


def test_what_transformers_offers_to_templates(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}\n    {%- if loop.first %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% continue %}{% endif %}\n{%- endfor %}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    write(tmp_path, "chat_template.jinja", template)
    assert render(tmp_path, "<ü>") == '{"role": "user", "content": "<ü>"}4True'


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_told(template: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", template)
    with pytest.raises(CalibrationError, match=told) as error:
        render(tmp_path, "Hi")
    assert "chat_template.jinja" in str(error.value)
    assert "--chat" in str(error.value)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no chat template .*chat_template\.jinja"):
        render(tmp_path, "Hi")


def test_a_template_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"chat_template\.jinja is not UTF-8 \(byte 3\): convert it first"):
        render(tmp_path, "Hi")
    file.write_text(f"\ufeff{TURNS}", encoding="utf-8")
    assert render(tmp_path, "Hi").startswith("[user] Hi"), "a byte order mark is no text"


def test_as_transformers_writes_it(llama_optimum: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((llama_optimum.parent / name).read_bytes())
    write(tmp_path, "chat_template.jinja", TURNS + "\n{% set x = 1 %}\n  {% if x %}\nend {{ eos_token }}\n{% endif %}")
    messages = [{"role": "user", "content": "Hello <b>you</b>"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(tmp_path, "Hello <b>you</b>") == theirs
