"""Perplexity of a language model on a text, and the speed of its prefill.

``PPL = exp(mean(-ln p(token | tokens before it in the window)))``. The file is taken as it is (for WikiText the rows of
the raw split joined as in the file), tokenized whole without special tokens, and cut into windows that do not overlap.
With BOS a window is ``[BOS] + seq_len - 1`` tokens; the first position of a window is not scored, all others are.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quarot_onnx import model_io, runtime
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.text import Bos, load_tokenizer, read_text, resolve_bos, tokenizer_file
from quarot_onnx.calibration.text import windows as cut_windows
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.evaluation.logits import negative_log_likelihood
from quarot_onnx.evaluation.outputs import run
from quarot_onnx.graph.saturation import saturable_products
from quarot_onnx.processor import saturates

JOINING = "file as it is, tokenized whole without special tokens, windows without overlap"


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was taken.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: Mean negative log likelihood of the scored tokens, in nats.
        tokens: Scored tokens.
        windows: Windows run.
        seq_len: Tokens of a window, BOS among them.
        bos_id: The id in front of every window, None for none.
        tokenizer: The tokenizer.json used.
        joining: How the text became windows.
        seconds: Time in onnxruntime and scoring, without loading.
        saturating: How many products of the model saturate on this processor unless they are computed exactly.
        exact: Whether they were.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    bos_id: int | None
    tokenizer: Path
    joining: str
    seconds: float
    saturating: int = 0
    exact: bool = False


def perplexity(
    model_path: str | Path,
    text: str | Path,
    tokenizer: str | Path,
    *,
    seq_len: int = 512,
    windows: int = 20,
    bos: int | Bos = Bos.AUTO,
    threads: int | None = None,
    exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a model on a text file.

    Args:
        model_path: The ONNX file.
        text: A UTF-8 text file.
        tokenizer: A tokenizer.json, or the folder that holds one.
        seq_len: Tokens of a window, BOS among them.
        windows: Windows from the start of the text; 0 for all.
        bos: The BOS id; by default what the tokenizer's files say.
        threads: onnxruntime's intra-op threads.
        exact: Compute 8-bit products exactly where this processor's fast way saturates.
        progress: Called with the windows done and their number.

    Raises:
        CalibrationError: Text or tokenizer cannot be read, do not fit the model, or hold too little.
        ModelError: The model cannot be run, or its logits are not finite.
    """
    if seq_len < 2 or windows < 0:
        raise CalibrationError(f"{windows} windows of {seq_len} tokens score nothing: need seq_len of 2 or more")
    inputs = ModelInputs.from_path(model_path)
    source = tokenizer_file(tokenizer)
    bos_id = resolve_bos(source, bos)
    ids = cut_windows(
        read_text(text),
        load_tokenizer(source),
        length=seq_len,
        count=windows or None,
        bos_id=bos_id,
        vocab_size=inputs.vocab_size,
    )
    saturating = len(saturable_products(model_io.load(model_path))) if saturates() else 0
    session = runtime.session(model_path, threads=threads, exact_products=exact)
    start, total = time.perf_counter(), 0.0
    for done, window in enumerate(ids, start=1):
        logits = run(session, [inputs.logits], inputs.feed(window[None]))[0][0]
        total += float(negative_log_likelihood(logits[:-1], window[1:]).sum())
        if not np.isfinite(total):
            raise ModelError(f"the logits of {model_path} are not finite in window {done}: the model is damaged")
        if progress is not None:
            progress(done, len(ids))
    scored = ids.shape[0] * (ids.shape[1] - 1)
    nll = total / scored
    return Perplexity(
        perplexity=float(np.exp(nll)),
        nll=nll,
        tokens=scored,
        windows=len(ids),
        seq_len=seq_len,
        bos_id=bos_id,
        tokenizer=source,
        joining=JOINING,
        seconds=time.perf_counter() - start,
        saturating=saturating,
        exact=exact,
    )


def prefill_speed(path: str | Path, *, length: int = 256, repeats: int = 5, threads: int | None = None) -> float:
    """The speed of a prefill, in tokens per second: the median of ``repeats`` runs after one to warm up.

    Args:
        path: The ONNX file.
        length: Tokens of the prompt, random with a fixed seed.
        repeats: Runs timed.
        threads: onnxruntime's intra-op threads.

    Raises:
        ModelError: The model cannot be run.
    """
    inputs = ModelInputs.from_path(path)
    session = runtime.session(path, threads=threads)
    feeds = inputs.feed(np.random.default_rng(0).integers(0, inputs.vocab_size or 2, (1, length)))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run(session, [inputs.logits], feeds)
        seconds.append(time.perf_counter() - start)
    return length / statistics.median(seconds[1:])
