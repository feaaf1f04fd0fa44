"""Which of onnxruntime's execution providers sessions run on: the CPU, unless ``running_on`` says otherwise.

What a provider does not take of a graph, the CPU does: it always comes second.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from typing import Any

import onnx_ir as ir

from quarot_onnx.errors import ConfigError, ModelError, did_you_mean
from quarot_onnx.io.halves import HALVES

CPU = "CPUExecutionProvider"
_SUFFIX = "ExecutionProvider"

_PACKAGES = {
    "CUDA": "onnxruntime-gpu",
    "Tensorrt": "onnxruntime-gpu",
    "Dml": "onnxruntime-directml",
    "OpenVINO": "onnxruntime-openvino",
    "QNN": "onnxruntime-qnn",
    "MIGraphX": "onnxruntime-migraphx",
}
"""Builds of onnxruntime that bring a provider; each takes the place of the package onnxruntime."""

_EXACT = {"CUDA": {"use_tf32": "0"}, "OpenVINO": {"precision": "FP32"}}
"""What makes a provider compute 32-bit floats as such, unless it is told otherwise."""

_WITH_LIBRARIES = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
"""Providers whose libraries may come as Python packages, where the system's loader does not look."""


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: onnxruntime's name, such as ``CUDAExecutionProvider``.
        options: Its options.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, options: Sequence[str] = ()) -> "Provider":
        """A provider that is installed.

        Args:
            name: Short or whole, in any case: ``cuda``, ``CUDAExecutionProvider``.
            options: ``KEY=VALUE`` each.

        Raises:
            ConfigError: onnxruntime knows no such provider, or this build of it has none; an option without a value.
        """
        import onnxruntime as ort  # noqa: PLC0415 - a quarter of a second that most commands can do without

        there, known = ort.get_available_providers(), ort.get_all_providers()
        short = {full.removesuffix(_SUFFIX).lower(): full for full in known}
        full = short.get(name.lower().removesuffix(_SUFFIX.lower()))
        here = ", ".join(sorted(full.removesuffix(_SUFFIX).lower() for full in there))
        if full is None:
            raise ConfigError(f"no execution provider {name!r}{did_you_mean(name.lower(), short)}; here are: {here}")
        if full not in there:
            package = _PACKAGES.get(full.removesuffix(_SUFFIX))
            way = f"; `pip install {package}` in place of onnxruntime brings it" if package else ""
            raise ConfigError(f"{full} is not in this build of onnxruntime; here are: {here}{way}")
        given = dict(_pair(option) for option in options)
        if full == CPU and given:
            raise ConfigError(f"{next(iter(given))!r} is an option of a provider, and the CPU has none: name another")
        return cls(full, {**_EXACT.get(full.removesuffix(_SUFFIX), {}), **given})


def _pair(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not (key and equals):
        raise ConfigError(f"option {option!r} of a provider: give KEY=VALUE")
    return key, value


@cache
def load_libraries() -> None:
    """Load NVIDIA's libraries from the Python packages that hold them, where they are installed."""
    import onnxruntime as ort  # noqa: PLC0415 - as above

    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it says there what it did not find, and the system may have that
            ort.preload_dlls()


def _libraries(name: str) -> str:
    return " (`pip install onnxruntime-gpu[cuda,cudnn]` brings NVIDIA's)" if name in _WITH_LIBRARIES else ""


_current: ContextVar[Provider | None] = ContextVar("provider", default=None)


@contextmanager
def running_on(provider: Provider | None) -> Iterator[None]:
    """Let all sessions that are opened inside run on a provider; None leaves it as it is."""
    token = _current.set(_current.get() if provider is None else provider)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Provider:
    """The provider that sessions run on."""
    return _current.get() or Provider(CPU)


def record() -> dict[str, object]:
    """The provider, for what is recorded of a run; nothing of the CPU."""
    provider = current()
    return {} if provider.name == CPU else {"provider": {"name": provider.name, "options": dict(provider.options)}}


def version_record() -> dict[str, object]:
    """What computes: onnxruntime's version, of whatever package it came with, and the provider."""
    import onnxruntime as ort  # noqa: PLC0415 - as above

    return {"onnxruntime": ort.__version__, **record()}


def notes(model: ir.Model) -> tuple[str, ...]:
    """What to say of a model that is measured on the provider."""
    dtypes = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None}
    halves = sorted(dtype.name.lower() for dtype in dtypes & HALVES)
    if current().name == CPU or not halves:
        return ()
    name = current().name
    return (f"{name} may compute in {halves[0]} itself, where the CPU takes float32: all that was measured is of it",)


def refusal(error: Exception) -> str:
    """What onnxruntime says against a graph, in one line, and the way out where there is one."""
    reason = " ".join(str(error).split())
    if "bfloat16" not in reason and "NOT_IMPLEMENTED" not in reason:
        return reason
    return (
        f"{reason}; {current().name} has kernels for float32 and float16 first of all: export the model as one of them"
    )


def open_session(model: str | bytes, options: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` on the provider, and on the CPU for what that does not take.

    Args:
        model: A file, or a serialized model.
        options: An ``onnxruntime.SessionOptions``.

    Raises:
        ModelError: onnxruntime cannot start the provider. What else goes wrong is raised as onnxruntime does.
    """
    import onnxruntime as ort  # noqa: PLC0415 - as above

    provider = current()
    if provider.name == CPU:
        return ort.InferenceSession(model, options, providers=[CPU])
    if provider.name in _WITH_LIBRARIES:
        load_libraries()
    providers = [(provider.name, dict(provider.options)), CPU]
    session = ort.InferenceSession(model, options, providers=providers, enable_fallback=False)
    # Of one that does not start onnxruntime writes a line and takes the CPU all the same.
    if provider.name not in session.get_providers():
        raise ModelError(
            f"onnxruntime cannot start {provider.name}: look at its driver and libraries{_libraries(provider.name)}, "
            f"and at its options {dict(provider.options)}"
        )
    return session
