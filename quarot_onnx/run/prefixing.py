"""The sink prefix of a run: whether one can be, which tokens it is of, and the model that has it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import PREFIX_FILE, Lead, texts_of
from quarot_onnx.calibration.positions import stated_positions, table_positions
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import SinkPrefixConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.caches import presents
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.metadata import prefix_of, recorded, refuse_prefixed
from quarot_onnx.io.lengths import terms
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.piecewise.runs import opened
from quarot_onnx.piecewise.sweep import Run
from quarot_onnx.prefix.attach import attach, check_alone, find_prefix_places
from quarot_onnx.prefix.sinks import WORTH, Loss, Sinks
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.run.provenance import make_recipe, record
from quarot_onnx.sites.detect import Survey


def check_prefix(
    config: QConfig,
    selection: Selection,
    source: str | Path,
    feeds: Sequence[Feeds] | None,
    fix_shapes: Mapping[str, int],
) -> str | None:
    """Find out, before any long work, whether the model can have the prefix that is asked for.

    Args:
        config: What is asked for.
        selection: Of the original.
        source: Its file.
        feeds: Inputs for the proof, where no rule makes them.
        fix_shapes: Lengths that the output fixes, by name.

    Returns:
        Why there will be none, where that is left to the model; None where there may be one.

    Raises:
        ConfigError: Tokens outside the vocabulary, or more than the model has positions for; or one that is fed as a
            cache whose length the output fixes.
        ModelError: The graph has no room for one.
    """
    asked, there = config.prefix, prefix_of(recorded(selection.survey.model))
    if PrefixForm.NPZ in (None if asked is None else asked.form, None if there is None else there[0]):
        _check_free(selection.survey.model, fix_shapes)
    if asked is None:
        return None
    if feeds is not None:
        raise ConfigError(f"{asked.name}: its proof and its search feed token ids; leave out feeds (--feeds)")
    model = selection.survey.model
    refuse_prefixed(model, "given another")
    if asked.form is PrefixForm.AUTO and not _fixed_inputs(selection):
        return "no activation has a fixed scale, so a sink prefix has nothing to gain (--prefix graph insists)"
    try:
        _check_room(asked, selection.survey, Path(source).parent)
    except ModelError as error:
        if asked.form is PrefixForm.AUTO:
            return f"no sink prefix: {error}"
        raise
    return None


def _check_room(asked: SinkPrefixConfig, survey: Survey, folder: Path) -> None:
    """Refuse a prefix that the graph, or its positions, have no room for."""
    if asked.form is PrefixForm.NPZ:
        _check_cache(survey.model, folder)
    else:
        find_prefix_places(survey.model, survey.visible().attentions, folder)
    _check_ids(asked, survey.model, folder)


def _check_cache(model: ir.Model, folder: Path) -> None:
    inputs = ModelInputs.from_model(model, folder=folder)
    check_alone(inputs)
    if not inputs.has_cache:
        raise ModelError(
            "the graph takes no cache of free length, so a prefix cannot be fed as one; keep it in the graph "
            "(--prefix graph)"
        )


def _check_free(model: ir.Model, fix_shapes: Mapping[str, int]) -> None:
    """Refuse to fix the length of a cache that a prefix is fed as."""
    dims = [dim for past in presents(model.graph) for dim in (past.shape or ())[1:]]  # the first is that of rows
    free = {term for dim in dims if not isinstance(dim, int) and dim.value for term in terms(dim.value)}
    for name, length in fix_shapes.items():
        if name in free:
            raise ConfigError(
                f"fix_shapes (--fix-shape) {name}={length} fixes the length of the cache, and a prefix in a file is a "
                "cache that the caller begins with, of a length of its own: keep the prefix in the graph (--prefix "
                "graph), or leave that length free"
            )


def _check_ids(asked: SinkPrefixConfig, model: ir.Model, folder: Path) -> None:
    length = asked.max_tokens if asked.ids is None else len(asked.ids)
    limits = [table_positions(model.graph), *(stated_positions(folder) or ())[:1]]
    positions = min((limit for limit in limits if isinstance(limit, int)), default=None)
    if positions is not None and length >= positions:
        raise ConfigError(
            f"{asked.name}: a prefix of {length} tokens leaves nothing of the model's {positions} positions: use fewer"
        )
    if asked.ids is not None:
        check_vocabulary(np.array(asked.ids), ModelInputs.from_model(model, folder=folder).vocab_size)


def held_positions(config: QConfig, model: ir.Model) -> int:
    """How many positions a prefix may take: of the one that is asked for, or of the one that the model has."""
    there = prefix_of(recorded(model))
    if there is not None:
        return len(there[1])
    asked = config.prefix
    return 0 if asked is None else len(asked.ids or ()) or asked.max_tokens


def find_prefix(
    asked: SinkPrefixConfig,
    file: str | Path,
    selection: Selection,
    samples: list[Feeds],
    progress: Progress,
    *,
    memory: Memory = WHOLE,
) -> tuple[SinkPrefixConfig | None, tuple[str, ...]]:
    """Decide on a prefix.

    Args:
        asked: What is asked for.
        file: The float model's file, rotated where it is to be.
        selection: What is quantized of it; the same model, loaded.
        samples: Calibration samples.
        progress: Called after every prefix that was tried.
        memory: Whether the model is run piece by piece.

    Returns:
        What is asked for, its form and its tokens decided; None for none; and what the user should know.

    Raises:
        CalibrationError: The samples are no whole texts.
        ConfigError: One was asked for, and no token is an outlier.
    """
    form = PrefixForm.GRAPH if asked.form is PrefixForm.AUTO else asked.form
    if asked.ids is not None:
        return asked.model_copy(update={"form": form}), ()
    model = selection.survey.model
    inputs = ModelInputs.from_model(model, folder=Path(file).parent)
    names = _fixed_inputs(selection) or [linear.input.name or "" for linear in linears(model.graph)]
    found = Sinks(model, inputs, names, texts_of(model, samples), memory=memory).search(asked.max_tokens, progress)
    before, after = found[0], found[-1]
    if not after.ids or before.bits - after.bits < WORTH:
        if asked.form is PrefixForm.AUTO:
            return None, (f"no sink prefix: no token stands out ({_worst(before)})",)
        raise ConfigError(
            f"{asked.name}: no token stands out ({_worst(before)}); leave it out, or name tokens (--prefix-ids; ids in "
            "Python and recipes)"
        )
    note = (
        f"sink prefix {list(after.ids)}: without it {_worst(before)} and outliers in {before.pieces} pieces of text, "
        f"behind it {_worst(after)} and {after.pieces}"
    )
    return asked.model_copy(update={"form": form, "ids": after.ids}), (note,)


def _worst(loss: Loss) -> str:
    ratio, name = loss.worst
    return f"peaks up to {ratio:.0f} times the median at {name}"


def _fixed_inputs(selection: Selection) -> list[str]:
    """The Linears' inputs that get a fixed scale."""
    jobs = [(job.linear, job.config.activation) for job in selection.linears]
    fixed = [linear for linear, spec in jobs if spec is not None and spec.has_fixed_scale]
    return [linear.input.name or "" for linear in fixed]


