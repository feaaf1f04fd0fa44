"""Architectures that optimum does not list: exported as it exports a Llama, and compared with the model in torch.

Most decoders differ from those on the list in nothing that a trace depends on. Which of them do is found out where it
counts: the export computes what the model does in torch, with padding and without, whole and through its cache, or it
is refused.
"""

# ruff: noqa: PLC0415

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quarot_onnx.export.loading import ELSEWHERE, TASK, RefusalError, one_line
from quarot_onnx.sessions import runtime

PASSED_ON = (OSError, ImportError, MemoryError)
"""Errors that are not of the model."""

_SHORT = 48
"""More than the positions of the trace: what it has frozen to theirs is seen."""
_LAST = 16
_STEPS = 2
_PADDING = 3
_SKIPPING = {"DbrxExperts"}
"""Modules that pass over experts in a way that `tracing` does not see."""
_WINDOW = 512
"""Sliding windows up to so long are filled by the text that is compared, which longer ones would make slow."""
_TOLERANCES: dict[str, tuple[Callable[[np.ndarray], Any], float]] = {
    "float32": (np.max, 1e-3),
    "float16": (np.median, 5e-2),
}
"""What the logits of tokens may differ by, relative to their own root mean square: of all tokens, or in 16 bits, whose
rounding sends some to other experts, of most."""

_Heads = tuple[tuple[int, int], tuple[int, int]]
"""Of a layer: heads and head size of keys, and of values."""


def is_listed(model_type: str) -> bool:
    """Whether optimum exports an architecture with its cache."""
    from optimum.exporters.onnx import main_export  # noqa: F401 -- what registers the architectures
    from optimum.exporters.tasks import TasksManager

    return model_type in TasksManager.get_supported_model_type_for_task(TASK, exporter="onnx")


@dataclass(frozen=True)
class Text:
    """Tokens, and what the model in torch makes of them.

    Args:
        ids: (B, T) tokens.
        mask: (B, T) 1 for tokens and 0 for padding.
        logits: (B, N, V) of the last positions, float32.
    """

    ids: np.ndarray
    mask: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """What a model in torch makes of a few texts: what its export is compared with.

    Args:
        source: The model's files, for messages.
        model_type: Its architecture.
        dtype: float32 or float16.
        texts: Two rows, the second with padding in front; the first row alone; its first token alone, for which a
            mixture of experts chooses fewer than it has.
        caches: ((H, Dk), (H, Dv)) of each layer.
        options: What optimum is to be told for the export.
    """

    source: Path
    model_type: str
    dtype: str
    texts: list[Text]
    caches: list[_Heads]
    options: dict[str, Any]

    def check(self, folder: Path) -> str:
        """Compare the export in ``folder``.

        Returns:
            A note on how it was exported and how far it is from the model.

        Raises:
            RefusalError: It computes something else.
        """
        try:
            session = runtime.session(folder / "model.onnx", low_memory=True)
            worst = float(np.max([self._distance(session, text) for text in self.texts]))  # NaN stays NaN
        except PASSED_ON:
            raise
        except Exception as error:
            reason = f"an export like a Llama's does not run ({one_line(error)})"
            raise refusal(self.source, self.model_type, reason) from error
        tolerance = _TOLERANCES[self.dtype][1]
        if not worst <= tolerance:
            reason = (
                f"an export like a Llama's computes something else (its logits are off by {worst:.1e}, more than "
                f"{tolerance:.0e})"
            )
            raise refusal(self.source, self.model_type, reason)
        return (
            f"optimum does not export the architecture {self.model_type!r} with a cache: it was exported as a Llama "
            f"is, and compared with the model in torch on {self.texts[0].ids.shape[1]} tokens, with padding and "
            f"without, whole and through the cache, where logits differ by {worst:.1e}"
        )

    def _distance(self, session: Any, text: Text) -> float:
        """How far the logits of a text are from those of the model, the last tokens taken through the cache."""
        outputs = [value.name for value in session.get_outputs()]
        takes = {value.name for value in session.get_inputs()}
        (batch, length), places = text.ids.shape, positions(text.mask)
        past: dict[str, Any] = {
            f"past_key_values.{layer}.{part}": np.zeros((batch, heads, 0, size), self.dtype)
            for layer, parts in enumerate(self.caches)
            for part, (heads, size) in zip(("key", "value"), parts, strict=True)
        }
        of_tokens, worst, start = _TOLERANCES[self.dtype][0], [], 0
        known = length - text.logits.shape[1]  # where logits begin
        for stop in sorted({max(length - behind, 1) for behind in (_STEPS, 1, 0)}):
            feeds = {"input_ids": text.ids[:, start:stop], "attention_mask": text.mask[:, :stop]}
            feeds |= {"position_ids": places[:, start:stop], **past}
            gave = dict(zip(outputs, session.run(None, {name: feeds[name] for name in takes}), strict=True))
            past = {name.replace("present", "past_key_values"): value for name, value in gave.items()}
            begin = max(start, known)
            found, wanted = past.pop("logits")[:, begin - start :], text.logits[:, begin - known : stop - known]
            worst.append(float(of_tokens(_distances(found, wanted))))
            start = stop
        return float(np.max(worst))


