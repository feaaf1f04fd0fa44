"""No option is accepted that nothing reads."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from quarot_onnx.cli import gptaq_options, typed
from quarot_onnx.cli.gptaq_options import GptaqOptions
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.rotate_options import RotateOptions

CLI = Path(typed.__file__).parent
KEYS = {*typed._VALUES, *typed._SWITCHES, *typed._METHODS, *typed._AQ.values()}
OTHERWISE = {
    "model", "out", "scheme", "config", "recipe", "exclude", "rotate", "verify", "feeds", "overwrite",
    "as_json", "quiet", "check", "check_tokens", "check_text", "max_kl", "max_ppl_ratio",
}  # fmt: skip


@pytest.mark.parametrize("options", [QuantizeOptions, RotateOptions])
def test_every_option_is_a_key_of_a_recipe_or_read_by_name(options: type) -> None:
    of_others = {field.name for field in fields(GptaqOptions)}
    names = {field.name for field in fields(options)} - of_others
    assert names <= KEYS | OTHERWISE
    if options is QuantizeOptions:
        assert names >= OTHERWISE
        assert {*KEYS} <= names | {field.name for field in fields(RotateOptions)}


def test_what_is_read_by_name_is_read() -> None:
    declared = ("options.py", "quantize_options.py", "weight_options.py", "typed.py")
    code = "\n".join(path.read_text() for path in CLI.glob("*.py") if path.name not in declared)
    unread = {name for name in OTHERWISE if not re.search(rf"\boptions\.{name}\b|\"{name}\"", code)}
    assert not unread


def test_every_option_of_the_gptaq_authors_is_told_of_or_refused() -> None:
    handled = {"k_bits", "v_bits", "k_pre_rope", *gptaq_options._GRIDS, *gptaq_options._ANYWAY}
    assert handled == {field.name for field in fields(GptaqOptions)}
