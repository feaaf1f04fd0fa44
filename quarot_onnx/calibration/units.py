"""Units of calibration samples: consecutive ones whose rows are summed up together, wherever that is done.

Which samples are a unit depends on the samples alone, so that sums come out the same, to the last bit, on one thread or
many, on one machine or many.
"""

from collections.abc import Sequence

from quarot_onnx.calibration.hessian import ROWS


def units(rows: Sequence[int]) -> list[range]:
    """Consecutive samples of at most ``ROWS`` rows together, or one sample that has more.

    Args:
        rows: Of each sample.
    """
    starts, held = [], 0
    for sample, count in enumerate(rows):
        if not sample or held + count > ROWS:
            starts.append(sample)
            held = 0
        held += count
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]
