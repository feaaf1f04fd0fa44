"""What a decoder graph wants to be fed, and the feeds made from token ids.

The three exporters ask for different things of the same model: optimum for token ids, mask, positions and a cache;
onnxruntime-genai for no positions, with a cache whose head_dim is a symbol; torch.onnx for no cache at all. Others fix
the lengths, take numbers, or embeddings in place of ids. ``ModelInputs`` reads this off the graph and makes the feeds
of a prefill (an empty cache) and of a decode step. Embeddings are drawn at random, the same ones for the same id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.inputs import (
    InputRole,
    TensorSpec,
    attention_shape,
    config_shape,
    embedding_rows,
    embedding_shape,
    find_logits,
    logits_output,
    position_axis,
)
from quarot_onnx.calibration.lengths import EMBEDDINGS, Filling, Lengths, embedding_table, made, repeated
from quarot_onnx.calibration.pairs import check_layout, pair_presents
from quarot_onnx.calibration.roles import assign_roles
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.errors import CalibrationError, FeedError, ModelError
from quarot_onnx.graph.caches import IntegerCache, reads_integers
from quarot_onnx.piecewise.sweep import Carried
from quarot_onnx.sessions.carrying import INSTEAD, dropped

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of a decoder graph with their roles, and the outputs that matter.

    Attributes:
        inputs: The required inputs, in graph order.
        roles: What each is for, by name.
        presents: Pairs (past input, present output); empty for a graph without a cache.
        logits: The name of the output ``[batch, seq, vocab]``.
        vocab_size: The width of the logits or the height of the embedding table, None where neither is known.
        no_logits: Why ``logits`` holds no predictions of tokens, but hidden states or labels; empty where it does.
        kv_heads: The KV heads of the cache where the graph leaves them symbolic, None where unknown.
        head_dim: The head_dim of the cache where the graph leaves it symbolic, None where unknown.
        lengths: What the graph fixes.
        integers: Where GroupQueryAttention reads its cache, if it keeps integers.
    """

    inputs: tuple[TensorSpec, ...]
    roles: Mapping[str, InputRole]
    presents: tuple[tuple[str, str], ...]
    logits: str
    vocab_size: int | None
    kv_heads: int | None = None
    head_dim: int | None = None
    lengths: Lengths = field(default_factory=Lengths)
    integers: IntegerCache | None = None
    no_logits: str = ""

    @classmethod
    def from_path(cls, path: str | Path, *, head_dim: int | None = None) -> "ModelInputs":
        """Read from an ONNX file, its weights left on disk.

        Raises:
            FeedError: An input is not known.
            ModelError: The file cannot be read, or the graph is no language model.
        """
        from quarot_onnx.io import model_io  # noqa: PLC0415 - a model in memory needs no file

        return cls.from_model(model_io.load(Path(path)), head_dim=head_dim, folder=Path(path).parent)

    @classmethod
    def from_model(
        cls, model: ir.Model, *, head_dim: int | None = None, folder: str | Path | None = None, known: bool = True
    ) -> "ModelInputs":
        """Read from a graph.

        Args:
            model: The model.
            head_dim: The head_dim of the cache, if the graph leaves it symbolic and no config file tells.
            folder: Where genai_config.json or config.json may lie.
            known: Every input has to be known; otherwise nothing can be fed but what the caller brings.

        Raises:
            FeedError: An input is not known, or the layout of a cache.
            ModelError: The graph is no language model.
        """
        graph = model.graph
        inputs = [TensorSpec.of(value) for value in graph.inputs if value.name not in graph.initializers]
        outputs = [TensorSpec.of(value) for value in graph.outputs]
        roles = assign_roles(inputs, logits_output(outputs).width, graph)
        kinds = {role: name for name, role in roles.items()}
        if known and InputRole.UNKNOWN in kinds:
            raise _unknown(next(spec for spec in inputs if roles[spec.name] is InputRole.UNKNOWN))
        tokens = kinds.get(InputRole.TOKENS)
        if tokens is None and InputRole.EMBEDDINGS not in kinds:
            raise ModelError("the graph has no integer input [batch, sequence] for token ids: it is no language model")
        logits, no_logits = find_logits(outputs, None if tokens is None else embedding_shape(graph, tokens))
        vocab_size = None if no_logits else logits.width
        if vocab_size is None and tokens is not None:
            vocab_size = embedding_rows(graph, tokens)
        pasts = [spec for spec in inputs if roles[spec.name] is InputRole.PAST]
        pairs = pair_presents(pasts, outputs, graph)
        if known:
            check_layout(pairs, pasts, outputs)
        open_shape = any(_open_axes(spec) for spec in pasts)
        kv_heads, width = attention_shape(model) if open_shape else (None, None)
        if pasts and folder is not None:
            config = config_shape(Path(folder))
            kv_heads, width = kv_heads or config[0], width or config[1]
        return cls(
            inputs=tuple(inputs),
            roles=roles,
            presents=pairs,
            logits=logits.name,
            vocab_size=vocab_size,
            kv_heads=kv_heads,
            head_dim=head_dim or width,
            lengths=Lengths.read(inputs, roles, outputs, graph),
            integers=reads_integers(model),
            no_logits=no_logits,
        )

    @property
    def has_cache(self) -> bool:
        """Whether decode steps are possible, with the graph and on this provider."""
        return bool(self.presents) and self.lengths.past != 0 and not self.dropped

    @property
    def dropped(self) -> str:
        """Why the cache is lost between runs here, whatever the graph says; empty where it is not."""
        return "" if self.integers is None else dropped(self.integers.dtype)

    def refuse_dropped(self, past_length: int = 0) -> None:
        """Refuse to go on with a cache that would be lost, be it that of a prefix in the graph.

        Raises:
            ModelError: It would.
        """
        if (past_length or (self.integers is not None and self.integers.made)) and self.dropped:
            raise ModelError(f"{self.dropped}; {INSTEAD}")

    @property
    def main(self) -> TensorSpec:
        """The input of token ids, or of embeddings in their place."""
        return next(spec for spec in self.inputs if self.roles[spec.name] in (InputRole.TOKENS, InputRole.EMBEDDINGS))

    @property
    def tokens(self) -> str:
        """The name of the token id input, or of the one that takes embeddings in their place."""
        return self.main.name

    @property
    def takes_ids(self) -> bool:
        """Whether it is ids that the graph takes, so that a text can be fed."""
        return self.roles[self.main.name] is InputRole.TOKENS

    @property
    def id_range(self) -> int:
        """Ids below it are safe to feed."""
        return self.vocab_size or (2 if self.takes_ids else EMBEDDINGS)

    def feed(
        self,
        token_ids: npt.NDArray[np.int64],
        past: Mapping[str, npt.NDArray[Any]] | None = None,
        past_length: int = 0,
    ) -> Feeds:
        """The feeds of one run.

        Args:
            token_ids: ``[batch, seq]``; where the graph fixes the batch, rows are repeated to fill it.
            past: The cache by past input name, ``[batch, kv_heads, past, head_dim]`` or as the graph says; None for an
                empty one. Fewer rows than are fed are repeated, as those of the ids are.
            past_length: Tokens in ``past``; 0 takes it from the arrays.

        Returns:
            Input name to array, of the dtypes the graph declares.

        Raises:
            CalibrationError: Ids of a wrong shape or outside the vocabulary.
            ModelError: A cache dimension that nothing tells, a cache type that NumPy cannot hold, or a cache that the
                provider loses.
        """
        token_ids = self._checked(np.asarray(token_ids))
        batch, length = token_ids.shape
        if past and not past_length:
            past_length = next(past[name].shape[self._axis(name)] for name, _ in self.presents if name in past)
        self.refuse_dropped(past_length)
        filling = Filling.of(self.lengths, batch, length, past_length)
        feeds: Feeds = {}
        for spec in self.inputs:
            match self.roles[spec.name]:
                case InputRole.TOKENS:
                    array: npt.NDArray[Any] = token_ids
                case InputRole.EMBEDDINGS:
                    assert spec.shape is not None
                    assert isinstance(spec.shape[2], int), "or it has another role"
                    array = embedding_table(spec.shape[2])[token_ids % EMBEDDINGS]
                case InputRole.PAST:
                    given = None if past is None else past.get(spec.name)
                    array = self._empty_past(spec, batch) if given is None else repeated(given, batch)
                case role:
                    array = made(spec, role, filling, past_length)
            feeds[spec.name] = array if array.dtype == spec.dtype.numpy() else array.astype(spec.dtype.numpy())
        return feeds

    def carried(self, feeds: Feeds) -> dict[str, Carried]:
        """The pasts of a run that are the cache of the run before.

        Args:
            feeds: What is fed otherwise, for the types.

        Returns:
            By past input name; of a cache of fixed length the columns that fit, the newest.
        """
        return {past: Carried(present, feeds[past].dtype, self._room(past)) for past, present in self.presents}

    def present_to_past(self, outputs: Mapping[str, npt.NDArray[Any]]) -> Feeds:
        """The cache for the next step.

        Args:
            outputs: Output name to array of a run; outputs other than presents are passed over.

        Returns:
            Past input name to array; of a cache of fixed length the columns that fit, the newest.
        """
        return {past: outputs[present][self._room(past)] for past, present in self.presents}

    def _room(self, past: str) -> tuple[slice, ...]:
        """What of a present is the next past."""
        room = self.lengths.past
        if room is None:
            return ()
        columns = slice(0, room) if self.lengths.in_place else slice(-room, None)
        return (*(slice(None),) * self._axis(past), columns)

    def _axis(self, past: str) -> int:
        """The axis of the positions of a past input."""
        shape = next(spec.shape for spec in self.inputs if spec.name == past)
        assert shape is not None, "or it has another role"
        return position_axis(shape)

    def _checked(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if token_ids.ndim != 2 or token_ids.size == 0 or not np.issubdtype(token_ids.dtype, np.integer):
            raise CalibrationError(
                f"token ids are {token_ids.dtype} {list(token_ids.shape)}: need integers [batch, sequence], not empty"
            )
        if self.takes_ids:
            check_vocabulary(token_ids, self.vocab_size)
        rows, length = self.lengths.batch or len(token_ids), self.lengths.seq
        if len(token_ids) > rows or length not in (None, token_ids.shape[1]):
            raise CalibrationError(
                f"token ids are {list(token_ids.shape)}, but {self.main.name!r} takes {list(self.main.shape or ())}: "
                "feed that length, or export with free dimensions"
            )
        return np.resize(token_ids, (rows, token_ids.shape[1]))

    def _empty_past(self, spec: TensorSpec, batch: int) -> npt.NDArray[Any]:
        assert spec.shape is not None
        told = {axis: self.head_dim if axis == 3 else self.kv_heads for axis in _open_axes(spec)}
        if None in told.values():
            raise FeedError(
                f"the cache {spec.name!r} leaves {list(spec.shape[1:])} open: put the exporter's genai_config.json or "
                "config.json beside the model (in Python, give head_dim)"
            )
        if spec.dtype == ir.DataType.BFLOAT16:
            raise ModelError(f"the cache {spec.name!r} is bfloat16, which onnxruntime cannot take from NumPy")
        if (width := told.get(3)) is not None and spec.dtype == ir.DataType.UINT8:
            told[3] = width // 2  # two values of 4 bits to a byte, as GroupQueryAttention packs them
        told |= {0: batch, position_axis(spec.shape): self.lengths.past or 0}
        shape = (told.get(axis, dim) for axis, dim in enumerate(spec.shape))
        return np.zeros([length for length in shape if isinstance(length, int)], spec.dtype.numpy())


def _open_axes(spec: TensorSpec) -> list[int]:
    """The axes of a cache that the graph leaves open, besides those of rows and positions."""
    shape = spec.shape or ()
    return [
        axis for axis, dim in enumerate(shape) if not isinstance(dim, int) and axis not in (0, position_axis(shape))
    ]


def _unknown(spec: TensorSpec) -> FeedError:
    """The error for an input that no rule feeds."""
    return FeedError(
        f"input {spec.name!r} ({spec.dtype.name} {list(spec.shape or ())}) is not known: a decoder takes token ids or "
        "embeddings, a mask, positions, lengths and a KV cache"
    )