@dataclass(frozen=True, eq=False)
class Prefixed:
    """A model that has a prefix.

    Attributes:
        inputs: What it is fed.
        lead: What it has before that.
        places: Attentions that read it, where the graph holds it, else caches.
    """

    inputs: ModelInputs
    lead: Lead
    places: int


def with_prefix(
    model: ir.Model, file: str | Path, prefix: SinkPrefixConfig, original: Path, memory: Memory = WHOLE
) -> Prefixed:
    """Give a model its prefix: in its graph, or as past inputs.

    Args:
        model: The float model; its graph is changed where the prefix goes there.
        file: Its file.
        prefix: Its form and its tokens, decided.
        original: The folder of the original, where its config files lie.
        memory: Whether the model is run piece by piece, where its caches are computed.
    """
    assert prefix.ids is not None, "decided before"
    if prefix.form is PrefixForm.GRAPH:
        places = find_prefix_places(model, Survey(model).visible().attentions, original)
        attach(model, places, prefix.ids)
        return Prefixed(places.inputs, Lead(prefix.ids), len(places.attentions))
    inputs = ModelInputs.from_model(model, folder=original)
    names = [present for _, present in inputs.presents]
    feeds = inputs.feed(np.array([prefix.ids], np.int64))
    (outputs,) = opened(file, memory, low_memory=True).outputs([Run(feeds)], names)
    past = inputs.present_to_past(dict(zip(names, outputs, strict=True)))
    return Prefixed(inputs, Lead(prefix.ids, {name: array[:1] for name, array in past.items()}), len(past))


def put_prefix(
    model: ir.Model, file: str | Path, prefix: SinkPrefixConfig, original: Path, memory: Memory = WHOLE
) -> tuple[Prefixed, Plan]:
    """Give a model its prefix, and write that into its record; arguments are those of `with_prefix`.

    Returns:
        The model that has it, and what was done, for the user.
    """
    given = with_prefix(model, file, prefix, original, memory)
    plan = Plan(edits=(), rotations={}, counts={"places": given.places}, notes=(_feeding_note(prefix),))
    record(model, make_recipe(earlier=recorded(model), transform=(plan, prefix)))
    return given, plan


def check_given(asked: SinkPrefixConfig, model: ir.Model, folder: Path, feeds: Sequence[Feeds] | None) -> None:
    """Refuse, before any long work, tokens that a graph cannot hold.

    Raises:
        ConfigError: None are named; there are too many; or the model can only be proved on feeds.
        ModelError: The graph has no room for them.
    """
    if asked.ids is None or asked.form is not PrefixForm.GRAPH:
        raise ConfigError("rotating looks at no text: name the tokens of the prefix (ids=, form='graph')")
    if feeds is not None:
        raise ConfigError(f"{asked.name}: its proof feeds token ids; leave out feeds (--feeds)")
    _check_room(asked, Survey(model), folder)


def prefix_files(lead: Lead | None) -> dict[str, bytes]:
    """What goes beside a model, by name, for the prefix that it has."""
    if lead is None or lead.past is None:
        return {}
    content = io.BytesIO()
    np.savez(content, **lead.past)  # type: ignore[arg-type]
    return {PREFIX_FILE: content.getvalue()}


def _feeding_note(prefix: SinkPrefixConfig) -> str:
    """What whoever feeds the model must know."""
    tokens = list(prefix.ids or ())
    if prefix.form is PrefixForm.NPZ:
        return (
            f"the caches start with the prefix {tokens}: feed {PREFIX_FILE} as past inputs, {len(tokens)} positions, "
            "and then what comes after these tokens, without a BOS"
        )
    return (
        f"the graph holds the prefix {tokens}: feed what comes after it, without a BOS (transformers: "
        "add_special_tokens=False); positions, masks and caches as if the text began there"
    )
