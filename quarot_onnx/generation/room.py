"""How many tokens a model has room for: its positions, as files or tables tell, and the columns of its cache."""

from dataclasses import dataclass

from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.scored import Scored

DEFAULT_NEW = 128
"""New tokens where nobody says how many; fewer where there is less room."""


@dataclass(frozen=True)
class Room:
    """How many tokens fit.

    Attributes:
        tokens: Those of a prompt and those generated, without a prefix that the model brings.
        why: Who says so.
    """

    tokens: int
    why: str

    def new_tokens(self, prompt: int, wanted: int | None) -> int:
        """How many tokens to generate at most.

        Args:
            prompt: Tokens of the prompt.
            wanted: As many as were asked for; None for what is usual, or what fits.

        Raises:
            CalibrationError: They do not fit.
        """
        left = self.tokens - prompt
        if left < 1:
            raise CalibrationError(
                f"the prompt has {prompt} tokens, and the model has room for {self.tokens} ({self.why}), one of them "
                "new: shorten it"
            )
        if wanted is not None and wanted > left:
            raise CalibrationError(
                f"{prompt} tokens of the prompt and {wanted} new ones are more than the model has room for, "
                f"{self.tokens} ({self.why}): ask for {left} or fewer, or leave the number out, which stops there "
                "(--max-new-tokens)"
            )
        return min(DEFAULT_NEW, left) if wanted is None else wanted


def room_of(model: Scored) -> Room | None:
    """The room of a model, None where nothing bounds it.

    Args:
        model: The model.

    Raises:
        CalibrationError: A config beside it is not readable.
    """
    lead, lengths = model.lead, model.inputs.lengths
    before = 0 if lead is None else len(lead.ids)
    found = []
    if (positions := positions_of(model.path.parent, model.model.graph)) is not None:
        positions = positions.behind(before)
        found.append(Room(positions.count, positions.why))
    if lengths.past and model.inputs.has_cache:
        # What is generated last is not fed; where new columns are joined to the cache, one more is seen.
        columns = lengths.past + (1 if lengths.in_place else 2)
        found.append(Room(columns - (0 if lead is None else lead.fed_length), "columns of its cache"))
    return min(found, key=lambda room: room.tokens, default=None)
