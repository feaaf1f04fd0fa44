"""The check of a quantized model: prepared before any long work, done on the files that will be the output."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self

import onnx_ir as ir
from pydantic import Field, PlainValidator

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead, behind
from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.calibration.readers import DataReader, TextReader
from quarot_onnx.calibration.text import Bos, choose_bos, tokenizer_file
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import CalibrationError, FeedError, InputError, ModelError
from quarot_onnx.evaluation.equivalence import is_decoder
from quarot_onnx.evaluation.fidelity import NO_LIMITS, Fidelity, Limits, Reference, measure, reference, require
from quarot_onnx.evaluation.material import Material, Other, Shape, random_material, text_material
from quarot_onnx.evaluation.report import fidelity_record
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model


def _bos(value: object) -> int | Bos:
    """A BOS as ``choose_bos`` takes it."""
    if value is None:
        return Bos.NONE
    if isinstance(value, Bos):
        return value
    if not isinstance(value, int) or value < 0:
        raise ValueError("need a token id from 0 on, or a Bos")
    return Bos.of(value)


class Check(Strict):
    """How a quantized model is compared with its original.

    Attributes:
        tokens: At least so many.
        text: A UTF-8 file; None for text that was not calibrated on, see ``text_material``.
        text_key: The key of the text in JSON lines; see ``read_text``.
        tokenizer: A tokenizer.json, or the folder that holds one; None for the one beside the model. Without any, the
            check runs on random ids and takes no perplexity.
        bos: The BOS id in front of every window, or where it comes from; by default what the tokenizer's files say.
        limits: What may be lost; past them nothing is written.

    Raises:
        ConfigError: A value is of another type or out of range.
    """

    positional = ("tokens", "text", "text_key", "tokenizer", "bos", "limits")

    tokens: Annotated[int, Field(ge=1, lt=1 << 31, strict=True)] = 512
    text: Path | None = None
    text_key: Annotated[str, Field(strict=True)] | None = None
    tokenizer: Path | None = None
    bos: Annotated[int | Bos, PlainValidator(_bos)] = Bos.AUTO
    limits: Limits = NO_LIMITS

    @property
    def demanded(self) -> bool:
        """Whether a model that cannot be checked is an error: something was named that only a check can honour."""
        return self.limits != NO_LIMITS or self.text is not None


@dataclass(eq=False)
class CheckRun:
    """A check that is ready to run, or the reason why there is none; to be closed by ``with``.

    Attributes:
        original: The float model.
        material: The tokens; None for no check.
        limits: What may be lost.
        demanded: Whether a model that cannot be checked is an error.
        memory: How the models are run.
        notes: What the user should know.
        fidelity: What came of it, once it ran.
    """

    original: Path
    material: Material | None
    limits: Limits = NO_LIMITS
    demanded: bool = False
    memory: Memory = Memory()  # noqa: RUF009 - frozen
    notes: tuple[str, ...] = ()
    fidelity: Fidelity | None = field(default=None, init=False)
    _reference: Reference | None = field(default=None, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        """The check itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove what it keeps on disk."""
        self._stack.close()

    def observe(self, model: Model) -> None:
        """Run the original where it is open: opening it takes longest. What fails waits for ``run``."""
        with suppress(ModelError):
            self._refer(model)

    def _refer(self, model: Model | None = None) -> None:
        if self.material is not None and self._reference is None:
            kept = reference(self.original, self.material, model=model, memory=self.memory)
            self._reference = self._stack.enter_context(kept)

    def _too_long(self, lead: Lead | None) -> bool:
        """Whether the original cannot be run on a prefix and the windows behind it, either."""
        if lead is None or self.material is None:
            return False
        ids = self.material.ids
        fed = ids[:, min(lead.shared(row) for row in ids) :]
        longer = replace(self.material, ids=behind(lead.ids, fed), lead=None)
        try:
            with reference(self.original, longer, memory=self.memory):
                return False
        except InputError as error:
            return isinstance(error, FeedError)

    def run(self, quantized: Path, model: ir.Model, lead: Lead | None = None) -> dict[str, object]:
        """Compare ``quantized``, which ``model`` was written to and which has ``lead`` before it, with the original.

        Returns:
            What the report says of it; nothing where there is no check.

        Raises:
            VerificationError: A limit is broken, or the quantized model puts out what is no prediction.
            ModelError: onnxruntime cannot run the quantized model; or the original, where that is an error.
        """
        try:
            self._refer()
        except ModelError as error:
            if self.demanded:
                raise _demanded(error) from error
            self.notes = (_unchecked(error),)
        if self._reference is None:
            return {}
        try:
            self.fidelity = measure(
                self._reference, quantized, model=model, limits=self.limits, lead=lead, memory=self.memory
            )
        except FeedError as error:
            if self.demanded or not self._too_long(lead or Lead.of(model, quantized.parent)):
                raise
            self.notes = (_unchecked(error),)
            return {}
        if self.fidelity.not_decoded:
            self.notes = (*self.notes, f"{self.fidelity.not_decoded}: no decode step was checked")
        require(self.fidelity)
        return {"check": fidelity_record(self.fidelity)}


def prepare(
    check: Check | None,
    original: str | Path,
    model: ir.Model,
    reader: DataReader | None,
    held: int = 0,
    *,
    memory: Memory = Memory(),  # noqa: B008 - frozen
) -> CheckRun:
    """Read the text, before anything long is done.

    Args:
        check: What is asked for; None for nothing.
        original: The float model's file.
        model: The same, loaded.
        reader: What the model will be calibrated on.
        held: Positions that a prefix of the quantized model will take at the most.
        memory: How the models are run.

    Returns:
        The check; without material, and with a note, where this model cannot be checked and nothing demands it.

    Raises:
        CalibrationError: Text or tokenizer do not fit, or are missing, though a text or limits are given; or the
            tokenizer that is given is not there.
        ModelError: The model cannot be checked, though a text or limits are given.
    """
    path = Path(original).absolute()
    if check is None:
        return CheckRun(path, None)
    if check.tokenizer is not None:
        tokenizer_file(check.tokenizer)  # one that is not there is no reason to go without a check
    calibrated = reader if isinstance(reader, TextReader) else None
    try:
        material = material_for(check, path, model, calibrated=calibrated, held=held)
    except (ModelError, CalibrationError) as error:
        if check.demanded:
            raise _demanded(error) from error
        return CheckRun(path, None, notes=(_unchecked(error),))
    return CheckRun(path, material, check.limits, check.demanded, memory)


def _demanded(error: InputError) -> InputError:
    """The error for a model that cannot be checked, with the way to go without."""
    if not isinstance(error, ModelError):
        return error  # of a text or a tokenizer, which says what to do
    reason = error.reason if isinstance(error, FeedError) else str(error)
    return ModelError(
        f"{reason}; or leave out what demands the check (--check-text, --max-kl, --max-ppl-ratio; text=, limits= of "
        "Check in Python)"
    )


def _unchecked(error: InputError) -> str:
    return f"the quantized model was not checked: {error}"


def material_for(
    check: Check,
    original: Path,
    model: ir.Model,
    *,
    calibrated: TextReader | None = None,
    held: int = 0,
    other: tuple[ModelInputs, Lead | None] | None = None,
) -> Material:
    """The tokens of a check.

    Args:
        check: What is asked for.
        original: The float model's file.
        model: The same, loaded.
        calibrated: What the quantized model was, or will be, calibrated on.
        held: Positions that a prefix of the quantized model takes at the most.
        other: Inputs and prefix of the quantized model, where it is there: windows are such that it takes them, too.

    Raises:
        CalibrationError: Text or tokenizer do not fit; or there is no tokenizer, and a text or a limit of the
            perplexity needs one.
        ModelError: The model is no language model, or its inputs are not known.
    """
    if not is_decoder(model):
        raise ModelError(f"{original} is no language model: it has no predictions to compare")
    inputs = ModelInputs.from_model(model, folder=original.parent)
    if inputs.no_logits:
        raise ModelError(f"{original} has no predictions to compare: {inputs.no_logits}")
    tokenizer = check.tokenizer
    if tokenizer is None and calibrated is not None:
        tokenizer = calibrated.tokenizer_path
    if tokenizer is None and (original.parent / "tokenizer.json").is_file():
        tokenizer = original.parent
    positions, lead = positions_of(original.parent, model.graph), Lead.of(model, original.parent)
    held = max(held, 0 if lead is None else len(lead.ids))
    beside = None
    if other is not None:
        bos = None if tokenizer is None else choose_bos(tokenizer_file(tokenizer), check.bos).id
        beside = Other(other[0], 0 if other[1] is None else other[1].shared_start(bos))
    shape = Shape.of(inputs, check.tokens, None if positions is None else max(positions.behind(held).count, 2), beside)
    if tokenizer is not None:
        found = text_material(
            inputs,
            shape,
            tokenizer,
            text=check.text,
            text_key=check.text_key,
            calibrated=calibrated,
            bos=check.bos,
        )
    elif check.limits.max_ppl_ratio is not None or check.text is not None:
        raise CalibrationError(
            f"a perplexity needs a tokenizer, and there is no tokenizer.json beside {original}; name one (--tokenizer)"
        )
    else:
        found = random_material(inputs, shape)
    return replace(found, lead=lead)