def _distances(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B, T) how far logits (B, T, V) are from those wanted."""
    squares: np.ndarray = np.mean((found.astype(np.float32) - wanted) ** 2, axis=2) / np.mean(wanted**2, axis=2)
    return squares**0.5


def refusal(source: Path, model_type: str, reason: str) -> RefusalError:
    """The error where a model of an architecture that optimum does not list is not exported."""
    return RefusalError(
        f"{source} is of architecture {model_type!r}, which optimum does not export with a cache, and {reason}; "
        f"{ELSEWHERE}"
    )


def positions(mask: np.ndarray) -> np.ndarray:
    """(B, T) the positions of tokens, from a mask (B, T) that is 0 for the padding in front."""
    counts: np.ndarray = np.cumsum(mask, axis=1)
    return (counts - 1).clip(min=0)


def prepare(source: Path, model: Any) -> Comparison:
    """What it takes to export a model of an architecture that optimum does not list.

    Args:
        source: The model's files, for messages.
        model: A causal language model in torch.

    Returns:
        What optimum is told, and what the export is compared with.

    Raises:
        RefusalError: It has no cache of keys and values.
    """
    model_type = model.config.model_type
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = max(_SHORT, window + _LAST if window <= _WINDOW else 0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, length))
    mask = np.ones_like(ids)
    mask[1, :_PADDING] = 0
    try:
        texts = [_asked(model, ids, mask), _asked(model, ids[:1], mask[:1]), _asked(model, ids[:1, :1], mask[:1, :1])]
        caches = _caches(model)
    except PASSED_ON:
        raise
    except Exception as error:
        raise refusal(source, model_type, f"it does not run in torch ({one_line(error)})") from error
    if caches is None or len(caches) != config.num_hidden_layers:
        raise refusal(source, model_type, "it does not keep keys and values, and nothing else, in each of its layers")
    if any(type(module).__name__ in _SKIPPING for module in model.modules()):
        raise refusal(source, model_type, "a trace leaves out the experts that none of its tokens chooses")
    options = {"custom_onnx_configs": {"model": _configuration(model, caches)}}
    return Comparison(source, model_type, str(model.dtype).removeprefix("torch."), texts, caches, options)


def _asked(model: Any, ids: np.ndarray, mask: np.ndarray) -> Text:
    """A text, and what the model makes of it."""
    import torch

    feeds = {"input_ids": ids, "attention_mask": mask}
    if _takes_positions(model):
        feeds["position_ids"] = positions(mask)
    more: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = _LAST
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}, **more)
    return Text(ids, mask, output.logits[:, -_LAST:].float().numpy())


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _caches(model: Any) -> list[_Heads] | None:
    """Those of each layer, or None where there are none, or others beside them."""
    import torch

    with torch.no_grad():
        output = model(torch.zeros((1, 1), dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if not layers:
        return None
    found = []
    for layer in layers:
        shapes = [tuple(getattr(getattr(layer, name, None), "shape", ())) for name in ("keys", "values")]
        if any(len(shape) != 4 or shape[2] != 1 for shape in shapes):
            return None
        (_, key_heads, _, key_size), (_, value_heads, _, value_size) = shapes
        found.append(((key_heads, key_size), (value_heads, value_size)))
    return found


def _configuration(model: Any, caches: list[_Heads]) -> Any:
    """What optimum is told of a Llama's export, for caches of these sizes."""
    from optimum.exporters.onnx.config import TextDecoderOnnxConfig
    from optimum.exporters.onnx.model_configs import TextDecoderWithPositionIdsOnnxConfig
    from optimum.utils import DummyPastKeyValuesGenerator, DummyTextInputGenerator, NormalizedTextConfig

    class Past(DummyPastKeyValuesGenerator):  # type: ignore[misc]
        def generate(self, _name: str, framework: str = "pt", int_dtype: str = "", float_dtype: str = "fp32") -> Any:
            del int_dtype
            return [
                tuple(
                    self.random_float_tensor(
                        (self.batch_size, heads, self.sequence_length, size), framework=framework, dtype=float_dtype
                    )
                    for heads, size in parts
                )
                for parts in caches
            ]

    base = TextDecoderWithPositionIdsOnnxConfig if _takes_positions(model) else TextDecoderOnnxConfig

    class Config(base):  # type: ignore[misc, valid-type]
        DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, Past)
        DUMMY_PKV_GENERATOR_CLASS = Past
        NORMALIZED_CONFIG_CLASS = NormalizedTextConfig

    dtype = f"fp{8 * model.dtype.itemsize}"
    return Config(model.config, task="text-generation", float_dtype=dtype, use_past=True, use_past_in_inputs=True)
