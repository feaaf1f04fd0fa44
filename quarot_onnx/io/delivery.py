"""An output on its way: what it may replace is looked at first; then its files appear at once or not at all.

An output is an ``.onnx`` file, its data, a report, and companions: configs and tokenizer of the model folder it came
from, and whatever else goes beside it.
"""

import errno
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quarot_onnx.errors import OutputError
from quarot_onnx.io.companions import NO_SETTINGS, GenaiSettings, companion_bytes, companion_files
from quarot_onnx.io.replacing import RECORD, Earlier, Outputs, report_file
from quarot_onnx.io.staging import check_free_space, check_targets, free_bytes, same_file, staged

_SLACK = 1 << 16
"""Folder entries and file system blocks, in the estimate of the space that an output needs."""

Write = Callable[[Path, Path | None], Mapping[str, object]]
"""Writes a model and its data, gets the files to write, and returns what the report says of it."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """An output that may be written.

    Attributes:
        outputs: Its files.
        earlier: What earlier runs wrote into its folder.
        listed: Whether its report lists the companions.
        inputs: What it is made of.
    """

    outputs: Outputs
    earlier: Earlier
    listed: bool
    inputs: tuple[Path, ...]

    @classmethod
    def to(
        cls,
        target: Path,
        *,
        inputs: Iterable[Path],
        data: bool,
        report: bool,
        companions_from: Path | None,
        genai: GenaiSettings = NO_SETTINGS,
        beside: Mapping[str, bytes] = MappingProxyType({}),
        overwrite: bool | None,
    ) -> "Delivery":
        """Look whether an output may be written.

        Args:
            target: The ``.onnx`` file, absolute.
            inputs: What it is made of, which must survive.
            data: Whether it has a data file, ``<file name>.data``.
            report: Whether it gets a report, ``<stem>.quarot.json``.
            companions_from: A model folder whose configs and tokenizer are copied along.
            genai: What onnxruntime-genai is to set, in the genai_config.json that is copied along.
            beside: Further files that go with the model, by name.
            overwrite: Whether existing files may be replaced; None: the file that was named with its data, and what an
                earlier run to it wrote (see ``replacing``).

        Raises:
            OutputError: A target is an input, a folder, or not to be replaced.
        """
        inputs = list(inputs)
        companions = _companions(companions_from, target, exclude=inputs, genai=genai)
        outputs = Outputs(
            target,
            target.with_name(f"{target.name}.data") if data else None,
            report_file(target) if report else None,
            companions | {target.with_name(name): content for name, content in beside.items()},
        )
        check_targets(outputs.files, protected=inputs, overwrite=overwrite is not False)
        earlier = Earlier.at(target)
        if overwrite is None:
            earlier.check(outputs)
        return cls(outputs, earlier, companions_from is not None, tuple(inputs))

    def make(self, size: int, write: Write, report: Mapping[str, object]) -> None:
        """Write all files beside their places, and move them there; what an earlier run wrote besides, is removed.

        Args:
            size: Bytes of the model and its data.
            write: Called with the companions in place. What it raises leaves everything as it was.
            report: What the report says besides.

        Raises:
            OutputError: A file cannot be written, or the disk is full.
        """
        outputs, target = self.outputs, self.outputs.target
        pending = self.earlier.pending(outputs.companions)
        listed = {RECORD: self.earlier.record(outputs.companions)} if self.listed else {}
        needed = size + sum(map(len, pending.values())) + _SLACK
        check_free_space(target.parent, needed)
        try:
            with staged(target) as batch:
                data = None if outputs.data is None else batch.stage(outputs.data)
                for file, content in pending.items():
                    batch.stage(file).write_bytes(content)
                found = write(batch.stage(target), data)
                if outputs.report is not None:
                    full = {**report, **found, **listed}
                    batch.stage(outputs.report).write_text(f"{json.dumps(full, indent=2)}\n", encoding="utf-8")
                for file in self.earlier.stale(outputs):
                    if not any(same_file(file, given) for given in self.inputs):
                        batch.take_away(file)
        except OSError as error:
            free = free_bytes(target.parent)
            sizes = f"{needed:,} bytes needed, {free:,} free"
            raise OutputError(
                f"cannot write {target}: {error} ({sizes}){_way_out(error, fits=free >= needed)}"
            ) from error


def _way_out(error: OSError, *, fits: bool) -> str:
    """What to do where a file was cut off; what NumPy and onnxruntime could not write, has no number."""
    if error.errno not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    if fits and error.errno != errno.ENOSPC:
        return "; raise the limit on the size of files (ulimit -f) or the quota, or choose another folder"
    return "; free some space, or choose another folder"


def _companions(
    folder: Path | None, target: Path, *, exclude: Iterable[Path], genai: GenaiSettings
) -> dict[Path, bytes]:
    """The companion files to write beside ``target``: none that is the source's own."""
    if folder is None:
        return {}
    pairs = {target.with_name(file.name): file for file in companion_files(folder, exclude=exclude)}
    return {
        copy: companion_bytes(file, model_name=target.name, genai=genai)
        for copy, file in pairs.items()
        if not same_file(copy, file)
    }
