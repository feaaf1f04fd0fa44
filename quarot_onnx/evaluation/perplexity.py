"""Perplexity of a language model on a text, and the speed of its prefill.

``PPL = exp(mean(-ln p(token | tokens before it in the window)))``. The file is taken as it is (for WikiText the rows of
the raw split joined as in the file), tokenized whole without special tokens, and cut into windows that do not overlap.
With BOS a window is ``[BOS] + seq_len - 1`` tokens; the first position of a window is not scored, all others are.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.pieces import default_window, pieces, room_note
from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.calibration.running_text import running_text_note
from quarot_onnx.calibration.text import Bos, choose_bos, load_tokenizer, read_text, tokenizer_file
from quarot_onnx.calibration.text import windows as cut_windows
from quarot_onnx.calibration.text_files import DEFAULT_KEY, is_json_lines
from quarot_onnx.distributed.cluster import connected
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.evaluation.outputs import run
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.evaluation.source import Source
from quarot_onnx.evaluation.windows import Windows, scores, spread_scores
from quarot_onnx.graph.saturation import saturating_here
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import Progress
from quarot_onnx.sessions import runtime

if TYPE_CHECKING:
    import distributed

_JOINING = "{source}, tokenized whole without special tokens, windows without overlap"


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
        bos_why: Who says so.
        tokenizer: The tokenizer.json used.
        joining: How the text became windows.
        seconds: Time in onnxruntime and scoring, without loading.
        notes: What the user should know.
        saturating: How many products of the model saturate on this processor unless they are computed exactly.
        exact: Whether they were.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    bos_id: int | None
    bos_why: str
    tokenizer: Path
    joining: str
    seconds: float
    notes: tuple[str, ...] = ()
    saturating: int = 0
    exact: bool = False


def perplexity(
    model_path: str | Path,
    text: str | Path,
    tokenizer: str | Path,
    *,
    seq_len: int | None = None,
    windows: int = 20,
    bos: int | Bos = Bos.AUTO,
    text_key: str | None = None,
    threads: int | None = None,
    exact: bool = False,
    unscored: int = 1,
    decode: int = 0,
    memory: Memory = Memory(),  # noqa: B008 - frozen
    scheduler: "str | distributed.Client | None" = None,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a model on a text file.

    Args:
        model_path: The ONNX file.
        text: A UTF-8 text file, plain or JSON lines.
        tokenizer: A tokenizer.json, or the folder that holds one.
        seq_len: Tokens of a window, BOS among them; None for 512, or for what the graph takes and has positions for.
        windows: Windows from the start of the text; 0 for all.
        bos: The BOS id, or where it comes from; by default what the tokenizer's files say.
        text_key: The key of the text in JSON lines; see ``read_text``.
        threads: onnxruntime's intra-op threads.
        exact: Compute 8-bit products exactly where this processor's fast way saturates.
        unscored: Tokens at the start of a window that are not scored, for models to be compared on the same ones; of a
            model with a prefix also the first that is fed is not.
        decode: Tokens at the end of a window that are fed one by one, each on the cache of those before it.
        memory: What it may take, and whether the model is run piece by piece for that.
        scheduler: A Dask scheduler's address, or a client of it, whose workers run the windows, with the same figure.
        progress: Called with the windows done and their number; of a model run piece by piece those of every piece.

    Raises:
        CalibrationError: Text or tokenizer cannot be read, do not fit the model, or hold too little.
        ModelError: The model cannot be run, has no logits of every position, or some that are not finite.
        ClusterError: There is no such scheduler, or its workers do not see the model.
    """
    model = Scored.of_text(model_path)
    inputs, source = model.inputs, tokenizer_file(tokenizer)
    used = choose_bos(source, bos)
    # A graph that fixes its lengths is not fed fewer tokens where a text happens to go on as its prefix does.
    held = 0 if model.lead is None or inputs.lengths.seq is None else model.lead.shared_start(used.id)
    room = positions_of(Path(model_path).parent, model.model.graph)
    if room is not None and model.lead is not None:
        room = room.behind(len(model.lead.ids) - model.lead.shared_start(used.id))
    shorter: tuple[str, ...] = ()
    if seq_len is None:
        seq_len = default_window(inputs, None if room is None else room.count - held) + held
        if room is not None and seq_len < default_window(inputs) + held:
            shorter = (f"measured on windows of {seq_len} tokens: {room.said}",)
    if seq_len <= max(unscored, 1) or windows < 0:
        raise CalibrationError(
            f"{windows} windows of {seq_len} tokens score nothing: need seq_len of {max(unscored, 1) + 1} or more"
        )
    pieces(inputs, seq_len - held, held=held)  # tells of a length that the graph does not take
    too_long = () if room is None else room.note(seq_len, "--seq-len; in Python seq_len=")
    if decode and not inputs.has_cache:
        why = inputs.dropped or f"{model_path} has no cache to decode on"
        raise ModelError(f"{why}: evaluate it without (--decode, decode=)")
    loaded = load_tokenizer(source)
    ids = cut_windows(
        read_text(text, text_key),
        loaded,
        length=seq_len,
        count=windows or None,
        bos_id=used.id,
        vocab_size=inputs.vocab_size,
    )
    brought = [model.brought(window) if inputs.lengths.seq is None else held for window in ids]
    firsts = [max(unscored, held + 1) for held in brought]
    if max(firsts) >= seq_len:
        raise CalibrationError(f"windows of {seq_len} tokens hold none to score behind the prefix: use longer ones")
    if decode >= seq_len - max(brought):
        raise CalibrationError(f"windows of {seq_len} tokens leave nothing to prefill before {decode}: decode fewer")
    saturating = saturating_here(model.model)
    wanted = Windows(Source(Path(model_path), threads, exact, memory), ids, brought, firsts, decode)
    with connected(scheduler) as cluster:
        found = scores(wanted, model, progress) if cluster is None else spread_scores(wanted, model, cluster, progress)
        start, total = time.perf_counter(), 0.0
        for number, score in enumerate(found, start=1):
            total += score
            if not np.isfinite(total):
                raise ModelError(f"the logits of {model_path} are not finite in window {number}: the model is damaged")
    scored = sum(seq_len - first for first in firsts)
    nll = total / scored
    return Perplexity(
        perplexity=float(np.exp(nll)),
        nll=nll,
        tokens=scored,
        windows=len(ids),
        seq_len=seq_len,
        bos_id=used.id,
        bos_why=used.why,
        tokenizer=source,
        joining=_JOINING.format(source=_described(text, text_key)),
        seconds=time.perf_counter() - start,
        notes=(
            *_prefix_note(model.lead, brought),
            *room_note(inputs, seq_len - max(brought), decode_steps=decode, held=max(brought)),
            *shorter,
            *too_long,
            *running_text_note(ids, loaded, str(text)),
            *(() if cluster is None else cluster.notes),
        ),
        saturating=saturating,
        exact=exact,
    )


