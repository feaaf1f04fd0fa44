"""What a run did, for whoever asked for it."""

from collections.abc import Mapping
from dataclasses import dataclass

from quarot_onnx.calibration.bos import BosChoice
from quarot_onnx.evaluation.equivalence import Equivalence
from quarot_onnx.evaluation.fidelity import Fidelity
from quarot_onnx.io.model_io import SavedModel
from quarot_onnx.run.provenance import Record


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        saved: The files written.
        recipe: What was done, as recorded in the output.
        equivalence: The proof that the rotation changed nothing; None without rotation or with verification off.
        fidelity: How near the quantized model comes to the original; None where nothing was quantized or checked.
        notes: What the user should know.
        seconds: Time of each phase.
        bos: What stood in front of every window of calibration text, and why; None where none was read.
    """

    saved: SavedModel
    recipe: Record
    equivalence: Equivalence | None
    fidelity: Fidelity | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    bos: BosChoice | None = None
