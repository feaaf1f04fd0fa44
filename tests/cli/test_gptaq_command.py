"""The command lines of the GPTAQ authors' code: taken as they are typed there, or refused for what cannot be done."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Shell
from passed import Asks

from quarot_onnx.config import GPTAQConfig, KVCacheConfig, OutputFormat

WEIGHTS = ("--w_bits", 4, "--w_groupsize", -1, "--w_clip")
CACHE = ("--v_bits", 16, "--k_bits", 16, "--k_asym", "--v_asym", "--k_clip_ratio", 0.95, "--v_clip_ratio", 0.95)
METHOD = ("--asym_calibrate", "--enable_aq_calibration", "--rotate")


def test_the_published_command(asks: Asks) -> None:
    passed = asks(*WEIGHTS, "--a_bits", 4, *CACHE, "--w_asym", "--a_asym", "--a_clip_ratio", 0.9, *METHOD)
    layer = passed.config.global_config
    assert layer is not None
    assert layer.activation is not None
    weight, activation = layer.weight, layer.activation
    assert (weight.bits, weight.symmetric, activation.bits, activation.symmetric) == (4, False, 4, False)
    assert activation.clip_ratio == 0.9
    assert passed.config.rounding == GPTAQConfig(mse=True, enable_aq_calibration=True)
    assert passed.config.quarot is not None
    assert passed.config.resolved_format is OutputFormat.FAKE
    assert passed.config.kv_cache is None
    (note,) = [line for line in passed.notes.splitlines() if "of no effect" in line]
    for option in ("--k-asym", "--v-asym", "--k-clip-ratio 0.95", "--v-clip-ratio 0.95"):
        assert option in note
    assert "bits" not in note


def test_groups_of_a_cache_in_float_have_no_effect(asks: Asks) -> None:
    more = ("--k_groupsize", 128, "--v_groupsize", 128, "--fp32_had", "--no-k_pre_rope")
    passed = asks(*WEIGHTS, "--a_bits", 8, *CACHE, *more, *METHOD)
    assert "--k-groupsize 128, --v-groupsize 128" in passed.notes
    assert "--fp32-had" in passed.notes
    plain = asks("--w-bits", 4, "--w-clip", "--a-bits", 8, "--use-v2", "--enable-aq-calibration")
    assert plain.config == passed.config
    assert "of no effect" not in plain.notes


def test_a_quantized_cache(asks: Asks) -> None:
    grids = ("--k_groupsize", 16, "--v_groupsize", 16, "--k_asym", "--v_asym", "--k_clip_ratio", 0.95)
    passed = asks(*WEIGHTS, "--a_bits", 4, "--k_bits", 4, "--v_bits", 4, *grids, *METHOD)
    wanted = KVCacheConfig(4, 4, k_groupsize=16, v_groupsize=16, k_asym=True, v_asym=True, k_clip_ratio=0.95)
    assert passed.config.kv_cache == wanted
    assert passed.config.algo_config[-1] is passed.config.kv_cache
    short = asks(*WEIGHTS, "--a_bits", 4, "--kv-bits", 4, *grids, *METHOD)
    assert short.config == passed.config


def test_options_are_spelt_either_way(asks: Asks) -> None:
    dashes = asks("--weights", "gptq", "--w-bits", 4, "--calib-samples", 4, "--gptq-block-size", 64, "--no-rotate")
    strokes = asks("--weights", "gptq", "--w_bits=4", "--calib_samples", 4, "--gptq_block-size", 64, "--no_rotate")
    assert strokes.config == dashes.config
    assert strokes.config.quarot is None


def test_other_commands_take_strokes_too(shell: Shell, model: Path, tmp_path: Path) -> None:
    shell.ok("rotate", model, tmp_path / "r.onnx", "--random_had", "--no_verify", "--r_matrix_dim", 64)
    config = tmp_path / "my_config.json"
    shell.ok("inspect", model, "--write_config", config)
    assert config.is_file(), "values keep their strokes"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--k_bits", 9), "--k-bits 9: keys and values have 2 to 8 bits"),
        (("--k_bits", 4, "--kv_bits", 4), "say the same thing twice"),
        (
            ("--kv_bits", 4, "--k_asym", "--kv_format", "int"),
            "--kv-format int: --k-asym: integers are kept on symmetric grids",
        ),
        (("--kv_bits", 4, "--k_groupsize", 1), "--k-groupsize 1: a group has 2 or more"),
        (("--rotate", "--config", "c.json"), "--rotate and --config say the same thing twice"),
        (("--w_bitz", 4), "--w-bitz"),
        (("--w_bits", "four"), "(given 'four')"),
        (("--cal_dataset", "wikitext2"), "--cal-dataset"),
    ],
)
def test_refusals(refused_early: Callable[..., str], options: tuple[object, ...], named: str) -> None:
    assert named in refused_early(*options)


def test_rotate_beside_recipes(asks: Asks, refused_early: Callable[..., str], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("weights: {bits: 4, method: rtn}\n")
    assert asks("--recipe", own).config.quarot is None
    assert asks("--recipe", own, "--rotate").config.quarot is not None
    own.write_text("rotation: {r2: false}\nweights: {bits: 4, method: rtn}\n")
    rotation = asks("--recipe", own, "--rotate").config.quarot
    assert rotation is not None
    assert rotation.r2 is False
    second = tmp_path / "second.yml"
    weight = "{bit: 4, symmetric: true, granularity: per_channel}"
    second.write_text(f"quant: {{method: RTN, weight: {weight}}}\n")
    assert "--rotate: " in refused_early("--recipe", second, "--rotate")
