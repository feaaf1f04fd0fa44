"""What is said of a limit of memory that cannot be kept, by commands that only run models."""

from collections.abc import Iterable

import onnx_ir as ir

from quarot_onnx.cli.console import notes
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.panels import light


def tell_of_limit(memory: Memory, models: Iterable[ir.Model]) -> None:
    """Tell before the work where one weight of a model takes more than is allowed.

    Args:
        memory: What was asked for.
        models: The models; not looked at where there is no limit.
    """
    if memory.limit is not None:
        notes(next(filter(None, (memory.notes(model, light=light(model)) for model in models)), ()))