def _prefix_note(lead: Lead | None, brought: list[int]) -> tuple[str, ...]:
    """What to say of a model with a prefix, of which windows are fed without their first tokens.

    Args:
        lead: The prefix.
        brought: How many tokens of each window it holds.
    """
    if lead is None:
        return ()
    least, most = min(brought), max(brought)
    fed = ""
    if most:
        fed = f"windows are fed without their first {most if least == most else f'{least} to {most}'}, and "
    same = (
        f"another model is scored on the same tokens with --unscored {most + 1}"
        if least == most
        else f"with --unscored {most + 1} for both, another model is scored on the same tokens"
    )
    return (f"the model brings the prefix {list(lead.ids)}: {fed}the first token behind it is not scored; {same}",)


def _described(text: str | Path, key: str | None) -> str:
    """How a file became a text."""
    if not is_json_lines(text, key):
        return "file as it is"
    return f"{key or DEFAULT_KEY!r} of JSON lines, joined by empty lines"


def prefill_speed(path: str | Path, *, length: int = 256, repeats: int = 5, threads: int | None = None) -> float:
    """The speed of a prefill, in tokens per second: the median of ``repeats`` runs after one to warm up.

    Args:
        path: The ONNX file.
        length: Tokens of the prompt, random with a fixed seed; a graph that fixes a length gets that.
        repeats: Runs timed.
        threads: onnxruntime's intra-op threads.

    Raises:
        ModelError: The model cannot be run.
    """
    inputs = ModelInputs.from_path(path)
    session = runtime.session(path, threads=threads, timed=True)
    length = inputs.lengths.seq or length
    feeds = inputs.feed(np.random.default_rng(0).integers(0, inputs.id_range, (1, length)))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run(session, [inputs.logits], feeds)
        seconds.append(time.perf_counter() - start)
    return length / statistics.median(seconds[1:])
