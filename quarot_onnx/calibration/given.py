"""Feeds that a user gives, where a rule cannot know what a graph wants: read, and checked against its inputs."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.inputs import TensorSpec
from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.io.links import refuse_broken

FeedsSource = str | Path | Mapping[str, npt.NDArray[Any]] | Sequence[Mapping[str, npt.NDArray[Any]]]
"""An .npz file (one feed, each array as the input takes it), a folder of such files, or arrays by input name."""


def given_feeds(source: FeedsSource, model: ir.Model) -> list[Feeds]:
    """Feeds of a user.

    Args:
        source: Where they are.
        model: The model that they are for.

    Returns:
        One or more feeds that name every input without a default, in the types and shapes that the graph declares.

    Raises:
        CalibrationError: They cannot be read, name something else, leave an input out, or do not fit it.
    """
    found: list[tuple[str, Feeds]]
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            refuse_broken(path.absolute(), CalibrationError)
            raise CalibrationError(f"no .npz file at {path}: save one with numpy.savez(path, name=array)")
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not files:
            raise CalibrationError(f"{path} holds no .npz file: save one with numpy.savez(path, name=array)")
        found = [(str(file), load_npz(file)) for file in files]
    else:
        given = [source] if isinstance(source, Mapping) else list(source)
        found = [(f"feeds[{i}]", {k: np.asarray(v) for k, v in feeds.items()}) for i, feeds in enumerate(given)]
        if not found:
            raise CalibrationError("feeds is empty: give arrays by input name, or leave it out")
    for where, feeds in found:
        _check(where, feeds, model)
    return [feeds for _, feeds in found]


def _check(where: str, feeds: Feeds, model: ir.Model) -> None:
    """Refuse a feed that does not fit the model's inputs."""
    specs = {value.name or "": TensorSpec.of(value) for value in model.graph.inputs}
    for name in feeds:
        if name not in specs:
            raise CalibrationError(f"{where}: {name!r} is no input of the model{did_you_mean(name, specs)}")
    for name, spec in specs.items():
        if name in feeds:
            _check_array(where, feeds[name], spec)
        elif name not in model.graph.initializers:
            raise CalibrationError(f"{where} has no array for the input {_described(spec)}{did_you_mean(name, feeds)}")


def _check_array(where: str, array: npt.NDArray[Any], spec: TensorSpec) -> None:
    """Refuse an array of another type, rank or fixed length."""
    wrong_type = spec.dtype is not ir.DataType.UNDEFINED and array.dtype != spec.dtype.numpy()
    shape = spec.shape if spec.shape is not None else array.shape
    wrong_shape = len(shape) != array.ndim or any(
        isinstance(want, int) and want != have for want, have in zip(shape, array.shape, strict=True)
    )
    if wrong_type or wrong_shape:
        what = f"{array.dtype} {list(array.shape)}"
        raise CalibrationError(f"{where}: {spec.name!r} is {what}, but the input is {_described(spec)}")


def _described(spec: TensorSpec) -> str:
    return f"{spec.name!r} ({spec.dtype.name} {list(spec.shape or ())})"


def load_npz(path: Path) -> Feeds:
    """The arrays of an .npz file by name.

    Raises:
        CalibrationError: No such file, no archive, or no arrays.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise CalibrationError(f"{path} is no .npz archive: save the arrays with numpy.savez(path, name=array)")
        with np.load(path, allow_pickle=False) as archive:
            feeds = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        refuse_broken(path.absolute(), CalibrationError)
        raise CalibrationError(f"no calibration data at {path}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} is no readable .npz archive: {error}") from error
    if not feeds:
        raise CalibrationError(f"{path} holds no arrays")
    return feeds
