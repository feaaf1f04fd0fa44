"""Two models on the same inputs: what is run of each, and which of their outputs belong together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.lengths import FIXED, Lengths
from quarot_onnx.calibration.pieces import fitting_window
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import FeedError, ModelError
from quarot_onnx.evaluation.before import Before, befores
from quarot_onnx.evaluation.given import turned
from quarot_onnx.evaluation.measuring import Figures, measure
from quarot_onnx.evaluation.outputs import Outputs, decoder_outputs, float_outputs, random_feeds
from quarot_onnx.evaluation.pairing import Pairing, pair_decoders, pair_others
from quarot_onnx.evaluation.proof_tokens import ComparedDecoder, rows_at_once, token_windows
from quarot_onnx.piecewise.runs import Model

_GENERIC_FEEDS = 4

_LENGTHS = {
    "batch": "texts at once",
    "seq": "tokens at once",
    "past": "positions of its cache",
    "total": "columns of its mask",
}

Opening = Callable[[], Model]
Then = Callable[[Model], None]


class Runs(Protocol):
    """What runs a model that is opened."""

    def __call__(self, opening: Opening, *, rows: int, then: Then | None = None) -> Iterator[Outputs]:
        """Its outputs, run by run, ``rows`` windows at once; ``then`` is called with the model after the last run."""


@dataclass(eq=False)
class Sides:
    """The two models.

    Attributes:
        paths: Their files.
        pairing: Which outputs are compared.
        first: Runs the first.
        second: Runs the second.
        decoder: The first output is a decoder's logits.
        decoded: Decode steps among the positions.
        rows: Windows that are run at once.
    """

    paths: tuple[str | Path, str | Path]
    pairing: Pairing
    first: Runs
    second: Runs
    decoder: bool = False
    decoded: int = 0
    rows: int = 1

    def measured(self, first: Opening, second: Opening, then: Then | None = None) -> Figures:
        """How far the outputs are apart.

        Windows go together where the first model takes them so: decode steps cost little more for several, and what
        holds for a batch is seen. Where it does not, whatever its inputs say, each goes alone.

        Args:
            first: Opens the first model.
            second: Opens the second.
            then: Called with the first after its last run, unless feeds were given.

        Raises:
            FeedError: onnxruntime cannot run the inputs.
            ModelError: See `measuring.measure`.
        """
        ran: list[bool] = []

        def noted() -> Iterator[Outputs]:
            yield from self.first(first, rows=self.rows, then=then)
            ran.append(True)

        try:
            runs = self.second(second, rows=self.rows)
            return measure(self.pairing, noted(), runs, self.paths, decoder=self.decoder)
        except FeedError:
            if ran or self.rows == 1:
                raise
        # Here what failed is no longer held.
        self.rows = 1
        return self.measured(first, second, then)

    def of_the_first(self) -> "Sides":
        """The first model beside itself."""
        path = self.paths[0]
        return replace(self, paths=(path, path), pairing=self.pairing.with_itself(), second=self.first)


@dataclass(frozen=True)
class Tokens:
    """Which tokens two decoders are run on; see ``equivalence.compare``."""

    given: TokenIds | None
    random: int
    real: int
    seq_len: int
    decode_steps: int
    seed: int


def on_tokens(
    a: ComparedDecoder,
    models: tuple[ir.Model, ir.Model],
    b: ComparedDecoder,
    tokens: Tokens,
    *,
    lead: Lead | None,
) -> Sides:
    """Two decoders on windows of tokens; where one fixes a length, the other is run with the same.

    Args:
        a: The first.
        models: Both, loaded.
        b: The second.
        tokens: What they are run on.
        lead: The second's prefix, where the file that holds it does not lie beside it.

    Raises:
        CalibrationError: Token ids that do not fit, or nothing to compare on.
        ModelError: They fix different lengths.
    """
    lengths = a.inputs.lengths.beside(b.inputs.lengths)
    _require_alike(lengths, b)
    before = befores(Lead.of(models[0], a.path.parent), lead or Lead.of(models[1], b.path.parent))
    _require_feedable(lengths, (a, b), before)
    a, b = (replace(side, inputs=replace(side.inputs, lengths=lengths)) for side in (a, b))
    pairing = pair_decoders(models[0], a.inputs, models[1], b.inputs)
    wanted = tokens.decode_steps if b.inputs.has_cache else 0
    length, steps = fitting_window(a.inputs, tokens.seq_len, wanted)
    groups = token_windows(
        a,
        tokens.given,
        random_tokens=tokens.random,
        real_tokens=tokens.real,
        seq_len=length - steps,
        steps=steps,
        seed=tokens.seed,
    )
    at_end = {i for i, item in enumerate(pairing.outputs) if item.cache}
    run = partial(decoder_outputs, groups=groups, at_end=at_end, decode_steps=steps)
    rows = lengths.batch
    if not rows:  # behind a cache that is fed, GroupQueryAttention takes a single one
        behind = any(side.past is not None for side in before)
        rows = 1 if behind else rows_at_once(groups, a.inputs.vocab_size)
    return Sides(
        (a.path, b.path),
        pairing,
        partial(run, inputs=a.inputs, names=[item.name for item in pairing.outputs], before=before[0]),
        partial(run, inputs=b.inputs, names=[item.other for item in pairing.outputs], before=before[1]),
        decoder=not a.inputs.no_logits,
        decoded=sum(map(len, groups)) * steps,
        rows=rows,
    )


def _require_alike(lengths: Lengths, b: ComparedDecoder) -> None:
    """Refuse a second model that fixes other lengths than the first.

    Raises:
        ModelError: It does.
    """
    for name in FIXED:
        one, other = getattr(lengths, name), getattr(b.inputs.lengths, name)
        if other not in (None, one):
            words = _LENGTHS[name]
            raise ModelError(
                f"{b.path} takes {other} {words} and the model before it {one}, so that their runs are not the same: "
                "fix the same length in both, or none in one of them"
            )


def _require_feedable(lengths: Lengths, sides: Sequence[ComparedDecoder], before: Sequence[Before]) -> None:
    """Refuse runs of a fixed length where one model has to be fed the prefix that the other one holds.

    Raises:
        ModelError: It would be.
    """
    fed = next((number for number, prefix in enumerate(before) if prefix.ids), None)
    if fed is None or (lengths.seq is None and lengths.past is None):
        return
    one, other = sides[fed].path, sides[1 - fed].path
    words = _LENGTHS["past" if lengths.seq is None else "seq"]
    number = lengths.past if lengths.seq is None else lengths.seq
    raise ModelError(
        f"{other} holds the prefix {list(before[fed].ids)}, which {one} would have to be fed, and {number} {words} are "
        "fixed, so that it fits in no run: verify the model as it was before its lengths were fixed"
    )


def on_feeds(
    a: ComparedDecoder,
    models: tuple[ir.Model, ir.Model],
    b: ComparedDecoder,
    feeds: Sequence[Feeds],
    own_feeds: Sequence[Feeds] | None,
) -> Sides:
    """Two decoders on feeds that were given, each one run; ``own_feeds`` are those of the second where they differ."""
    pairing = pair_decoders(models[0], a.inputs, models[1], b.inputs)
    if own_feeds is None:
        feeds, own_feeds = (list(turned(feeds, side.inputs, pairing, i)) for i, side in enumerate((a, b)))
    return Sides((a.path, b.path), pairing, *_on_feeds(pairing, feeds, own_feeds), decoder=not a.inputs.no_logits)


def of_others(
    paths: tuple[str | Path, str | Path], models: tuple[ir.Model, ir.Model], feeds: Sequence[Feeds] | None, seed: int
) -> Sides:
    """Two graphs that are no decoders, on feeds that were given or on random ones.

    Raises:
        FeedError: An input that cannot be drawn.
        ModelError: They do not take the same inputs, or have no pairs of outputs.
    """
    pairing = pair_others(paths[0], models[0], paths[1], models[1])
    feeds = feeds or random_feeds(models[0], _GENERIC_FEEDS, np.random.default_rng(seed))
    return Sides(paths, pairing, *_on_feeds(pairing, feeds, feeds))


def _on_feeds(pairing: Pairing, first: Sequence[Feeds], second: Sequence[Feeds]) -> tuple[Runs, Runs]:
    def runs(names: list[str], feeds: Sequence[Feeds]) -> Runs:
        def run(opening: Opening, **_unused: object) -> Iterator[Outputs]:
            return float_outputs(opening, names, feeds)

        return run

    return (
        runs([item.name for item in pairing.outputs], first),
        runs([item.other for item in pairing.outputs], second),
    )


def require_one_vocabulary(a: tuple[str | Path, int | None], b: tuple[str | Path, int | None]) -> None:
    """Refuse two models that predict different tokens.

    Args:
        a: The file of one, and its vocabulary, where that is known.
        b: The other's.

    Raises:
        ModelError: Their vocabularies are different.
    """
    if a[1] != b[1]:
        raise ModelError(
            f"{a[0]} has a vocabulary of {a[1]} and {b[0]} one of {b[1]}: these are different models; compare a model "
            "with what was made of it"
        )


def alike(
    path_a: str | Path, path_b: str | Path, models: tuple[ir.Model, ir.Model], *, known: bool
) -> tuple[ComparedDecoder, ComparedDecoder]:
    """Two decoders with one vocabulary.

    Args:
        path_a: The first one's file.
        path_b: The second one's.
        models: Both, loaded.
        known: Their inputs have to be known.

    Raises:
        FeedError: An input is not known.
        ModelError: Their vocabularies are different.
    """
    a = ComparedDecoder.read(path_a, models[0], known=known)
    # A graph may leave its cache's head_dim to a config file, which only the original has beside it.
    b = ComparedDecoder.read(path_b, models[1], head_dim=a.inputs.head_dim, known=known)
    require_one_vocabulary((path_a, a.inputs.vocab_size), (path_b, b.inputs.vocab_size))
    return a, b
