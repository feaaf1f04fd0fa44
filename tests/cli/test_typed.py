"""No option is accepted that nothing reads."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from quarot_onnx.cli import typed
from quarot_onnx.cli.gptaq_options import GptaqOptions
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.rotate_options import RotateOptions
from quarot_onnx.config.algorithm import KVCacheConfig, QuarotConfig, SinkPrefixConfig, SmoothQuantConfig
from quarot_onnx.recipes.own import Activations, Calibration, Recipe, Weights

CLI = Path(typed.__file__).parent
KEYS = {*typed._METHODS, *typed._AQ.values(), "exclude"}
OTHERWISE = {
    "model", "out", "scheme", "config", "recipe", "rotate", "verify", "feeds", "overwrite", "jobs",
    "as_json", "quiet", "check", "check_tokens", "check_text", "max_kl", "max_ppl_ratio", "fix_shape",
    "max_memory", "provider", "provider_option", "by_stages", "scheduler",
}  # fmt: skip


@pytest.mark.parametrize("options", [QuantizeOptions, RotateOptions])
def test_every_option_is_a_key_of_a_recipe_or_read_by_name(options: type) -> None:
    of_others = {field.name for field in fields(GptaqOptions)}
    names = {field.name for field in fields(options)} - of_others
    declared = {option.name for option in typed.declared(options)}
    assert names - declared <= KEYS | OTHERWISE
    assert not declared & (KEYS | OTHERWISE)
    if options is QuantizeOptions:
        assert names >= KEYS | OTHERWISE


@pytest.mark.parametrize("options", [QuantizeOptions, RotateOptions])
def test_every_key_of_an_option_is_one_of_a_recipe(options: type) -> None:
    sections = {
        "rotation": QuarotConfig,
        "smoothing": SmoothQuantConfig,
        "prefix": SinkPrefixConfig,
        "weights": Weights,
        "activations": Activations,
        "calibration": Calibration,
        "kv_cache": KVCacheConfig,
    }
    for option in typed.declared(options):
        section, _, key = option.key.rpartition(".")
        kind = sections[section] if section else Recipe
        assert key in {*kind.model_fields, *kind.synonyms}, option.name


def test_what_is_read_by_name_is_read() -> None:
    declared = ("options.py", "quantize_options.py", "calibration_options.py", "weight_options.py", "typed.py")
    code = "\n".join(path.read_text() for path in CLI.glob("*.py") if path.name not in declared)
    unread = {name for name in OTHERWISE if not re.search(rf"\boptions\.{name}\b|\"{name}\"", code)}
    assert not unread
