"""onnxruntime sessions: threads, graph optimization, custom operators, one-line errors.

onnxruntime is imported when a session is made, not with this module.
"""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from quarot_onnx.errors import MissingPackageError, ModelError
from quarot_onnx.io import wire
from quarot_onnx.io.external import damaged, model_file
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.processor import EXACT_PRODUCTS
from quarot_onnx.sessions.providers import open_session, refusal
from quarot_onnx.threads import as_many_as_help, asked_for

if TYPE_CHECKING:
    import onnxruntime as ort

_EXTENSION_DOMAINS = frozenset({"ai.onnx.contrib", "com.microsoft.extensions"})
_EXTERNAL_FROM = "1024"
"""Bytes of a weight that goes into the data file."""

_FATAL = 4  # severity of the log: every error below is raised as an exception, once is enough


def session(
    path: str | Path,
    *,
    threads: int | None = None,
    optimize: bool = True,
    optimized_path: Path | None = None,
    low_memory: bool = False,
    exact_products: bool = False,
    timed: bool = False,
) -> "ort.InferenceSession":
    """A session on a model file, on the provider of ``running_on``.

    Args:
        path: The ``.onnx`` file.
        threads: Threads within an operator; None: as ``limited_to`` says, or else one per core.
        optimize: Whether onnxruntime rewrites the graph.
        optimized_path: Where onnxruntime writes the rewritten graph.
        low_memory: Do not copy the weights into packed form: half the memory, slower.
        exact_products: Compute 8-bit products without saturation where the processor's fast way has it, slower.
        timed: Its runs follow each other, and how long they take counts, as where text is generated.

    Raises:
        ModelError: If onnxruntime cannot load it.
        MissingPackageError: If it uses onnxruntime-extensions and that is not installed.
    """
    source = model_file(path)
    options = session_options(
        _domains(source),
        threads=threads,
        optimize=optimize,
        optimized_path=optimized_path,
        low_memory=low_memory,
        exact_products=exact_products,
        timed=timed,
    )
    return _open(str(source), options)


def write_optimized(path: str | Path, target: Path, data_name: str, *, exact_products: bool = False) -> None:
    """Write a model as onnxruntime rewrites it for this processor, its weights packed for the CPU's kernels as well.

    Args:
        path: The ``.onnx`` file.
        target: The ``.onnx`` file to write, in an existing folder.
        data_name: The file of the weights, beside it; there is none where all are small.
        exact_products: As for ``session``; it cannot be had later, of a graph that is rewritten already.

    Raises:
        ModelError: If onnxruntime cannot load it.
        OSError: If it cannot write the weights.
        MissingPackageError: If it uses onnxruntime-extensions and that is not installed.
    """
    source = model_file(path)
    options = session_options(_domains(source), optimized_path=target, exact_products=exact_products)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", data_name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    try:
        _open(str(source), options)
    except ModelError as error:
        if "Failed to write" in str(error):  # the weights; what it says of the model file is another exception
            raise OSError("onnxruntime failed to write weights") from error
        raise


def _domains(source: Path) -> frozenset[str]:
    """The operator domains that a file imports."""
    try:
        return wire.imported_domains(source)
    except (wire.WireError, ValueError) as error:
        raise damaged(source, str(error)) from error


def graph_domains(model: ir.Model) -> frozenset[str]:
    """The operator domains that a model imports or uses, in subgraphs too; ``""`` is the standard one."""
    used = {node.domain for node in all_nodes(model.graph)}
    return frozenset(used | set(model.opset_imports))


def session_options(
    domains: frozenset[str],
    *,
    threads: int | None = None,
    optimize: bool = True,
    optimized_path: Path | None = None,
    low_memory: bool = False,
    exact_products: bool = False,
    timed: bool = False,
) -> "ort.SessionOptions":
    """Options of a session; the operators of onnxruntime-extensions are registered where ``domains`` has them.

    Args:
        domains: The operator domains of the model.
        threads: As for ``session``.
        optimize: As for ``session``.
        optimized_path: As for ``session``.
        low_memory: As for ``session``.
        exact_products: As for ``session``.
        timed: As for ``session``.

    Raises:
        MissingPackageError: If the model uses onnxruntime-extensions and that is not installed.
    """
    import onnxruntime as ort  # noqa: PLC0415 - a quarter of a second that most commands can do without

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    if threads is None:
        threads = asked_for()
    if threads is not None:
        options.intra_op_num_threads = as_many_as_help(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not timed:
        # Most operators of a graph take one thread, and between two runs NumPy works on the same cores: threads that
        # spin until there is more to do take as much processor time as those that work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact_products:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    if custom := sorted(domains & _EXTENSION_DOMAINS):
        options.register_custom_ops_library(_extensions(custom[0]).get_library_path())
    return options


def _extensions(domain: str) -> ModuleType:
    """The onnxruntime-extensions package."""
    try:
        import onnxruntime_extensions  # noqa: PLC0415 - optional
    except ImportError as error:
        raise MissingPackageError(
            f"the model uses operators of the domain {domain!r}; `pip install onnxruntime-extensions` brings them"
        ) from error
    module: ModuleType = onnxruntime_extensions
    return module


def _open(model: str, options: "ort.SessionOptions") -> "ort.InferenceSession":
    try:
        return open_session(model, options)
    except _load_errors() as error:
        raise ModelError(f"onnxruntime cannot load {model}: {refusal(error)}") from error


def _load_errors() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime; they share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    members: list[Any] = list(vars(state).values())
    return (RuntimeError, *(kind for kind in members if isinstance(kind, type) and issubclass(kind, Exception)))
