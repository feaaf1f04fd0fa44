"""What is said of a limit of memory that cannot be kept, by commands that only run models."""

from pathlib import Path

from quarot_onnx.cli.console import notes
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.panels import light


def tell_of_limit(memory: Memory, *paths: Path) -> None:
    """Tell before the work where one weight of a model takes more than is allowed.

    Args:
        memory: What was asked for.
        paths: The models' files.

    Raises:
        ModelError: One cannot be read.
    """
    if memory.limit is None:
        return
    for path in paths:
        model = model_io.load(path)
        if told := memory.notes(model, light=light(model)):
            notes(told)
            return
