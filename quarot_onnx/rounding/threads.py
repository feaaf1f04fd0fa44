"""How many threads work in NumPy may take."""

import os

_ASKED = "OMP_NUM_THREADS"
"""What BLAS and onnxruntime go by, too."""


def thread_count() -> int:
    """The cores of the machine, or as many as ``OMP_NUM_THREADS`` says."""
    asked = os.environ.get(_ASKED, "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else os.cpu_count() or 1
