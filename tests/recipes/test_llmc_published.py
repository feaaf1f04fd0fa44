"""Files of the kinds that LLMC publishes: taken, or refused for what they truly ask for.

Written after the folders GPTQ, QuaRot, combination, backend and FP_Quant of its configurations, not copied from them.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_llmc_recipe import STEP_1, STEP_2, changed, config_of, refusal

from quarot_onnx.config import OutputFormat
from quarot_onnx.recipes.loading import load


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: dict[str, Any]) -> Path:
        path = tmp_path / "llmc.yml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def with_all(step: dict[str, Any], settings: dict[str, object]) -> dict[str, Any]:
    for path, value in settings.items():
        step = changed(step, path, to=value)
    return step


EIGHT_BITS = {
    "quant.weight": {"bit": 8, "symmetric": False, "granularity": "per_channel", "group_size": -1, "calib_algo": "mse"},
    "quant.act": {"bit": 8, "symmetric": False, "granularity": "per_token", "calib_algo": "minmax"},
}
FOUR_BITS = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 128}


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({**EIGHT_BITS, "quant.special.chunk_num": 4}, ["quant.special.chunk_num"]),
        ({"quant.special.chunk_num": 1}, ["quant.special.chunk_num"]),
        ({"quant.weight": {**FOUR_BITS, "need_pack": True}}, ["quant.weight.need_pack"]),
        ({"quant.weight": {**FOUR_BITS, "pack_version": "gemm_pack"}}, ["quant.weight.pack_version"]),
        ({"calib.type": "txt", "calib.padding": True}, ["calib.type", "calib.padding"]),
        ({"calib.apply_chat_template": False, "cvt": True}, ["cvt", "calib.apply_chat_template"]),
        ({"quant.special.owq": False, "quant.special.n_outs": [6, 6, 2]}, ["quant.special.n_outs"]),
        ({"quant.weight": {**FOUR_BITS, "quant_type": "int-quant", "use_qtorch": True}}, ["quant.weight.use_qtorch"]),
    ],
)
def test_what_changes_no_result_is_taken_and_told(file: Any, settings: dict[str, object], ignored: list[str]) -> None:
    path = file(with_all(STEP_2, settings))
    config = config_of(path)
    plain = file({**with_all(STEP_2, {key: value for key, value in settings.items() if key in EIGHT_BITS})})
    assert config.rounding == config_of(plain).rounding
    path = file(with_all(STEP_2, settings))
    told = load(path).notes[0].split("of no effect here: ")[1].split(", ")
    assert set(ignored) <= set(told)


def test_the_second_step_with_eight_bits(file: Any) -> None:
    config = config_of(file(with_all(STEP_2, {**EIGHT_BITS, "quant.special.chunk_num": 4})))
    assert config.global_config is not None
    assert config.global_config.activation is not None
    assert (config.global_config.weight.bits, config.global_config.activation.bits) == (8, 8)
    assert config.rounding is not None
    assert (config.rounding.name, config.rounding.mse) == ("gptq", True)


def test_quarot_alone_with_eight_bits(file: Any) -> None:
    step = with_all(STEP_1, {**EIGHT_BITS, "save": {"save_trans": False, "save_fake": False, "save_path": "x"}})
    config = config_of(file(step))
    assert config.quarot is not None
    assert config.resolved_format is OutputFormat.FAKE  # asymmetric activations per token


def test_save_fp_is_what_save_trans_was_called(file: Any) -> None:
    assert load(file(with_all(STEP_1, {"save": {"save_fp": True, "save_path": "x"}}))).only_rotates
    assert not load(file(with_all(STEP_1, {"save": {"save_fp": False, "save_quant": False}}))).only_rotates
    assert "give save_trans alone" in refusal(file(with_all(STEP_1, {"save.save_fp": True})))


VISION = {"vision": {"method": "GPTQ"}, "language": STEP_2["quant"]}
CACHE = {"method": "Naive", "bit": 8, "granularity": "per_token", "symmetric": True}
FLOAT = {"quant_type": "float-quant", "bit": "e2m1", "symmetric": True, "granularity": "per_group", "group_size": 128}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant.special.owq": True, "quant.special.n_outs": [6, 6]}, "owq: true is not supported"),
        ({"quant.weight": {**FLOAT, "use_qtorch": True}}, "quant.weight.quant_type='float-quant'"),
        ({"quant.act": {**FLOAT, "granularity": "per_token"}}, "quant.act.quant_type='float-quant'"),
        ({"quant.special.quant_type": "float-quant"}, "quant.special.quant_type='float-quant'"),
        ({"calib.type": "img_txt", "quant": VISION}, "type: img_txt is not supported"),
        ({"quant": VISION}, "vision is not supported"),
        ({"quant": {"language": STEP_2["quant"]}}, "directly under quant"),
        ({"quant.kvcache": {**CACHE, "method": "KIVI"}}, "quant.kvcache.method='KIVI'"),
        ({"quant.kvcache": {**CACHE, "granularity": "per_tensor"}}, "per_tensor with static: false"),
        ({"quant.mix_bits": {"setting_0": {}}}, "mix_bits is not supported"),
        ({"quant.special.static_groups": False}, "quant.special.actorder: with groups of 32 it needs static groups"),
        ({"quant.method": "OmniQuant", "quant.special": {"lwc": True}, "calib.type": "img"}, "quant.method: OmniQuant"),
        ({"quant.method": "Awq", "quant.mix_bits": {"a": {}}, "ignored_layers": {}}, "quant.method: Awq"),
        ({"calib.apply_chat_template": True}, "apply_chat_template: true is not supported"),
        ({"quant.special.chunk_num": 0}, "quant.special.chunk_num=0"),
        ({"save.save_autoawq": True, "quant.weight.pack_version": "gemm_pack"}, "save_autoawq: true"),
        ({"save.save_sgl": True, "quant.weight.need_pack": True}, "save_sgl: true"),
    ],
)
def test_what_cannot_be_done_is_named(file: Any, settings: dict[str, object], named: str) -> None:
    assert named in refusal(file(with_all(STEP_2, settings)))
