"""Whether a model can have the sink prefix that is asked for, found out before any long work."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.calibration.readers import DataReader, TextReader
from quarot_onnx.calibration.sample import SHORTER
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import SinkPrefixConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.caches import presents
from quarot_onnx.graph.metadata import prefix_of, recorded, refuse_prefixed
from quarot_onnx.io.lengths import terms
from quarot_onnx.prefix.attach import find_prefix_places, inputs_alone
from quarot_onnx.quantization.select import Selection
from quarot_onnx.sites.detect import Survey


def check_prefix(
    config: QConfig,
    selection: Selection,
    source: str | Path,
    feeds: Sequence[Feeds] | None,
    fix_shapes: Mapping[str, int],
    *,
    reader: DataReader | None = None,
) -> str | None:
    """Find out, before any long work, whether the model can have the prefix that is asked for.

    Args:
        config: What is asked for.
        selection: Of the original.
        source: Its file.
        feeds: Inputs for the proof, where no rule makes them.
        fix_shapes: Lengths that the output fixes, by name.
        reader: What the model will be calibrated on.

    Returns:
        Why there will be none, where that is left to the model; None where there may be one.

    Raises:
        ConfigError: Tokens outside the vocabulary, or more than the model has positions for; or one that is fed as a
            cache whose length the output fixes, or several rows of which GroupQueryAttention does not take.
        CalibrationError: Its tokens and the windows of a text are more than the graph has positions for.
        ModelError: The graph has no room for one.
    """
    asked, there = config.prefix, prefix_of(recorded(selection.survey.model))
    if PrefixForm.NPZ in (None if asked is None else asked.form, None if there is None else there[0]):
        _check_free(selection.survey.model, fix_shapes)
        _check_rows(selection.survey.model, fix_shapes)
    if asked is None:
        return None
    if feeds is not None:
        raise ConfigError(f"{asked.name}: its proof and its search feed token ids; leave out feeds (--feeds)")
    model = selection.survey.model
    refuse_prefixed(model, "given another")
    if asked.form is PrefixForm.AUTO and not fixed_inputs(selection):
        return "no activation has a fixed scale, so a sink prefix has nothing to gain (--prefix graph insists)"
    try:
        _check_room(asked, selection.survey, Path(source).parent)
    except ModelError as error:
        if asked.form is PrefixForm.AUTO:
            return f"no sink prefix: {error}"
        raise
    if asked.ids is not None and isinstance(reader, TextReader):
        _check_windows(asked.ids, reader, model, Path(source).parent)
    return None


def _check_windows(ids: tuple[int, ...], reader: TextReader, model: ir.Model, folder: Path) -> None:
    """Refuse windows of which the last tokens have no positions behind a prefix."""
    positions = positions_of(folder, model.graph)
    if positions is not None:
        left = positions.behind(len(ids) - Lead(ids).shared_start(reader.bos_id))
        left.note(reader.token_windows.shape[1], SHORTER)


def _check_room(asked: SinkPrefixConfig, survey: Survey, folder: Path) -> None:
    """Refuse a prefix that the graph, or its positions, have no room for."""
    if asked.form is PrefixForm.NPZ:
        _check_cache(survey.model, folder)
    else:
        find_prefix_places(survey.model, survey.visible().attentions, folder)
    _check_ids(asked, survey.model, folder)


def _check_cache(model: ir.Model, folder: Path) -> None:
    if not inputs_alone(model, folder).has_cache:
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


def _check_rows(model: ir.Model, fix_shapes: Mapping[str, int]) -> None:
    """Refuse a cache that a prefix is fed as where several rows have to be, and an operator takes but one."""
    if all(node.op_type != "GroupQueryAttention" for node in model.graph.all_nodes()):
        return
    dims = [past.shape[0] for past in presents(model.graph) if past.shape]
    rows = max((dim if isinstance(dim, int) else fix_shapes.get(dim.value or "", 1) for dim in dims), default=1)
    if rows > 1:
        raise ConfigError(
            f"the batch is fixed at {rows} (by the graph, or --fix-shape), and GroupQueryAttention takes one row at a "
            "time behind a prefix in a file, which is a cache: keep the prefix in the graph (--prefix graph), or leave "
            "the batch free"
        )


def _check_ids(asked: SinkPrefixConfig, model: ir.Model, folder: Path) -> None:
    length = asked.max_tokens if asked.ids is None else len(asked.ids)
    positions = positions_of(folder, model.graph)
    if positions is not None and length >= positions.count:
        raise ConfigError(
            f"{asked.name}: a prefix of {length} tokens leaves nothing of the model's {positions.count} positions: use "
            "fewer"
        )
    if asked.ids is not None:
        check_vocabulary(np.array(asked.ids), ModelInputs.from_model(model, folder=folder).vocab_size)


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


def fixed_inputs(selection: Selection) -> list[str]:
    """The Linears' inputs that get a fixed scale."""
    jobs = [(job.linear, job.config.activation) for job in selection.linears]
    fixed = [linear for linear, spec in jobs if spec is not None and spec.has_fixed_scale]
    return [linear.input.name or "" for linear in fixed]
