"""The ``rotate`` command: options and a recipe's rotation, put into one call of the pipeline."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quarot_onnx.cli.choosing import file_notes
from quarot_onnx.cli.rotate_options import RotateOptions
from quarot_onnx.cli.targets import target_file
from quarot_onnx.cli.typed import OptionWording, Typed, merged, refuse_twice, rotation_options, typed_keys
from quarot_onnx.config.algorithm import QuarotConfig, SinkPrefixConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import Outcome, rotate
from quarot_onnx.progress import PhaseProgress
from quarot_onnx.recipes.build import rotation_alone
from quarot_onnx.recipes.loading import load
from quarot_onnx.recipes.wording import parse


def run(options: RotateOptions, source: Path, progress: PhaseProgress) -> Outcome:
    """Rotate.

    Args:
        options: What was typed.
        source: The model's file.
        progress: Called as the work goes on.

    Raises:
        QuarotError: See ``pipeline.rotate``; ConfigError also for options that contradict a recipe.
    """
    target = target_file(options.out, source, overwrite=options.overwrite)
    config, notes = _config(options, target)
    outcome = rotate(
        source,
        target,
        config,
        verify=options.verify,
        feeds=options.feeds,
        prefix=_prefix(typed_keys(options)),
        overwrite=options.overwrite or None,
        memory=Memory.of(options.max_memory, options.by_stages),
        progress=progress,
    )
    unused = options.feeds is not None and not options.verify
    more = ("nothing is proved: --feeds not used",) if unused else ()
    return replace(outcome, notes=(*outcome.notes, *notes, *more))


def _prefix(typed: Mapping[str, Typed]) -> SinkPrefixConfig | None:
    """The prefix that was typed."""
    ids = typed.get("prefix.ids")
    if ids is None:
        return None
    try:
        return SinkPrefixConfig.from_dict({"form": "graph", "ids": ids.value})
    except ConfigError as error:
        raise ConfigError(f"{ids.words}: {error}") from error


def _config(options: RotateOptions, target: Path) -> tuple[QuarotConfig, tuple[str, ...]]:
    """The rotation, and what the user should know of the recipe."""
    typed = typed_keys(options)
    if options.recipe is None:
        return rotation_options(typed), ()
    loaded = load(options.recipe)
    if loaded.data.get("rotation") is None:
        way = "use quantize --recipe" if loaded.second_step else "add the section rotation"
        raise ConfigError(f"{loaded.source}: the recipe rotates nothing; {way}, or leave out --recipe")
    refuse_twice(typed, loaded)
    data = merged(typed, loaded.data, rotates=False)
    rotation = rotation_alone(parse(data, OptionWording(typed, loaded), loaded.folder))
    assert rotation is not None
    return rotation, file_notes(loaded, target)
