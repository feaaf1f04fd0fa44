"""``--recipe``: ours and LLMC's, in one step and in two, beside options and on rotated models."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Shell
from passed import Asks

from quarot_onnx.config import GPTQConfig, QronosConfig


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "r.yaml"
    path.parent.mkdir()
    path.write_text(
        "rotation: {use_random_had: true, seed: 1, r4: true}\n"
        "weights: {bits: 4, perc_damp: 0.02}\n"
        "activations: {bits: 8}\n"
        "calibration: {text: t.txt, samples: 2, spread: false, seq_len: 16}\n"
    )
    (path.parent / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    return path


def test_a_recipe_in_one_step(asks: Asks, recipe: Path, text: Path) -> None:
    passed = asks("--recipe", recipe, "--seed", 5, "--calib-text", text, "--lm-head", "int8")
    assert passed.config.quarot is not None
    assert (passed.config.quarot.seed, passed.config.quarot.r4) == (5, True)
    assert passed.config.rounding == QronosConfig(perc_damp=0.02)
    assert passed.reader is not None
    assert passed.reader.token_windows.shape == (4, 16)
    assert passed.reader.text == text
    assert passed.notes.count("note: ") == 1
    assert "that the model wrote" in passed.notes
    own = asks("--recipe", recipe)
    assert own.config.quarot is not None
    assert own.config.quarot.seed == 1
    assert own.reader is not None
    assert (own.reader.token_windows != passed.reader.token_windows).sum() == 0, "the same sentence, twice"
    assert "lm_head: int8 makes decoding faster" in own.notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--w-bits 4", "--w-bits 4 and --recipe say the same thing twice"),
        ("--random-had", "rotation.use_random_had"),
        ("--no-r4", "rotation.r4"),
        ("--nsamples 3", "calibration.samples"),
        ("--no-rotate", "--no-rotate contradicts"),
        ("--scheme w8", "contradicts --recipe"),
        ("--weights rtn", "weights.perc_damp: not for rounding to nearest (rtn)"),
        ("--weights gptq --alpha 1", "--alpha 1.0: only gptaq and qronos have it"),
    ],
)
def test_options_beside_a_recipe(refused_early: Callable[..., str], recipe: Path, options: str, said: str) -> None:
    assert said in refused_early("--recipe", recipe, *options.split())


LLMC = {
    "step_1": "base: {seed: 3}\n"
    "quant: {method: Quarot, weight: {bit: 4, symmetric: true, granularity: per_channel}, "
    "special: {rotate_mode: hadamard, online_rotate: ONLINE}}\n"
    "save: {save_trans: true, save_path: elsewhere}\n",
    "step_2": "calib: {name: wikitext2, path: nowhere, n_samples: 2, seq_len: 32}\n"
    "quant: {method: GPTQ, weight: {bit: 4, symmetric: true, granularity: per_channel}, "
    "act: {bit: 8, symmetric: true, granularity: per_token}, special: {online_rotate: ONLINE}, quant_out: true}\n",
}


@pytest.fixture
def steps(tmp_path: Path) -> Callable[..., Path]:
    def write(step: str, *, online: bool) -> Path:
        path = tmp_path / f"{step}_{online}.yml"
        path.write_text(LLMC[step].replace("ONLINE", str(online).lower()))
        return path

    return write


def test_llmc_in_two_steps(shell: Shell, asks: Asks, steps: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    rotated = tmp_path / "rotated.onnx"
    done = shell.ok("rotate", model, rotated, "--recipe", steps("step_1", online=True), "--no-verify", "--json")
    rotation = done.json["recipe"]["rotation"]
    assert rotation["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    assert rotation["rotations"]["R1"]["seed"] == 3
    assert "save.save_path: elsewhere is not used" in done.err
    (tmp_path / "tokenizer.json").write_bytes((model.parent / "tokenizer.json").read_bytes())
    passed = asks("--recipe", steps("step_2", online=True), source=rotated)
    assert passed.config.quarot is not None
    assert passed.config.quarot.r4 is True
    assert passed.config.rounding == GPTQConfig(mse=False, enable_aq_calibration=True)
    assert "already rotated" in passed.notes
    assert "calib.path: nowhere is no text file" in passed.notes
    assert "quant.special.fp32_had" not in passed.notes
    assert "--lm-head int8 makes decoding faster" in passed.notes, "LLMC's file has no key for the head"


def test_llmc_steps_at_the_wrong_place(
    shell: Shell, refused_early: Callable[..., str], steps: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    assert "use rotate --recipe" in refused_early("--recipe", steps("step_1", online=True))
    assert "the model is not rotated" in refused_early("--recipe", steps("step_2", online=True))
    assert "rotates nothing" in refused_early("--recipe", steps("step_2", online=False), "--r1")
    line = shell.fails("rotate", model, tmp_path / "r.onnx", "--recipe", steps("step_2", online=True))
    assert "use quantize --recipe" in line


def test_a_second_step_alone_does_not_rotate(asks: Asks, steps: Callable[..., Path]) -> None:
    assert asks("--recipe", steps("step_2", online=False)).config.quarot is None


def test_rotate_takes_the_rotation_of_a_recipe(shell: Shell, model: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.onnx"
    done = shell.ok("rotate", model, out, "--recipe", recipe, "--seed", 9, "--no-r2", "--no-verify", "--json").json
    assert done["recipe"]["rotation"]["counts"] == {"R1": 5, "R4": 2}
    assert done["recipe"]["rotation"]["rotations"]["R1"]["seed"] == 9
    assert "rotation.r4" in shell.fails("rotate", model, out, "--recipe", recipe, "--no-r4")
    recipe.write_text("weights: {bits: 4}\n")
    assert "add the section rotation" in shell.fails("rotate", model, out, "--recipe", recipe)


@pytest.mark.parametrize(
    ("content", "options", "r4"),
    [
        ("weights: {bits: 4}", "", False),
        ("weights: {bits: 8}\nactivations: {bits: 8}", "", True),
        ("weights: {bits: 4}", "--r4", True),
        ("", "", True),  # as without a recipe
    ],
)
def test_one_recipe_rotates_alike_in_one_step_and_in_two(
    shell: Shell, model: Path, tmp_path: Path, content: str, options: str, r4: bool
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"rotation: {{}}\n{content}\n")
    common = ("--recipe", path, *options.split(), "--no-verify", "--json")
    done = shell.ok("rotate", model, tmp_path / "r.onnx", *common).json
    assert done["recipe"]["rotation"]["counts"] == {"R1": 5, "R2": 2} | ({"R4": 2} if r4 else {})
    if content:
        common = (*common, "--nsamples", 2, "--calib-seq-len", 64, "--no-check")
        both = shell.ok("quantize", model, tmp_path / "q.onnx", *common).json
        assert both["recipe"]["rotation"]["counts"] == done["recipe"]["rotation"]["counts"]
        shell.ok("quantize", tmp_path / "r.onnx", tmp_path / "two.onnx", "--tokenizer", model.parent, *common)


def test_a_seed_of_rotate_that_does_nothing_is_told(shell: Shell, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.onnx"
    said = shell.ok("rotate", model, out, "--seed", 3, "--no-verify").err
    assert said.startswith("note: seed has no effect: no Hadamard is random; add use_random_had")
    assert not shell.ok("rotate", model, out, "--seed", 3, "--random-had", "--no-verify").err
    shell.ok("rotate", model, out, "--no-r4", "--no-verify")
    for options in (("--scheme", "w8"), ("--w-bits", 8)):
        said = shell.ok("quantize", out, tmp_path / "q.onnx", *options, "--seed", 3).err
        assert "note: --seed 3 has no effect: the model is rotated already" in said


def test_rotation_options_on_a_rotated_model(shell: Shell, asks: Asks, model: Path, tmp_path: Path) -> None:
    rotated = tmp_path / "rotated.onnx"
    shell.ok("rotate", model, rotated, "--no-r4", "--no-verify")
    plain = asks("--w-bits", 4, "--w-rtn", source=rotated)
    assert plain.config.quarot is None
    assert "already rotated (R1 at 5 places" in plain.notes
    confirmed = asks("--w-bits", 4, "--w-rtn", "--no-r4", source=rotated).config.quarot
    assert confirmed is not None
    assert (confirmed.r4, confirmed.r1) == (False, None)
    for option in ("--random-had", "--block-size=32"):
        line = shell.fails("quantize", rotated, tmp_path / "o.onnx", "--w-bits", 4, "--w-rtn", option)
        assert "already rotated" in line
        assert "original" in line
