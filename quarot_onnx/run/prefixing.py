"""The sink prefix of a run: which tokens it is of, and the model that has it."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import PREFIX_FILE, Lead, texts_of
from quarot_onnx.calibration.positions import sliding_window
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import SinkPrefixConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.metadata import prefix_of, recorded
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.piecewise.runs import opened
from quarot_onnx.piecewise.sweep import Run
from quarot_onnx.prefix.attach import attach, counts_pads, find_prefix_places
from quarot_onnx.prefix.sinks import WORTH, Loss, Sinks
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.run.prefix_checks import fixed_inputs
from quarot_onnx.run.provenance import make_recipe, record
from quarot_onnx.sites.detect import Survey

_PARTED = (
    "rows that are padded on the left are not what they are alone: the graph counts positions whatever the mask hides, "
    "so that pads stand between the prefix and the text of such a row; feed rows of one length together"
)


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
    sinks = Sinks(model, inputs, fixed_inputs(selection), texts_of(model, samples), memory=memory)
    found = sinks.search(asked.max_tokens, progress)
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


@dataclass(frozen=True, eq=False)
class Prefixed:
    """A model that has a prefix.

    Attributes:
        inputs: What it is fed.
        lead: What it has before that.
        places: Attentions that read it, where the graph holds it, else caches.
        parted: Pads before a row's text stand between it and the prefix.
    """

    inputs: ModelInputs
    lead: Lead
    places: int
    parted: bool


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
        parted = places.pads.counted and places.pads.mask is None
        return Prefixed(places.inputs, Lead(prefix.ids), len(places.attentions), parted)
    inputs = ModelInputs.from_model(model, folder=original)
    names = [present for _, present in inputs.presents]
    feeds = inputs.feed(np.array([prefix.ids], np.int64))
    (outputs,) = opened(file, memory, low_memory=True).outputs([Run(feeds)], names)
    past = inputs.present_to_past(dict(zip(names, outputs, strict=True)))
    lead = Lead(prefix.ids, {name: array[:1] for name, array in past.items()})
    return Prefixed(inputs, lead, len(past), counts_pads(model, inputs))


def put_prefix(
    model: ir.Model, file: str | Path, prefix: SinkPrefixConfig, original: Path, memory: Memory = WHOLE
) -> tuple[Prefixed, Plan]:
    """Give a model its prefix, and write that into its record; arguments are those of `with_prefix`.

    Returns:
        The model that has it, and what was done, for the user.
    """
    given = with_prefix(model, file, prefix, original, memory)
    notes = (_feeding_note(prefix), *((_PARTED,) if given.parted else ()), *window_note(model, prefix.form, original))
    plan = Plan(edits=(), rotations={}, counts={"places": given.places}, notes=notes)
    record(model, make_recipe(earlier=recorded(model), transform=(plan, prefix)))
    return given, plan


def window_note(model: ir.Model, form: PrefixForm, folder: Path) -> tuple[str, ...]:
    """What to say of a sliding window that a prefix in the graph does not leave; nothing where there is none.

    Args:
        model: The model; GroupQueryAttention has its window over the prefix, too.
        form: Where the prefix is kept.
        folder: Where config.json may lie.
    """
    window = sliding_window(folder) if form is PrefixForm.GRAPH else None
    if window is None or any(node.op_type == "GroupQueryAttention" for node in model.graph):
        return ()
    note = (
        f"config.json states a sliding window of {window} tokens, which the prefix in the graph never leaves: for "
        "longer texts the output is not that of the original fed with the prefix"
    )
    return (note,)


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
