"""Run a calibration sample; say which one, and what, is at fault."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.filled import ROWS
from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.io.tensors import read_array

SHORTER = "--calib-seq-len; in Python seq_len="
"""Where shorter windows are asked for."""


def check_feeds(feeds: Feeds, model: ir.Model) -> None:
    """Refuse a sample that does not name the model's inputs.

    Args:
        feeds: Input name to array.
        model: The whole model.

    Raises:
        CalibrationError: It names something else, or leaves an input out.
    """
    inputs = [value.name or "" for value in model.graph.inputs]
    for name in feeds:
        if name not in inputs and name != ROWS:
            raise CalibrationError(f"the reader feeds {name!r}, which is no input{did_you_mean(name, inputs)}")
    for name in inputs:
        if name not in feeds and name not in model.graph.initializers:
            raise CalibrationError(
                f"the reader does not feed the input {name!r}, but {', '.join(map(repr, feeds))} alone"
            )


def check_ids(ids: NDArray[Any] | None, reader: str, sample: int) -> None:
    """Refuse negative token ids, which a Gather would take from the end of the vocabulary without a word.

    Args:
        ids: The ids that count; None where they are not known.
        reader: The reader's class, for the message.
        sample: The sample's number.

    Raises:
        CalibrationError: There is one.
    """
    if ids is not None and ids.size and ids.min() < 0:
        raise CalibrationError(
            f"{reader} gives the token id {int(ids.min())} in sample {sample}: ids begin at 0; put a pad's id there, "
            "with attention_mask 0"
        )


def fed_defaults(samples: Sequence[Feeds], model: ir.Model) -> Feeds:
    """The defaults of those inputs that some sample overrides, for the samples that do not."""
    fed = {name for feeds in samples for name in feeds}
    tensors = {value.name or "": value.const_value for value in model.graph.inputs}
    return {name: read_array(tensor) for name, tensor in tensors.items() if tensor is not None and name in fed}


def run_sample(session: Any, feeds: Feeds, sample: int, names: list[str] | None = None) -> list[Any]:
    """Outputs of a session.

    Args:
        session: An onnxruntime session.
        feeds: Input name to array.
        sample: The sample's number, for the message.
        names: Which outputs; None for all.

    Raises:
        CalibrationError: onnxruntime cannot run it.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise not_run(sample, error) from error


def not_run(sample: int, error: Exception) -> CalibrationError:
    """The error for a sample that onnxruntime cannot run."""
    return CalibrationError(
        f"onnxruntime cannot run sample {sample}: {str(error).splitlines()[0]}; feed what the model's inputs "
        f"expect, in type, shape and length (of a text shorter windows: {SHORTER})"
    )


def never_seen(name: str) -> CalibrationError:
    """The error for an activation that had no rows in any sample, such as that of an expert which got no token."""
    return CalibrationError(
        f"activation {name!r} was empty in every sample: calibrate on more or longer ones (--calib-samples, "
        "--calib-seq-len), or leave the Linears that read it in float (--exclude; in Python exclude=)"
    )


def not_finite(name: str, sample: int) -> CalibrationError:
    """The error for an activation with NaN or infinity."""
    return CalibrationError(
        f"activation {name!r} holds NaN or infinity in sample {sample}: leave the sample out, or check the model"
    )
