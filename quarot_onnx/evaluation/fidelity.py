"""How near a quantized model comes to its float original, opened in onnxruntime as its user will open it.

Both see the same tokens, in a prefill and in decode steps on their own caches:

* KL: the mean of ``KL(softmax a || softmax b)`` over positions, in nats;
* top-1 agreement: the share of positions with the same most likely token;
* perplexity of each on the same text, and their ratio.

Where the quantized model holds products that saturate on this processor (:mod:`quarot_onnx.processor`), its perplexity
is also taken with exact products: what it costs to run here, apart from what quantization costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ModelError, VerificationError
from quarot_onnx.evaluation.before import Before
from quarot_onnx.evaluation.kept import Kept, kept
from quarot_onnx.evaluation.logits import readable
from quarot_onnx.evaluation.material import Material
from quarot_onnx.evaluation.measuring import own_logits
from quarot_onnx.evaluation.outputs import windows_outputs
from quarot_onnx.evaluation.sides import require_one_vocabulary
from quarot_onnx.evaluation.sums import Sums
from quarot_onnx.graph.saturation import saturating_here
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model, opened
from quarot_onnx.processor import EXACT_PRODUCTS

_Limit = Annotated[float, Field(ge=0, strict=True)] | None


class Limits(Strict):
    """What a quantized model may lose; None for no limit.

    Attributes:
        max_kl: Of the KL divergence, in nats.
        max_ppl_ratio: Of the perplexity's ratio to the original's.

    Raises:
        ConfigError: A limit is no number, negative, or not finite.
    """

    positional = ("max_kl", "max_ppl_ratio")

    max_kl: _Limit = None
    max_ppl_ratio: _Limit = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Fidelity:
    """How near a quantized model comes to its original.

    Attributes:
        kl: Mean KL divergence of the original's predictions from it, in nats.
        decode_kl: The same over decode steps alone; None without any.
        top1_agreement: Share of positions with the same argmax.
        perplexity_a: Of the original; None where the tokens are no text.
        perplexity_b: Of the quantized model, as this processor runs it.
        exact_perplexity: Of the quantized model with exact products; `perplexity_b` where they are exact anyhow.
        saturating: How many of its products saturate on this processor.
        tokens: Positions compared, decode steps among them.
        decode_steps: Decode steps among them.
        text: What the tokens are, for people.
        not_decoded: Why its decode steps were not compared; empty where they were, or where there are none.
        limits: What it may lose.
    """

    kl: float
    decode_kl: float | None
    top1_agreement: float
    perplexity_a: float | None
    perplexity_b: float | None
    exact_perplexity: float | None
    saturating: int
    tokens: int
    decode_steps: int
    text: str
    not_decoded: str = ""
    limits: Limits = NO_LIMITS

    @property
    def perplexity_ratio(self) -> float | None:
        """``perplexity_b / perplexity_a``."""
        return _ratio(self.perplexity_b, self.perplexity_a)

    @property
    def exact_perplexity_ratio(self) -> float | None:
        """``exact_perplexity / perplexity_a``."""
        return _ratio(self.exact_perplexity, self.perplexity_a)

    @property
    def broken(self) -> tuple[str, ...]:
        """The limits that are broken, in words."""
        ratio, limits, found = self.perplexity_ratio, self.limits, []
        if limits.max_kl is not None and self.kl > limits.max_kl:
            found.append(f"KL {self.kl:.4g} (allowed {limits.max_kl:g})")
        if limits.max_ppl_ratio is not None and ratio is not None and ratio > limits.max_ppl_ratio:
            found.append(f"perplexity ratio {ratio:.4f} (allowed {limits.max_ppl_ratio:g})")
        if self._decodes_otherwise:
            found.append(
                f"KL {self.decode_kl:.4g} in decode steps, {self._prefill_kl:.4g} in the prefill: the cache is not "
                "what it should be"
            )
        return tuple(found)

    @property
    def _prefill_kl(self) -> float:
        decoded = 0.0 if self.decode_kl is None else self.decode_kl * self.decode_steps
        return max((self.kl * self.tokens - decoded) / max(self.tokens - self.decode_steps, 1), 0.0)

    @property
    def _decodes_otherwise(self) -> bool:
        """Whether decode steps come out so much worse than a longer prefill that no rounding explains it."""
        longer = self.tokens >= 2 * self.decode_steps
        return longer and self.decode_kl is not None and self.decode_kl > 1 + 4 * self._prefill_kl

    @property
    def passed(self) -> bool:
        """Whether no limit is broken."""
        return not self.broken


def require(fidelity: Fidelity) -> None:
    """Stop if a limit is broken.

    Raises:
        VerificationError: It is; the message has the figures.
    """
    if fidelity.passed:
        return
    way, exact = "", fidelity.exact_perplexity_ratio
    if fidelity.saturating and exact is not None:
        way = (
            f"; the ratio is {exact:.4f} with exact products ({EXACT_PRODUCTS}=1): int8 weights saturate on this "
            "processor, uint8 ones do not"
        )
    raise VerificationError(
        f"the quantized model is too far from the original over {fidelity.tokens} tokens: "
        f"{', '.join(fidelity.broken)}{way}"
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """The original's logits, in a file.

    Attributes:
        material: The tokens.
        windows: Of each window, ``[tokens, vocab]``, from ``held`` on.
        vocab: Their length.
        held: Tokens at the start of a window that the original brings itself.
    """

    material: Material
    windows: Kept
    vocab: int
    held: int = 0


@contextmanager
def reference(
    original: str | Path,
    material: Material,
    threads: int | None = None,
    *,
    model: Model | None = None,
    memory: Memory | None = None,
) -> Iterator[Reference]:
    """Run the original.

    Args:
        original: The float model.
        material: The tokens.
        threads: onnxruntime's intra-op threads.
        model: The same, where it is open.
        memory: How it is run; None: whole where it fits into what the machine has.

    Raises:
        FeedError: It cannot be run on them.
        ModelError: Its logits are not finite, or not those of all positions.
    """
    vocab = 0
    if model is None:
        model = opened(original, memory or Memory(), threads=threads)
    fed, before, held = material.fed_to(material.inputs, material.lead)
    with kept() as windows:
        for rows in _windows(model, original, material.inputs, fed, before):
            vocab = rows.shape[1]
            windows.put(own_logits(rows, original))
        del model
        yield Reference(material, windows, vocab, held)


def measure(
    original: Reference,
    quantized: str | Path,
    *,
    model: ir.Model | None = None,
    limits: Limits = NO_LIMITS,
    threads: int | None = None,
    lead: Lead | None = None,
    memory: Memory | None = None,
) -> Fidelity:
    """Compare a quantized model with its original.

    Args:
        original: What the float model puts out.
        quantized: The quantized model.
        model: The same, where it is at hand.
        limits: What may be lost; nothing is raised where it is, see `require`.
        threads: onnxruntime's intra-op threads.
        lead: The quantized model's prefix, where the file that holds it does not lie beside it.
        memory: How the quantized model is run; None: whole where it fits into what the machine has.

    Raises:
        ModelError: The quantized model cannot be run, or has another vocabulary.
        VerificationError: Its logits are not finite.
    """
    material = original.material
    model = model_io.load(quantized) if model is None else model
    lead = lead or Lead.of(model, Path(quantized).parent)
    inputs = ModelInputs.from_model(model, head_dim=material.inputs.head_dim)
    material, before, held = material.fed_to(inputs, lead)
    start = max(held, original.held)  # only what both are fed is compared
    ids, steps = original.material.ids[:, start:], material.decode_steps
    sums = Sums(ids, steps)
    opening = partial(opened, quantized, memory or Memory(), threads=threads)
    for number, rows in enumerate(_windows(opening(), quantized, inputs, material, before)):
        require_one_vocabulary(("the quantized model", rows.shape[1]), ("the original", original.vocab))
        finite = readable(rows)
        if finite is None:
            raise VerificationError("the quantized model puts out NaN or infinity; leave more in float (--exclude)")
        sums.add(number, original.windows.take()[start - original.held :], finite[start - held :])
    saturating = saturating_here(model)
    exact = sums.nll_b
    if saturating and material.is_text:
        runs = _windows(opening(exact_products=True), quantized, inputs, material, before)
        exact = sum(sums.nll(number, rows[start - held :]) for number, rows in enumerate(runs))
    perplexity = sums.perplexity if material.is_text else lambda _nll: None
    return Fidelity(
        kl=max((sums.kl + sums.decode_kl) / ids.size, 0.0),
        decode_kl=max(sums.decode_kl / (steps * len(ids)), 0.0) if steps else None,
        top1_agreement=sums.agreed / ids.size,
        perplexity_a=perplexity(sums.nll_a),
        perplexity_b=perplexity(sums.nll_b),
        exact_perplexity=perplexity(exact),
        saturating=saturating,
        tokens=ids.size,
        decode_steps=steps * len(ids),
        text=material.origin,
        not_decoded=inputs.dropped if original.material.decode_steps else "",
        limits=limits,
    )


def _windows(
    model: Model, path: str | Path, inputs: ModelInputs, material: Material, before: Before
) -> Iterator[npt.NDArray[Any]]:
    """The logits of each window, ``[tokens, vocab]``: prefill and decode steps in one."""
    ids, rows = material.ids, inputs.lengths.batch or 1
    batches = [ids[i : i + rows] for i in range(0, len(ids), rows)]
    held, runs = iter(map(len, batches)), list[npt.NDArray[Any]]()
    outputs = windows_outputs(model, inputs, batches, [inputs.logits], material.decode_steps, before=before)
    for place, (logits,) in outputs:
        runs.append(logits)
        if not place.last:
            continue
        if any(run.ndim != 3 for run in runs) or sum(run.shape[1] for run in runs) != ids.shape[1]:
            raise ModelError(
                f"{path} gives no logits for each of {ids.shape[1]} tokens, which are compared: export the model "
                "without pruning its logits"
            )
        yield from np.concatenate(runs, axis=1)[: next(held)]  # others only fill up what the graph fixes
        runs = []


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole
