"""Recipe files, read: ours or LLMC's, told apart by their keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarot_onnx.config.choices import Scheme
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.files import FileConfig
from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.recipes.llmc import LlmcWording, as_own
from quarot_onnx.recipes.llmc_file import TOP_KEYS, LlmcFile
from quarot_onnx.recipes.own import Recipe
from quarot_onnx.recipes.wording import Wording

_SHIPPED = Path(__file__).with_name("shipped")


@dataclass(frozen=True)
class Loaded:
    """A recipe file.

    Attributes:
        source: The file.
        data: What it sets, under our own keys, as plain data.
        folder: The folder against which relative paths in ``data`` are resolved.
        wording: How messages speak of its keys.
        notes: What a user should know whatever the command.
        calibration_notes: What a user should know where something is calibrated.
        save_path: Where the file would have the result.
        second_step: The file quantizes models that another one rotates.
        online_rotate: What a second step says of the first one's R4.
        only_rotates: The file asks for the rotated model and no more.
    """

    source: Path
    data: Mapping[str, Any]
    folder: Path
    wording: Wording
    notes: tuple[str, ...] = ()
    calibration_notes: tuple[str, ...] = ()
    save_path: Path | None = None
    second_step: bool = False
    online_rotate: bool | None = None
    only_rotates: bool = False


class _Content(FileConfig):
    """Any mapping in a file, before it is known whose it is."""

    content: dict[Any, Any]

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"content": data}


def shipped(scheme: Scheme) -> Mapping[str, Any]:
    """A recipe that comes with the package, under our own keys, as plain data."""
    return _Content.load(_SHIPPED / f"{scheme}.yaml").content


def scheme_of(path: Path | None) -> Scheme | None:
    """The shipped recipe that a path names; such names have no suffix, as no file of a recipe is without."""
    return next((scheme for scheme in Scheme if str(path) == scheme), None)


def load(path: Path) -> Loaded:
    """Read a recipe.

    Args:
        path: A ``.yaml``, ``.yml`` or ``.json`` file; or the name of one that is shipped.

    Raises:
        ConfigError: It cannot be read, a key is unknown, a value is not allowed, or something is not supported.
    """
    scheme = scheme_of(path)
    if scheme is not None:
        return Loaded(path, shipped(scheme), _SHIPPED, Wording(path))
    if not path.suffix:
        near = did_you_mean(str(path), list(map(str, Scheme)))
        raise ConfigError(
            f"--recipe {path} is neither a .yaml or .json file nor a shipped recipe{near}; name a file, or one of "
            f"{', '.join(Scheme)}"
        )
    content, folder = _Content.load(path).content, path.resolve().parent
    if not TOP_KEYS & content.keys():
        Recipe.from_dict(content, source=path, folder=folder)
        return Loaded(path, content, folder, Wording(path))
    file = LlmcFile.from_dict(content, source=path)
    data, calibration_notes = as_own(file, path, folder)
    ignored = file.ignored()
    notes = (f"{path}: of no effect here: {', '.join(ignored)}",) if ignored else ()
    return Loaded(
        path,
        data,
        folder,
        LlmcWording(path),
        notes,
        tuple(f"{path}: {note}" for note in calibration_notes),
        save_path=None if file.save.save_path is None else Path(file.save.save_path),
        second_step=not file.quant.rotates,
        online_rotate=file.quant.special.online_rotate,
        only_rotates=file.quant.rotates and file.save.save_trans,
    )


def has_fixed_scales(data: Mapping[str, Any]) -> bool:
    """Whether a recipe gives activations a scale that calibration fixes.

    Args:
        data: Its content, as a file has it.
    """
    granularity = data.get("activations", {}).get("granularity", QuantGranularity.Token)
    return QuantGranularity.parse(granularity) is QuantGranularity.Tensor
