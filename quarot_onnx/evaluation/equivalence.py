"""Proof that two models compute the same: their logits on the same tokens.

Rotations change no output but for rounding, so the measure is rounding noise. Both models see the same random ids and,
where a tokenizer lies beside the first, the same real text: prefills, then decode steps, each on its own cache (rotated
keys differ, so caches are never compared). They run one after the other; the first one's logits wait in a file.

Two figures decide: the largest difference relative to the largest logit, which finds a single wrong position, and the
relative L2 error ``|b - a| / |a|``, which averages over millions of logits and so stands close above the noise.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx import model_io
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import INTEGERS, embedding_rows
from quarot_onnx.calibration.text import TokenIds, default_text, find_bos, load_tokenizer, windows
from quarot_onnx.errors import CalibrationError, ModelError, VerificationError
from quarot_onnx.evaluation.measures import Measures
from quarot_onnx.evaluation.outputs import Rows, decoder_logits, float_output_names, float_outputs, random_feeds

_GENERIC_FEEDS = 4
_CHARACTERS_PER_TOKEN = 50  # far more than any tokenizer makes of prose


@dataclass(frozen=True)
class Tolerance:
    """What may differ.

    Attributes:
        max_rel: Of the largest difference, relative to the largest logit.
        rel_l2: Of the relative L2 error.
        top1: Of the share of positions with the same most likely token, from below.
    """

    max_rel: float
    rel_l2: float
    top1: float = 0.999


# Some 12 roundings a layer in 30 layers add up like a random walk: an expected L2 error of sqrt(360) = 19 unit
# roundoffs (2^-24, 2^-11, 2^-8), 1.1e-6 in float32. One matrix off by 1 % moves the logits by 4e-4 or more. The limit
# for float32 is the geometric mean of the two, 2e-5, and in the same way 1e-4 for the largest difference, which lies
# up to eight times above the L2 error. In 16 bits noise and fault meet: the limits are about twice the expected noise
# for the L2 error and five times for the largest difference.
_TOLERANCES = {
    ir.DataType.DOUBLE: Tolerance(max_rel=1e-4, rel_l2=2e-5),
    ir.DataType.FLOAT: Tolerance(max_rel=1e-4, rel_l2=2e-5),
    ir.DataType.FLOAT16: Tolerance(max_rel=5e-2, rel_l2=2e-2, top1=0.95),
    ir.DataType.BFLOAT16: Tolerance(max_rel=4e-1, rel_l2=1.6e-1, top1=0.8),
}


@dataclass(frozen=True)
class Equivalence:
    """How far two models' outputs are apart, over all compared positions.

    Attributes:
        max_abs_logit_diff: ``max |b - a|``.
        max_rel_logit_diff: ``max |b - a| / max |a|``.
        rel_l2: ``|b - a| / |a|`` over all logits.
        kl: Mean of ``KL(a || b)`` in nats; None for graphs that are no decoders.
        top1_agreement: Share of positions with the same argmax. A flip counts as agreement where a's own logits of the
            two tokens are closer than twice the ``max_rel`` that the dtype's rounding explains. None for no decoders.
        tokens: Positions compared, decode steps among them; rows for graphs that are no decoders.
        decode_steps: Decode steps among them.
        dtype: The less precise of the two models' weight types; it chose the tolerance if none was given.
        tolerance: The tolerance used.
        passed: Whether everything lies within it.
    """

    max_abs_logit_diff: float
    max_rel_logit_diff: float
    rel_l2: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    decode_steps: int
    dtype: ir.DataType
    tolerance: Tolerance
    passed: bool


def compare(
    path_a: str | Path,
    path_b: str | Path,
    *,
    token_ids: TokenIds | None = None,
    random_tokens: int = 128,
    real_tokens: int = 128,
    seq_len: int = 64,
    decode_steps: int = 4,
    seed: int = 0,
    tolerance: Tolerance | None = None,
    threads: int | None = None,
) -> Equivalence:
    """Compare two models.

    Args:
        path_a: The original.
        path_b: The other one.
        token_ids: Token ids of your own in place of the real text, ``[windows, seq]``; their last ``decode_steps``
            are decoded one by one.
        random_tokens: Prefill tokens of random ids, rounded up to whole windows; 0 for none.
        real_tokens: Prefill tokens of real text, if a tokenizer.json lies beside ``path_a``; 0 for none.
        seq_len: Prefill tokens of a window.
        decode_steps: Tokens decoded after every prefill, if both graphs have a cache.
        seed: Of the random ids, and of the random inputs of graphs that are no decoders.
        tolerance: What may differ; None for what the dtype allows.
        threads: onnxruntime's intra-op threads.

    Raises:
        ModelError: A model cannot be run, the two have different vocabularies or inputs, or ``path_a``'s own outputs
            are not finite.
        CalibrationError: Token ids that do not fit, or nothing to compare on.
    """
    model_a, model_b = model_io.load(path_a), model_io.load(path_b)
    dtype = max(_weight_type(model_a), _weight_type(model_b), key=list(_TOLERANCES).index)
    decoder, decoded = is_decoder(model_a) and is_decoder(model_b), 0
    if decoder:
        a = _Decoder.read(path_a, model_a)
        # A graph may leave its cache's head_dim to a config file, which only the original has beside it.
        b = _Decoder.read(path_b, model_b, head_dim=a.inputs.head_dim)
        if a.inputs.vocab_size != b.inputs.vocab_size:
            raise ModelError(
                f"{path_a} has a vocabulary of {a.inputs.vocab_size} and {path_b} one of {b.inputs.vocab_size}: "
                "these are different models"
            )
        steps = decode_steps if a.inputs.has_cache and b.inputs.has_cache else 0
        groups = _token_windows(
            a,
            token_ids,
            random_tokens=random_tokens,
            real_tokens=real_tokens,
            seq_len=seq_len,
            steps=steps,
            seed=seed,
        )
        decoded = sum(map(len, groups)) * steps
        runs_a, runs_b = a.runs(groups, steps, threads), b.runs(groups, steps, threads)
    else:
        runs_a, runs_b = _generic_runs(path_a, model_a, path_b, model_b, seed=seed, threads=threads)
    del model_a, model_b
    measures = _measure(runs_a, runs_b, path_a, path_b)
    limits = _TOLERANCES[dtype] if tolerance is None else tolerance
    top1 = measures.top1_agreement(2 * _TOLERANCES[dtype].max_rel * measures.largest) if decoder else None
    return Equivalence(
        max_abs_logit_diff=measures.max_abs,
        max_rel_logit_diff=measures.max_rel,
        rel_l2=measures.rel_l2,
        kl=measures.kl if decoder else None,
        top1_agreement=top1,
        tokens=measures.rows,
        decode_steps=decoded,
        dtype=dtype,
        tolerance=limits,
        passed=measures.max_rel <= limits.max_rel
        and measures.rel_l2 <= limits.rel_l2
        and (top1 is None or top1 >= limits.top1),
    )


def require(equivalence: Equivalence) -> None:
    """Stop if a comparison did not pass.

    Raises:
        VerificationError: It did not; the message has the figures.
    """
    if equivalence.passed:
        return
    limits = equivalence.tolerance
    figures = [
        f"max |Δlogit| {equivalence.max_abs_logit_diff:.3g}",
        f"relative {equivalence.max_rel_logit_diff:.3g} (allowed {limits.max_rel:.3g})",
        f"relative L2 {equivalence.rel_l2:.3g} (allowed {limits.rel_l2:.3g})",
    ]
    if equivalence.top1_agreement is not None:
        figures.append(f"top-1 agreement {equivalence.top1_agreement:.4f} (required {limits.top1:.4f})")
    if equivalence.kl is not None:
        figures.append(f"KL {equivalence.kl:.3g} nats")
    raise VerificationError(
        f"the models differ by more than rounding explains ({equivalence.dtype.name.lower()} weights) over "
        f"{equivalence.tokens} tokens: " + ", ".join(figures)
    )


def is_decoder(model: ir.Model) -> bool:
    """Whether an integer input ``[batch, sequence]`` of the graph indexes an embedding table."""
    inputs = [
        value for value in model.graph.inputs if value.dtype in INTEGERS and value.shape and len(value.shape) == 2
    ]
    return any(embedding_rows(model.graph, value.name or "") is not None for value in inputs)


@dataclass(frozen=True)
class _Decoder:
    path: Path
    inputs: ModelInputs

    @classmethod
    def read(cls, path: str | Path, model: ir.Model, head_dim: int | None = None) -> "_Decoder":
        return cls(Path(path), ModelInputs.from_model(model, head_dim=head_dim, folder=Path(path).parent))

    def runs(self, groups: Sequence[TokenIds], steps: int, threads: int | None) -> Iterator[Rows]:
        """The logits of all windows; the session opens with the first and goes with the last."""
        return decoder_logits(self.path, self.inputs, groups, decode_steps=steps, threads=threads)


def _token_windows(
    decoder: _Decoder,
    token_ids: TokenIds | None,
    *,
    random_tokens: int,
    real_tokens: int,
    seq_len: int,
    steps: int,
    seed: int,
) -> list[TokenIds]:
    """Groups of windows ``[windows, prefill + steps]``: random ids, then real ones."""
    groups, vocab_size = [], decoder.inputs.vocab_size
    if random_tokens:
        shape = (-(-random_tokens // seq_len), seq_len + steps)
        # Without a known vocabulary only the first ids are safe.
        groups.append(np.random.default_rng(seed).integers(0, vocab_size or 2, shape))
    tokenizer_path = decoder.path.parent / "tokenizer.json"
    if token_ids is not None:
        groups.append(np.asarray(token_ids, np.int64))
        if groups[-1].ndim != 2 or groups[-1].shape[1] <= steps:
            shape = groups[-1].shape
            raise CalibrationError(f"token ids are {list(shape)}: need [windows, sequence], longer than {steps} steps")
    elif real_tokens and tokenizer_path.is_file():
        count = -(-real_tokens // seq_len)
        text = default_text()[: _CHARACTERS_PER_TOKEN * count * (seq_len + steps)]
        tokenizer, bos_id = load_tokenizer(tokenizer_path), _any_bos(tokenizer_path)
        length = seq_len + steps
        groups.append(windows(text, tokenizer, length=length, count=count, bos_id=bos_id, vocab_size=vocab_size))
    if not groups:
        raise CalibrationError("nothing to compare on: ask for random tokens, or give token ids")
    return groups


def _any_bos(tokenizer_path: Path) -> int | None:
    """The BOS, or none where the files are at odds about it: both models see the same ids whatever it is."""
    try:
        return find_bos(tokenizer_path)
    except CalibrationError:
        return None


def _generic_runs(
    path_a: str | Path,
    model_a: ir.Model,
    path_b: str | Path,
    model_b: ir.Model,
    *,
    seed: int,
    threads: int | None,
) -> tuple[Iterator[Rows], Iterator[Rows]]:
    """Runs of two graphs that are no decoders, on the same random inputs."""
    wanted, offered = ({value.name for value in model.graph.inputs} for model in (model_a, model_b))
    if wanted != offered:
        raise ModelError(f"{path_a} and {path_b} have different inputs: {sorted(map(str, wanted ^ offered))}")
    feeds = random_feeds(model_a, _GENERIC_FEEDS, np.random.default_rng(seed))
    names_a, names_b = float_output_names(model_a), float_output_names(model_b)
    if len(names_a) != len(names_b):
        raise ModelError(f"{path_a} has {len(names_a)} float outputs and {path_b} {len(names_b)}: no pairs")
    return float_outputs(path_a, names_a, feeds, threads), float_outputs(path_b, names_b, feeds, threads)


def _measure(runs_a: Iterator[Rows], runs_b: Iterator[Rows], path_a: str | Path, path_b: str | Path) -> Measures:
    """Run one model to its end, its outputs into a file, then the other against it."""
    measures, kinds = Measures(), []
    with tempfile.TemporaryFile(prefix="quarot-logits-") as store:
        for rows in runs_a:
            if not np.isfinite(rows).all():
                raise ModelError(f"{path_a} puts out NaN or infinity on its own: there is nothing to compare with")
            kinds.append((rows.shape, rows.dtype))
            store.write(np.ascontiguousarray(rows).tobytes())
        store.seek(0)
        for (shape, kind), rows in zip(kinds, runs_b, strict=True):
            stored = np.frombuffer(store.read(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)
            if rows.shape != shape:
                raise ModelError(f"{path_a} puts out {list(shape)}, {path_b} {list(rows.shape)}: different models")
            measures.add(stored, rows)
    return measures


def _weight_type(model: ir.Model) -> ir.DataType:
    """The least precise float type among the weights of two or more dimensions, float32 without any.

    A few scales or tables in float16 do not make a float16 model: a type counts from a tenth of the float bytes on.
    """
    sizes: dict[ir.DataType, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _TOLERANCES and len(tensor.shape) >= 2:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    counted = [dtype for dtype, size in sizes.items() if 10 * size >= sum(sizes.values())]
    return max(counted, key=list(_TOLERANCES).index, default=ir.DataType.FLOAT)
