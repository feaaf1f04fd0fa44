"""Our own recipes: what they may say, what they become, and what is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from quarot_onnx.config import OutputFormat, QConfig, QuantGranularity, QuarotConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.build import Parts, quantization_config, rotation_alone
from quarot_onnx.recipes.loading import load
from quarot_onnx.recipes.own import Method, Recipe
from quarot_onnx.recipes.rules import refuse_contradictions
from quarot_onnx.recipes.wording import Wording, parse
from quarot_onnx.run.intent import kinds_for
from quarot_onnx.sites.model import Kind

SHIPPED = Path(__file__).resolve().parents[2] / "rotation_configs" / "recipes"
PARTS = Parts(head=(("head", 64),), down=("down.0", "down.1"), hidden=96)
WORDS = Wording("r.yaml")


def built(parts: Parts = PARTS, **sections: Any) -> QConfig:
    recipe = parse(sections, WORDS, None)
    refuse_contradictions(recipe, WORDS)
    return quantization_config(recipe, parts, recipe.rotation, WORDS)


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        built(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("weights", "bits", "method"),
    [
        ({"bits": 2}, 2, Method.QRONOS),
        ({"bits": 4}, 4, Method.QRONOS),
        ({"bits": 7}, 7, Method.QRONOS),
        ({"bits": 8}, 8, Method.RTN),
        ({"method": "qronos"}, 4, Method.QRONOS),
        ({"method": "rtn", "bits": 3}, 3, Method.RTN),
        ({}, 16, Method.RTN),
    ],
)
def test_defaults_of_bits_and_method(weights: dict[str, Any], bits: int, method: Method) -> None:
    found = Recipe(weights=weights).weights
    assert (found.resolved_bits, found.resolved_method) == (bits, method)


@pytest.mark.parametrize(
    ("sections", "written"),
    [
        ({"weights": {"bits": 4}}, OutputFormat.NBITS),
        ({"weights": {"bits": 4, "group_size": 48}}, OutputFormat.FAKE),
        ({"weights": {"bits": 4}, "activations": {"bits": 8}}, OutputFormat.W4A8),
        ({"weights": {"bits": 8}, "activations": {"bits": 8}}, OutputFormat.W8),
        ({"weights": {"bits": 8}, "format": "w8"}, OutputFormat.W8),
        ({"weights": {"bits": 4}, "activations": {"bits": 4}}, OutputFormat.FAKE),
        ({"weights": {"bits": 4}, "activations": {"bits": 8}, "format": "fake"}, OutputFormat.FAKE),
        ({"weights": {"bits": 8}, "activations": {"bits": 8, "granularity": "tensor"}}, OutputFormat.W8),
        ({"weights": {"bits": 4}, "activations": {"bits": 6, "granularity": "tensor"}}, OutputFormat.FAKE),
        ({"activations": {"bits": 6, "granularity": "tensor"}}, OutputFormat.FAKE),
        ({"weights": {"bits": 16}, "activations": {"bits": 8}, "format": "fake"}, OutputFormat.FAKE),
    ],
)
def test_formats(sections: dict[str, Any], written: OutputFormat) -> None:
    assert built(**sections).resolved_format is written


def test_weights_and_activations_as_specs() -> None:
    config = built(
        weights={"bits": 4, "symmetric": False, "group_size": 32},
        activations={"bits": 4, "symmetric": False, "clip_ratio": 0.9, "group_size": 16},
    )
    layer = config.global_config
    assert layer is not None
    assert layer.activation is not None
    assert (layer.weight.data_type.name, layer.weight.symmetric, layer.weight.group_size) == ("UInt4", False, 32)
    activation = layer.activation
    assert (activation.bits, activation.symmetric, activation.group_size, activation.clip_ratio) == (4, False, 16, 0.9)
    assert activation.quant_granularity is QuantGranularity.Token
    eight = built(weights={"bits": 8, "symmetric": False, "per_channel": False}).global_config
    assert eight is not None
    assert (eight.weight.data_type.name, eight.weight.symmetric) == ("Int8", False)
    assert eight.weight.quant_granularity is QuantGranularity.Tensor


def test_weights_in_float() -> None:
    config = built(activations={"bits": 6, "granularity": "tensor"}, lm_head="int8", embedding="int4")
    assert config.global_config is not None
    assert config.global_config.weight is None
    assert config.global_config.activation is not None
    assert config.global_config.activation.described() == "UInt6Spec(Tensor)"
    assert config.rounding is None
    for name, op_type, spec in (("head", "MatMul", "UInt8Spec(Channel)"), ("x", "Gather", "Int4Spec(group_size=32)")):
        found = config.layer_config_for(name, op_type)
        assert found is not None
        assert found.weight is not None
        assert found.weight.described() == spec


def test_rounding_settings_arrive() -> None:
    settings = {"perc_damp": 0.05, "act_order": True, "static_groups": True, "block_size": 64}
    config = built(weights={"method": "gptaq", "clip": False, "alpha": 1, "enable_aq_calibration": False, **settings})
    rounding = config.rounding
    assert rounding is not None
    assert rounding.name == "gptaq"
    assert {key: getattr(rounding, key) for key in settings} == settings
    assert (rounding.mse, rounding.aq_calibration, getattr(rounding, "alpha")) == (False, False, 1)  # noqa: B009
    assert built(weights={"method": "gptaq"}).rounding.aq_calibration  # type: ignore[union-attr]
    assert not built(weights={"bits": 8}).rounding.needs_statistics  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_an_alpha_of_zero_is_given(method: str, zero: float) -> None:
    assert getattr(built(weights={"method": method, "alpha": zero}).rounding, "alpha") == 0  # noqa: B009


@pytest.mark.parametrize(
    ("sections", "head", "activation"),
    [
        ({"weights": {"bits": 4, "group_size": 32}, "lm_head": "int8"}, "Int8Spec(group_size=32)", None),
        ({"weights": {"bits": 4}, "lm_head": "int8"}, "Int8Spec(Channel)", None),  # 128 does not divide 64
        ({"weights": {"bits": 4}, "activations": {"bits": 8}, "lm_head": "int8"}, "UInt8Spec(Channel)", "UInt8Spec"),
        (
            {"weights": {"bits": 8, "type": "int8"}, "activations": {"bits": 8}, "lm_head": "int8"},
            "Int8Spec(Channel)",
            "UInt8Spec",
        ),
        ({"weights": {"bits": 4}, "activations": {"bits": 8}, "lm_head": "int4"}, "Int4Spec(Channel)", "UInt8Spec"),
        ({"weights": {"bits": 8}, "format": "w8", "lm_head": "int8"}, "Int8Spec(Channel)", None),
    ],
)
def test_the_head(sections: dict[str, Any], head: str, activation: str | None) -> None:
    config = built(**sections)
    assert config.exclude == ()
    found = config.layer_config_for("head", "MatMul")
    assert found is not None
    assert found.weight.described() == head
    assert (found.activation and type(found.activation).__name__) == activation


def test_the_head_stays_in_float() -> None:
    for head in ({}, {"lm_head": "float"}):
        config = built(weights={"bits": 4}, exclude=["x*"], **head)
        assert config.exclude == ("head", "x*")
        assert config.layer_config_for("head", "MatMul") is None
    assert "no language model head" in refusal(parts=Parts(), weights={"bits": 4}, lm_head="int8")


@pytest.mark.parametrize(
    ("hidden", "embedding", "spec"),
    [
        (96, "int4", "Int4Spec(group_size=32)"),
        (640, "int4", "Int4Spec(group_size=128)"),
        (40, "int4", "Int4Spec(Channel)"),
        (96, "int8", "Int8Spec(Channel)"),
    ],
)
def test_the_embedding(hidden: int, embedding: str, spec: str) -> None:
    config = built(parts=Parts(hidden=hidden), weights={"bits": 4}, activations={"bits": 8}, embedding=embedding)
    found = config.layer_config_for("embed", "Gather")
    assert found is not None
    assert found.weight.described() == spec
    assert config.notes == ()
    assert built(weights={"bits": 4}).layer_config_for("embed", "Gather") is None


@pytest.mark.parametrize("activations", [{}, {"bits": 8}, {"bits": 4, "symmetric": False, "clip_ratio": 0.9}])
def test_down_projections_in_8_bits(activations: dict[str, Any]) -> None:
    config = built(weights={"bits": 4}, activations=activations, int8_down_proj=True)
    other, down = config.layer_config_for("q", "MatMul"), config.layer_config_for("down.1", "MatMul")
    assert other is not None
    assert down is not None
    assert (other.weight.bits, down.weight.described()) == (4, f"{'UInt8' if activations else 'Int8'}Spec(Channel)")
    if activations:
        assert down.activation is not None
        assert other.activation is not None
        assert down.activation.bits == 8
        assert down.activation.symmetric == other.activation.symmetric
        assert down.activation.clip_ratio == other.activation.clip_ratio
    else:
        assert down.activation is None
    assert "no down projection" in refusal(parts=Parts(), weights={"bits": 4}, int8_down_proj=True)


EIGHT = {"bits": 8}
FOUR = {"bits": 4}
STATIC = {"bits": 8, "granularity": "tensor"}


@pytest.mark.parametrize(
    ("sections", "named", "way_out"),
    [
        ({}, "weights.bits: with 16 bits", "weights.bits: 8"),
        ({"weights": {"bits": 16}, "activations": {"bits": 16}}, "weights.bits: with 16 bits", "weights.bits: 8"),
        ({"weights": {"bits": 16, "method": "rtn"}, "activations": FOUR}, "weights.method: weights", "weights.bits: 8"),
        ({"weights": {"symmetric": False}, "activations": FOUR}, "weights.symmetric: weights of 16", "weights.bits: 8"),
        (
            {"activations": FOUR, "format": "w8"},
            "format: w8 does not hold activations beside weights in float",
            "format: fake",
        ),
        ({"weights": {"bits": 16, "method": "gptq"}}, "weights.method", "weights.bits: 8"),
        ({"weights": {"bits": 9}}, "weights.bits: 9: weights have 2 to 8 bits, or 16", "16"),
        ({"weights": FOUR, "activations": {"bits": 1}}, "activations.bits: 1: activations have 2 to 8 bits", "16"),
        ({"weights": {"bits": 8, "perc_damp": 0.1}}, "weights.perc_damp: not for", "weights.method: gptq"),
        ({"weights": {"bits": 4, "method": "rtn", "act_order": True}}, "weights.act_order", "weights.method: gptq"),
        ({"weights": {"bits": 4, "method": "rtn", "enable_aq_calibration": True}}, "enable_aq", "weights.method: gptq"),
        ({"weights": {"method": "gptq", "alpha": 1}}, "weights.alpha: only gptaq and qronos", "weights.method: qronos"),
        ({"weights": {"method": "gptq", "alpha": 0}}, "weights.alpha: only gptaq and qronos", "weights.method: qronos"),
        ({"weights": {"bits": 8, "alpha": 0.0}}, "weights.alpha: only gptaq and qronos", "weights.method: qronos"),
        ({"weights": {"bits": 8, "enable_aq_calibration": False}}, "enable_aq_calibration: not for", "method: gptq"),
        ({"weights": {"bits": 4, "alpha": -1, "method": "gptaq"}}, "weights.alpha: -1", "greater"),
        ({"weights": {"bits": 4, "perc_damp": 2}}, "weights.perc_damp: 2", "less than or equal to 1"),
        ({"weights": {"bits": 4, "group_size": 1}}, "weights.group_size: 1", "-1, or leave it out"),
        ({"weights": {"bits": 4, "act_order": True, "group_size": 32}}, "act_order", "weights.static_groups: true"),
        ({"weights": {"bits": 4, "per_channel": False, "group_size": 32}}, "weights.per_channel", "leave it out"),
        ({"weights": FOUR, "activations": {"clip_ratio": 0.9}}, "activations.clip_ratio", "activations.bits: 8"),
        ({"weights": FOUR, "activations": {"bits": 4, "clip_ratio": 0}}, "activations.clip_ratio: 0", "greater"),
        (
            {"weights": FOUR, "activations": {"bits": 4, "granularity": "tensor"}, "format": "w4a8"},
            "activations.bits: w4a8 has activations of 8 bits",
            "format: fake",
        ),
        (
            {"weights": FOUR, "activations": {"bits": 4, "granularity": "tensor", "group_size": 8}},
            "activations.group_size: groups are within a token",
            "token",
        ),
        ({"weights": FOUR, "activations": {"bits": 8, "granularity": "channel"}}, "granularity", "token or tensor"),
        ({"weights": FOUR, "activations": EIGHT, "accuracy_level": 4}, "accuracy_level", "activations.bits: 16"),
        ({"weights": FOUR, "format": "fake", "accuracy_level": 4}, "accuracy_level", "format: nbits"),
        ({"weights": FOUR, "format": "w4a8"}, "format: w4a8 needs 8-bit activations", "activations.bits: 8"),
        ({"weights": EIGHT, "activations": EIGHT, "format": "w4a8"}, "format: w4a8", "format: w8"),
        ({"weights": FOUR, "activations": FOUR, "format": "w4a8"}, "activations.bits", "format: fake"),
        (
            {"weights": FOUR, "activations": {"bits": 8, "symmetric": False}, "format": "w8"},
            "activations.symmetric",
            "format: fake",
        ),
        ({"weights": FOUR, "activations": {"bits": 8, "group_size": 4}, "format": "w8"}, "group_size", "format: fake"),
        ({"weights": {"bits": 4, "group_size": 32}, "format": "w8"}, "weights.group_size", "format: nbits"),
        ({"weights": {"bits": 4, "group_size": 48}, "format": "nbits"}, "weights.group_size", "128"),
        ({"weights": FOUR, "activations": EIGHT, "format": "nbits"}, "format: nbits", "activations.bits: 16"),
        (
            {"weights": {"bits": 4, "per_channel": False}, "activations": EIGHT, "format": "w4a8"},
            "weights.per_channel",
            "format: fake",
        ),
        ({"weights": EIGHT, "activations": EIGHT, "int8_down_proj": True}, "int8_down_proj", "leave it out"),
        ({"weights": {"bits": True}}, "weights.bits: True", "2 to 8"),
        ({"weights": FOUR, "lm_head": "int5"}, "lm_head: 'int5'", "float or int8 or int4 (did you mean"),
    ],
    ids=str,
)
def test_contradictions_name_the_key_and_the_way_out(sections: dict[str, Any], named: str, way_out: str) -> None:
    message = refusal(**sections)
    assert message.startswith("r.yaml: ")
    assert named in message
    assert way_out in message


def test_unknown_keys_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, key, near in [
        ("weigths: {bits: 4}", "'weigths'", "'weights'"),
        ("weights: {bit: 4}", "'bit'", "'bits'"),
        ("rotation: {random_had: true}", "'random_had'", "'use_random_had'"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match="did you mean") as caught:
            load(path)
        assert all(word in str(caught.value) for word in (str(path), key, near))


@pytest.mark.parametrize("name", ["rotation", "weights", "activations", "calibration"])
def test_empty_sections_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"exclude: [a]\n{name}:\n")
    with pytest.raises(ConfigError, match=rf"section {name} is empty; write {name}: \{{\}} .*or take it out"):
        load(path)
    path.write_text(f"{name}: {{}}\n")
    assert load(path).data == {name: {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights: {bits: '4'}", "bits='4': a whole number without quotes is wanted; write 4"),
        ("weights: {bits: 4.0}", "bits=4.0: a whole number is wanted; write 4"),
        ("activations: {bits: '8'}", "bits='8': a whole number without quotes is wanted; write 8"),
        ("weights: {group_size: '32'}", "group_size='32': a whole number without quotes is wanted; write 32"),
        ("weights: {perc_damp: 1e-2}", "perc_damp='1e-2': a number without quotes is wanted; write 0.01 (YAML takes"),
        ("calibration: {samples: '4'}", "samples='4': a whole number without quotes is wanted; write 4"),
        ("rotation: {seeed: 1}", "known keys: r_matrix_dim, use_random_had, r_config_path, r1"),
        ("rotation: {name: gptq}", "name='gptq': Input should be 'quarot'"),
        ("weights: {method: gptqq}", "use rtn or gptq or gptaq or qronos (did you mean 'gptq'?)"),
    ],
)
def test_what_a_file_gets_wrong_comes_with_what_to_write(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in str(caught.value)


def test_typed_values_come_with_what_to_write() -> None:
    assert refusal(weights={"perc_damp": "1e-2"}).endswith(
        "write 0.01 (YAML takes 1e-2 for text and 1.0e-2 for a number)"
    )


@pytest.mark.parametrize(
    ("sections", "r4"),
    [
        ({"weights": FOUR}, False),
        ({"weights": FOUR, "int8_down_proj": True, "lm_head": "int8"}, False),
        ({"weights": FOUR, "activations": EIGHT}, None),
        ({"activations": FOUR}, None),
        ({"weights": FOUR, "rotation": {"r4": True}}, True),
        ({"weights": FOUR, "activations": EIGHT, "rotation": {"r4": False}}, False),
        ({"weights": FOUR, "rotation": {"r_config_path": "places.json"}}, None),
        ({"weights": FOUR, "activations": STATIC, "smoothing": {}}, False),
        ({"weights": FOUR, "activations": STATIC, "smoothing": {}, "rotation": {"r4": True}}, True),
        ({"weights": FOUR, "activations": EIGHT, "smoothing": {}}, None),
        ({}, None),
    ],
    ids=str,
)
def test_rotating_alone_decides_r4_as_quantizing_does(sections: dict[str, Any], r4: bool | None) -> None:
    recipe = parse({"rotation": {}} | sections, WORDS, None)
    rotation = rotation_alone(recipe)
    assert rotation is not None
    assert rotation.r4 is r4
    assert rotation_alone(Recipe(weights=FOUR)) is None
    if "weights" in sections and "rotation" not in sections:
        config = quantization_config(recipe, PARTS, recipe.rotation, WORDS)
        # A static input that is smoothed goes without R4 where it can be smoothed, which the graph decides.
        assert (Kind.R4 in kinds_for(config)) == (r4 is None or "smoothing" in sections)


def test_a_seed_without_random_hadamards_is_told() -> None:
    for rotation, told in (({"seed": 3}, True), ({"seed": 3, "use_random_had": True}, False), ({}, False)):
        notes = built(weights=FOUR, rotation=rotation).notes
        assert [note.startswith("seed has no effect") for note in notes] == [True] * told


def test_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(
        rotation=QuarotConfig(r4=True, use_random_had=True, seed=3),
        smoothing={"alpha": 0.6},
        weights={"method": "qronos", "bits": 3, "perc_damp": 0.02},
        activations={"bits": 6, "symmetric": False},
        lm_head="int8",
        format="fake",
        calibration={"text": tmp_path / "t.txt", "samples": 4},
        exclude=["a*"],
    )
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["calibration"]["text"] == "t.txt"
    Recipe(weights=FOUR).to_yaml(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == Recipe(weights=FOUR)


def test_shipped_recipes() -> None:
    found = {path.stem: load(path) for path in SHIPPED.glob("*.yaml")}
    assert set(found) == {"w8a8", "w4a4"}
    expected = {"w8a8": (8, 8, OutputFormat.W8, "gptq"), "w4a4": (4, 4, OutputFormat.FAKE, "qronos")}
    for name, loaded in found.items():
        recipe = parse(loaded.data, loaded.wording, loaded.folder)
        refuse_contradictions(recipe, loaded.wording)
        config = quantization_config(recipe, PARTS, recipe.rotation, loaded.wording)
        assert config.global_config is not None
        assert config.global_config.activation is not None
        assert config.rounding is not None
        assert config.quarot is not None
        weight, activation = config.global_config.weight, config.global_config.activation
        assert (weight.bits, activation.bits, config.resolved_format, config.rounding.name) == expected[name]
        assert (config.quarot.r1, config.quarot.r2, config.quarot.r4) == (True, True, True)
        assert config.notes == ()


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_a_recipe_is_refused_where_its_configuration_is(output_format: OutputFormat) -> None:
    """What a format cannot hold is said once: by the recipe in its keys, by QConfig in Python's, for one reason."""
    weights = [
        {"bits": bits, "per_channel": per_channel, **group}
        for bits, per_channel in ((16, True), (2, True), (4, True), (4, False), (7, True), (8, True), (8, False))
        for group in ({}, {"group_size": 32}, {"group_size": 48})
        if bits != 16 and (per_channel or not group)
    ]
    activations = [
        {},
        *({"bits": bits, "granularity": where} for bits in (4, 8) for where in ("token", "tensor")),
        {"bits": 8, "symmetric": False},
        {"bits": 8, "group_size": 16},
        {"bits": 8, "clip_ratio": 0.9},
    ]
    refused = 0
    for given, inputs, level in itertools.product([*weights, {"bits": 16}], activations, (None, 4)):
        if given == {"bits": 16} and not inputs:
            continue
        sections = {"weights": given, "activations": inputs, "format": output_format.value, "accuracy_level": level}
        recipe = parse(sections, WORDS, None)
        reason = ""
        try:
            quantization_config(recipe, PARTS, None, WORDS)
        except ConfigError as error:
            reason = str(error)
        if reason:
            refused += 1
            said = refusal(**sections)
            assert said.split(": ", 2)[2].partition("; ")[0] in reason, (said, reason)
        else:
            refuse_contradictions(recipe, WORDS)
    assert refused or output_format is OutputFormat.FAKE
