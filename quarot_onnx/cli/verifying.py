"""The ``verify`` command: two models compared on tokens, or on feeds that the user gives."""

from pathlib import Path

from quarot_onnx.calibration.given import given_feeds
from quarot_onnx.cli.bounding import tell_of_limit
from quarot_onnx.cli.console import notes
from quarot_onnx.errors import FeedError
from quarot_onnx.evaluation.equivalence import Equivalence, compare
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.run.provenance import is_quantized


def run(first: Path, second: Path, *, tokens: int, seed: int, feeds: Path | None, memory: Memory) -> Equivalence:
    """Compare.

    Args:
        first: The original.
        second: The model to check.
        tokens: Tokens of random ids, and as many of real text.
        seed: Of the random ids.
        feeds: An .npz file, or a folder of them, in place of tokens.
        memory: How the models are run.

    Raises:
        QuarotError: See ``compare``.
    """
    models = [model_io.load(path) for path in (first, second)]
    tell_of_limit(memory, models)
    if sum(map(is_quantized, models)) == 1:
        notes(
            ["one of the models is quantized, which changes what it computes: `quarot-onnx compare` says by how much"]
        )
    given = None if feeds is None else given_feeds(feeds, models[0])
    try:
        return compare(first, second, feeds=given, random_tokens=tokens, real_tokens=tokens, seed=seed, memory=memory)
    except FeedError as error:
        what = "give other inputs" if feeds is not None else "give the inputs"
        raise FeedError(error.reason, f"{what} (--feeds FILE.npz)") from error
