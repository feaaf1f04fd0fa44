"""What a decoder graph wants to be fed, and the feeds made from token ids.

The three exporters ask for different things of the same model: optimum for token ids, mask, positions and a cache;
onnxruntime-genai for no positions, with a cache whose head_dim is a symbol; torch.onnx for no cache at all.
``ModelInputs`` reads this off the graph and makes the feeds of a prefill (an empty cache) and of a decode step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.inputs import FLOATS, InputRole, TensorSpec, assign_roles, attention_shape, embedding_rows
from quarot_onnx.calibration.pairs import pair_presents
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.companions import read_json
from quarot_onnx.errors import CalibrationError, ModelError

_ORT_TYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(bool)": ir.DataType.BOOL,
}

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
        kv_heads: The KV heads of the cache where the graph leaves them symbolic, None where unknown.
        head_dim: The head_dim of the cache where the graph leaves it symbolic, None where unknown.
    """

    inputs: tuple[TensorSpec, ...]
    roles: Mapping[str, InputRole]
    presents: tuple[tuple[str, str], ...]
    logits: str
    vocab_size: int | None
    kv_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def from_path(cls, path: str | Path, *, head_dim: int | None = None) -> "ModelInputs":
        """Read from an ONNX file, its weights left on disk.

        Raises:
            ModelError: The file cannot be read, or an input is not known.
        """
        from quarot_onnx import model_io  # noqa: PLC0415 (a session needs no file)

        return cls.from_model(model_io.load(Path(path)), head_dim=head_dim, folder=Path(path).parent)

    @classmethod
    def from_model(
        cls, model: ir.Model, *, head_dim: int | None = None, folder: str | Path | None = None
    ) -> "ModelInputs":
        """Read from a graph.

        Args:
            model: The model.
            head_dim: The head_dim of the cache, if the graph leaves it symbolic and no config file tells.
            folder: Where genai_config.json or config.json may lie.

        Raises:
            ModelError: An input is not known.
        """
        graph = model.graph
        inputs = [TensorSpec.of(value) for value in graph.inputs if value.name not in graph.initializers]
        outputs = [TensorSpec.of(value) for value in graph.outputs]
        return cls._build(inputs, outputs, model, head_dim, folder)

    @classmethod
    def from_session(
        cls, session: Any, *, head_dim: int | None = None, folder: str | Path | None = None
    ) -> "ModelInputs":
        """Read from an ``onnxruntime.InferenceSession``; names decide where inputs look alike.

        Args:
            session: The session.
            head_dim: The head_dim of the cache, if the graph leaves it symbolic and no config file tells.
            folder: Where genai_config.json or config.json may lie.

        Raises:
            ModelError: An input is not known.
        """
        inputs, outputs = _session_specs(session.get_inputs()), _session_specs(session.get_outputs())
        return cls._build(inputs, outputs, None, head_dim, folder)

    @classmethod
    def _build(
        cls,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        model: ir.Model | None,
        head_dim: int | None,
        folder: str | Path | None,
    ) -> "ModelInputs":
        graph = None if model is None else model.graph
        logits = _logits(outputs)
        width = logits.shape[-1] if logits.shape else None
        vocab_size = width if isinstance(width, int) else None
        roles = assign_roles(inputs, vocab_size, graph)
        tokens = next((name for name, role in roles.items() if role is InputRole.TOKENS), None)
        if tokens is None:
            raise ModelError("the graph has no integer input [batch, sequence] for token ids: it is no language model")
        if vocab_size is None and graph is not None:
            vocab_size = embedding_rows(graph, tokens)
        pasts = [spec for spec in inputs if roles[spec.name] is InputRole.PAST]
        open_shape = any(not isinstance(length, int) for spec in pasts for length in (spec.shape or ())[1::2])
        kv_heads, width = attention_shape(model) if model is not None and open_shape else (None, None)
        if pasts and folder is not None:
            config = _config_shape(Path(folder))
            kv_heads, width = kv_heads or config[0], width or config[1]
        return cls(
            inputs=tuple(inputs),
            roles=roles,
            presents=pair_presents(pasts, outputs, graph),
            logits=logits.name,
            vocab_size=vocab_size,
            kv_heads=kv_heads,
            head_dim=head_dim or width,
        )

    @property
    def has_cache(self) -> bool:
        """Whether decode steps are possible."""
        return bool(self.presents)

    @property
    def tokens(self) -> str:
        """The name of the token id input."""
        return next(name for name, role in self.roles.items() if role is InputRole.TOKENS)

    def feed(
        self,
        token_ids: npt.NDArray[np.int64],
        past: Mapping[str, npt.NDArray[Any]] | None = None,
        past_length: int = 0,
    ) -> Feeds:
        """The feeds of one run.

        Args:
            token_ids: ``[batch, seq]``.
            past: The cache by past input name, each ``[batch, kv_heads, past, head_dim]``; None for an empty one.
            past_length: Tokens in ``past``; 0 takes it from the arrays.

        Returns:
            Input name to array, of the dtypes the graph declares.

        Raises:
            CalibrationError: Ids of a wrong shape or outside the vocabulary.
            ModelError: A cache dimension that nothing tells, or a cache type that NumPy cannot hold.
        """
        token_ids = self._checked(np.asarray(token_ids))
        batch, length = token_ids.shape
        if past and not past_length:
            past_length = next(iter(past.values())).shape[2]
        feeds: Feeds = {}
        for spec in self.inputs:
            match self.roles[spec.name]:
                case InputRole.TOKENS:
                    array: npt.NDArray[Any] = token_ids
                case InputRole.MASK:
                    array = np.ones((batch, past_length + length), np.int64)
                case InputRole.POSITIONS:
                    array = np.tile(np.arange(past_length, past_length + length), (batch, 1))
                case InputRole.PAST:
                    given = None if past is None else past.get(spec.name)
                    array = self._empty_past(spec, batch) if given is None else given
            feeds[spec.name] = array if array.dtype == spec.dtype.numpy() else array.astype(spec.dtype.numpy())
        return feeds

    def present_to_past(self, outputs: Mapping[str, npt.NDArray[Any]]) -> Feeds:
        """The cache for the next step.

        Args:
            outputs: Output name to array of a run; outputs other than presents are passed over.

        Returns:
            Past input name to array.
        """
        return {past: outputs[present] for past, present in self.presents}

    def _checked(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if token_ids.ndim != 2 or token_ids.size == 0 or not np.issubdtype(token_ids.dtype, np.integer):
            raise CalibrationError(
                f"token ids are {token_ids.dtype} {list(token_ids.shape)}: need integers [batch, sequence], not empty"
            )
        check_vocabulary(token_ids, self.vocab_size)
        spec = next(spec for spec in self.inputs if spec.name == self.tokens)
        for have, want in zip(token_ids.shape, spec.shape or (), strict=False):
            if isinstance(want, int) and want != have:
                raise CalibrationError(
                    f"token ids are {list(token_ids.shape)}, but {spec.name!r} takes {list(spec.shape or ())}: "
                    "export with free dimensions, or ask for that length"
                )
        return token_ids

    def _empty_past(self, spec: TensorSpec, batch: int) -> npt.NDArray[Any]:
        assert spec.shape is not None
        _, heads, length, width = spec.shape
        heads = heads if isinstance(heads, int) else self.kv_heads
        width = width if isinstance(width, int) else self.head_dim
        if isinstance(length, int) and length > 0:
            raise ModelError(f"the cache {spec.name!r} has the fixed length {length}: export it with a free length")
        if heads is None or width is None:
            raise ModelError(
                f"the cache {spec.name!r} leaves {list(spec.shape[1:])} open: give head_dim, or put the exporter's "
                "genai_config.json or config.json beside the model"
            )
        if spec.dtype == ir.DataType.BFLOAT16:
            raise ModelError(f"the cache {spec.name!r} is bfloat16, which onnxruntime cannot take from NumPy")
        return np.zeros((batch, heads, 0, width), spec.dtype.numpy())


def _session_specs(arguments: Sequence[Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            argument.name,
            _ORT_TYPES.get(argument.type, ir.DataType.UNDEFINED),
            None if argument.shape is None else tuple(argument.shape),
        )
        for argument in arguments
    ]


def _logits(outputs: Sequence[TensorSpec]) -> TensorSpec:
    named = [spec for spec in outputs if spec.name == "logits"]
    shaped = [spec for spec in outputs if spec.rank == 3 and spec.dtype in FLOATS]
    found = named or shaped or [spec for spec in outputs if spec.rank is None]
    if not found:
        raise ModelError("the graph has no float output [batch, sequence, vocabulary]: it is no language model")
    return found[0]


def _config_shape(folder: Path) -> tuple[int | None, int | None]:
    """``(kv_heads, head_dim)`` as genai_config.json or config.json beside the model tells them."""
    genai = read_json(folder / "genai_config.json", ModelError).get("model", {}).get("decoder", {})
    if genai.get("head_size"):
        return genai.get("num_key_value_heads"), genai["head_size"]
    config = read_json(folder / "config.json", ModelError)
    heads = config.get("num_attention_heads")
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads and "hidden_size" in config else None)
    return config.get("num_key_value_heads", heads), width
