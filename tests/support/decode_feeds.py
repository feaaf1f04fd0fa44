"""The feeds of decode steps that a calibration runs, with the caches that it takes over."""

from collections.abc import Iterator
from typing import Any

from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.padding import Sample


def decode_feeds(decoding: Decoding, session: Any, feeds: Feeds) -> Iterator[Feeds]:
    """What is fed in each decode step behind a sample that is fed as it is.

    Args:
        decoding: Makes the steps.
        session: Of the model.
        feeds: The sample.
    """
    whole, left = Sample(feeds, 0), list[Feeds]()
    for part in (whole, *decoding.samples(feeds, 0, [whole])):
        taken = {name: item.of(left[-item.back][item.output]) for name, item in part.carried.items()}
        fed = {**part.feeds, **taken}
        left.append(dict(zip(decoding.kept, session.run(list(decoding.kept), fed), strict=True)))
        if part.carried:
            yield fed
