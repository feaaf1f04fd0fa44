"""What is quantized and how: said by a QConfig file, a recipe, numbers of bits, or a scheme, which is a recipe, too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quarot_onnx.cli.chosen import Chosen
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.typed import ROTATION_SWITCHES, OptionWording, Typed, merged, refuse_twice
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.choices import OutputFormat, Precision, Scheme
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.quantization.groups import odd_groups
from quarot_onnx.quantization.select import Selection, select
from quarot_onnx.recipes.build import Parts, exclude_notes, head_note, quantization_config
from quarot_onnx.recipes.loading import Loaded, has_fixed_scales, load, scheme_of, shipped
from quarot_onnx.recipes.own import Calibration, Recipe
from quarot_onnx.recipes.rules import refuse_contradictions
from quarot_onnx.recipes.wording import parse
from quarot_onnx.run.provenance import Record, is_rotated, summary
from quarot_onnx.sites.detect import Survey

CALIBRATION = "calibration."
"""How the keys of calibration begin."""

_ROTATION, _SEED = "rotation.", "rotation.seed"
_BITS = ("weights.method", "weights.bits", "activations.bits")
_OF_BITS = frozenset({"weights", "activations", "int8_down_proj", "format", "accuracy_level"})
"""Sections and keys that say how many bits there are, or go with few; the others go with every scheme."""

_BESIDE_8_BITS = frozenset(
    {
        "weights.type",
        "weights.symmetric",
        "weights.per_channel",
        "activations.symmetric",
        "activations.calibration_method",
        "activations.percentile",
        "activations.bias_correction",
    }
)
"""What of them goes with the schemes of plain 8 bits."""


@dataclass(frozen=True)
class Question:
    """What the choice depends on.

    Attributes:
        options: All options.
        typed: Those that stand for keys of a recipe.
        survey: The model, and what is found in it.
        record: What was done to it before.
        target: The file to be written.
    """

    options: QuantizeOptions
    typed: Mapping[str, Typed]
    survey: Survey
    record: Record | None
    target: Path

    @property
    def rotated(self) -> bool:
        """Whether the model brings its rotation."""
        return is_rotated(self.record)

    def rotation(self) -> list[Typed]:
        """The rotation options that were typed, without the seed."""
        return [item for key, item in self.typed.items() if key.startswith(_ROTATION) and key != _SEED]

    def whether_to_rotate(self) -> list[str]:
        """The switch that asks for rotations, or for none, if it was typed."""
        return [] if self.options.rotate is None else ["--rotate" if self.options.rotate else "--no-rotate"]


def choose(question: Question) -> Chosen:
    """Find out what was asked for.

    Raises:
        ConfigError: Options contradict each other, a file or the model.
        ModelError: The model is rotated already, or quantized.
    """
    if question.options.config is not None:
        chosen = _from_config(question, question.options.config)
    elif _names_a_scheme(question):
        chosen = _from_scheme(question)
    else:
        chosen = _from_recipe(question)
    return replace(chosen, notes=(*chosen.notes, *_seed_notes(question, chosen.config.quarot)))


def _names_a_scheme(question: Question) -> bool:
    """Whether a shipped recipe is asked for, or nothing else is."""
    options = question.options
    if options.scheme is not None or scheme_of(options.recipe) is not None:
        return True
    return options.recipe is None and not any(key in question.typed for key in _BITS)


def _seed_notes(question: Question, rotation: QuarotConfig | None) -> tuple[str, ...]:
    """What to say of a seed that was typed and reaches no rotation; of others the configuration itself tells."""
    typed = question.typed.get(_SEED)
    if typed is None or (rotation is not None and question.options.config is None and rotation.seed == typed.value):
        return ()
    why = "the model is rotated already" if question.rotated else "nothing is rotated"
    if question.options.config is not None:
        why = f"{question.options.config} says what is rotated, and how"
    return (f"{typed.words} has no effect: {why}",)


def _from_config(question: Question, path: Path) -> Chosen:
    """The configuration in a file."""
    given = [item.words for key, item in question.typed.items() if not key.startswith(CALIBRATION) and key != _SEED]
    others = {"--scheme": question.options.scheme, "--recipe": question.options.recipe}
    given += [*question.whether_to_rotate(), *(flag for flag, value in others.items() if value is not None)]
    if given:
        raise ConfigError(f"{given[0]} and --config say the same thing twice; write it into {path}")
    config = QConfig.load(path)
    return Chosen(config, select(question.survey, config), _calibration(question))


def _calibration(question: Question) -> Calibration:
    """The text, from options alone."""
    given = {key: item.value for key, item in question.typed.items() if key.startswith(CALIBRATION)}
    return Calibration(**{key.removeprefix(CALIBRATION): value for key, value in given.items()})


def _from_scheme(question: Question) -> Chosen:
    """A shipped recipe, or the one of whoever names nothing; options change it."""
    options, typed = question.options, question.typed
    by_recipe = scheme_of(options.recipe)
    scheme = options.scheme or by_recipe or Scheme.W8A8_DYNAMIC
    words = f"{'--scheme' if by_recipe is None else '--recipe'} {scheme}"
    if options.scheme is not None and options.recipe is not None:
        raise ConfigError(f"--scheme {scheme} contradicts --recipe {options.recipe}; leave out one of them")
    data = dict(shipped(scheme))
    del data["rotation"]
    rounded = data["weights"]["bits"] < 8 or (has_fixed_scales(data) and "weights.method" in typed)
    plain = data.get("format") == OutputFormat.QDQ and not rounded
    for key, item in typed.items():
        if key in _BITS and not (key == "weights.method" and not plain):
            raise ConfigError(f"{words} contradicts {item.words}; leave out one of them")
        beside = key in _BESIDE_8_BITS or key.partition(".")[0] not in _OF_BITS or data.get(key) == item.value
        if plain and not beside:
            named = options.scheme is not None or by_recipe is not None
            raise ConfigError(_to_bits(data, words, (key, item), named=named))
    sites = question.survey.sites if plain else question.survey.rotatable()
    if not plain and not sites.head:
        data["lm_head"] = Precision.FLOAT
    rotates = _rotates(question, ROTATION_SWITCHES if question.rotated else frozenset())
    wording = OptionWording(typed, None, scheme, plain=plain)
    recipe = parse(merged(_rotating(question), data, rotates=rotates), wording, None)
    refuse_contradictions(recipe, wording)
    return _carried_out(question, recipe, Parts.of(sites), recipe.rotation, wording)


def _to_bits(data: Mapping[str, Any], words: str, option: tuple[str, Typed], *, named: bool) -> str:
    """What to say of an option that does not go with a scheme of plain 8 bits, that was ``named`` or not."""
    key, beside = option[0], option[1].words
    if named and key == "int8_down_proj":
        return f"{beside}: all Linears of {words} have 8 bits already; leave it out"
    if named and (key == "accuracy_level" or option[1].value == OutputFormat.NBITS) and "activations" in data:
        return (
            f"{beside} goes with activations in float, and {words} rounds them: give --w-bits 8 in its place, or leave "
            f"{beside.split()[0]} out"
        )
    way = "add --weights" if has_fixed_scales(data) else "add --w-bits or --weights"
    if named and not has_fixed_scales(data):
        bits = {"--w-bits": data["weights"]["bits"], "--a-bits": data.get("activations", {}).get("bits")}
        way = f"give {' '.join(f'{flag} {count}' for flag, count in bits.items() if count)} in place of {words}"
    return f"{beside} goes with numbers of bits: {way}, or leave it out"


def _rotating(question: Question) -> dict[str, Typed]:
    """What was typed, without rotation options where there is to be none."""
    if not question.options.no_rotate:
        return dict(question.typed)
    return {key: item for key, item in question.typed.items() if not key.startswith(_ROTATION)}


def _rotates(question: Question, late: frozenset[str]) -> bool:
    """Whether the model is still to be rotated.

    Args:
        question: What the choice depends on.
        late: Switches that come too late on a rotated model, besides all other rotation options.

    Raises:
        ConfigError: A rotation is asked for beside --no-rotate.
        ModelError: A rotation is asked for, and the model is rotated.
    """
    if question.options.no_rotate:
        switched_on = [item.words for item in question.rotation() if item.value is not False]
        if switched_on:
            raise ConfigError(f"{switched_on[0]} contradicts --no-rotate; leave out one of them")
        return False
    if not question.rotated:
        return True
    for key, item in question.typed.items():
        switch = key in ROTATION_SWITCHES and key not in late
        if key.startswith(_ROTATION) and key != _SEED and not switch:
            assert question.record is not None
            raise ModelError(
                f"the model is already rotated ({summary(question.record)}): {item.words} comes too late; "
                "leave it out, or start from the original"
            )
    return False


def _from_recipe(question: Question) -> Chosen:
    """A recipe from a file, from options, or from both."""
    options = question.options
    loaded = None if options.recipe is None else load(options.recipe)
    if loaded is not None:
        _check_step(question, loaded)
    wording = OptionWording(question.typed, loaded)
    rotates = _rotates(question, frozenset())
    if options.no_rotate and loaded is not None and "rotation" in loaded.data:
        raise ConfigError(f"--no-rotate contradicts {wording.named('rotation')}; leave out one of them")
    asked = loaded is None or (bool(options.rotate) and loaded.data.get("rotation") is None)
    data = {} if loaded is None else loaded.data
    typed = _rotating(question)
    if loaded is not None:
        refuse_twice(typed, loaded)
    recipe = parse(merged(typed, data, rotates=rotates and asked), wording, None if loaded is None else loaded.folder)
    refuse_contradictions(recipe, wording)
    parts = Parts.of(question.survey.rotatable())
    chosen = _carried_out(question, recipe, parts, _rotation(question, recipe, loaded), wording)
    if loaded is None:
        return chosen
    notes = () if "calibration.text" in question.typed else loaded.calibration_notes
    return replace(chosen, notes=(*file_notes(loaded, question.target), *chosen.notes), calibration_notes=notes)


def _carried_out(
    question: Question, recipe: Recipe, parts: Parts, rotation: QuarotConfig | None, wording: OptionWording
) -> Chosen:
    """A recipe, free of contradictions, on the model."""
    config = quantization_config(recipe, parts, rotation, wording)
    selection = select(question.survey, config)
    _refuse_odd_groups(selection, wording)
    note = head_note(recipe, config, wording)
    notes = (*(() if note is None else (note,)), *exclude_notes(recipe, parts, wording))
    if recipe.kv_cache is not None and config.kv_cache is None:
        notes += tuple(map(wording.sentence, recipe.kv_cache.said))
    return Chosen(config, selection, recipe.calibration, notes, wording=wording)


def _refuse_odd_groups(selection: Selection, wording: OptionWording) -> None:
    """Refuse a group size that leaves a remainder, in the words of whoever chose it."""
    for odd in odd_groups(selection):
        raise ConfigError(odd.message(wording.valued(f"{odd.what}s.group_size", odd.size)))


def _rotation(question: Question, recipe: Recipe, loaded: Loaded | None) -> QuarotConfig | None:
    """The rotation to do, or that the model must agree with."""
    if loaded is None or not loaded.second_step:
        return recipe.rotation
    if not question.rotated or loaded.online_rotate is None:
        return None
    return QuarotConfig(r4=loaded.online_rotate)


def _check_step(question: Question, loaded: Loaded) -> None:
    """Refuse a file of two steps at the wrong one."""
    if loaded.only_rotates:
        raise ConfigError(
            f"{loaded.source}: save.save_trans: true saves the rotated model and no more; use rotate --recipe, or set "
            "it to false"
        )
    if not loaded.second_step:
        return
    rotation = [*(item.words for item in question.rotation()), *(["--rotate"] if question.options.rotate else [])]
    if rotation:
        raise ConfigError(f"{rotation[0]}: {loaded.source} rotates nothing; leave it out, or rotate before")
    if loaded.online_rotate and not question.rotated:
        raise ConfigError(
            f"{loaded.source}: quant.special.online_rotate: true, but the model is not rotated; rotate it before, "
            "with rotate --recipe and the file of the first step, or set it to false"
        )


def file_notes(loaded: Loaded, target: Path) -> tuple[str, ...]:
    """What the user should know of a recipe file.

    Args:
        loaded: The file.
        target: The model that will be written.
    """
    path = loaded.save_path
    if path is None or target.resolve().is_relative_to(path.resolve()):
        return loaded.notes
    return (
        *loaded.notes,
        f"{loaded.source}: save.save_path: {path} is not used: {target} was named on the command line",
    )
