"""Folders built once, kept in pytest's cache and shared by runs, processes and tests."""

import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import filelock

CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "exports"
PACKAGES = ("torch", "transformers", "optimum-onnx", "onnxscript", "onnx", "onnx-ir")


def cached(name: str, parameters: dict[str, Any], build: Callable[[Path], None], sources: Iterable[Path]) -> Path:
    """The folder that ``build`` fills, built once for all runs and processes.

    Args:
        name: Readable first part of the folder's name.
        parameters: What the result depends on, JSON-serialisable.
        build: Fills the empty folder it is given.
        sources: Files whose text the result depends on.

    Returns:
        The folder; read only.
    """
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for package in PACKAGES:
        digest.update(f"{package}=={importlib.metadata.version(package)}\n".encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(CACHE / f"{name}.lock"):
        if not folder.is_dir():
            for older in CACHE.glob(f"{name}-" + "[0-9a-f]" * 16):
                if parameters == _parameters(older):
                    shutil.rmtree(older, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                model = Path(scratch) / "model"
                model.mkdir()
                with silence():
                    build(model)
                (model / "parameters.json").write_text(json.dumps(parameters))
                model.rename(folder)
    return folder


def _parameters(folder: Path) -> Any:
    path = folder / "parameters.json"
    return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def silence() -> Iterator[None]:
    """Exporters warn and print about their own internals; none of it is about the code under test."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
