"""Feeds of a user, as each of two models takes them.

A cache that comes in is one that the model has made itself. Where a rotation turns what a model caches, the heads of a
given past are turned alike.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.evaluation.pairing import Pairing
from quarot_onnx.hadamard.rotation import Rotation


def turned(feeds: Sequence[Feeds], inputs: ModelInputs, pairing: Pairing, side: int) -> Iterator[Feeds]:
    """The feeds with their caches as one of the models would have made them.

    Args:
        feeds: As the original takes them.
        inputs: The model's inputs.
        pairing: What is compared; it knows the rotations of caches.
        side: 0 for the first model, 1 for the second.
    """
    rotations = {(item.name, item.other)[side]: item.rotations[side] for item in pairing.outputs}
    for feed in feeds:
        fed = dict(feed)
        for past, present in inputs.presents:
            rotation = rotations.get(present)
            if rotation is not None and fed[past].size:
                fed[past] = turned_heads(fed[past], rotation)
        yield fed


def turned_heads(cache: NDArray[Any], rotation: Rotation) -> NDArray[Any]:
    """A cache whose heads, its last axis or parts of that, are rotated."""
    return rotation.apply(cache.reshape(-1, rotation.size)).reshape(cache.shape).astype(cache.dtype)
