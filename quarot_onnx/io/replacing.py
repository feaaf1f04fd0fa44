"""What an output may replace: what was named, and what an earlier run to the same output wrote beside it.

``model.quarot.json`` lists the companions that were written for ``model.onnx``::

    "beside": {"model": "model.onnx", "companions": {"config.json": "<SHA-256 of its content>", ...}}

A companion is replaced where this list alone names it and its content is still the one that was written. One that has
the content that it is to get stays as it is, whoever wrote it. What a run would replace and does not write, is removed:
a data file, a prefix or scales of another model would go with the new one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quarot_onnx.errors import OutputError
from quarot_onnx.io.external import data_locations

RECORD = "beside"
"""The key of a report under which the companions are listed."""

_REPORT = ".quarot.json"


def report_file(target: Path) -> Path:
    """The report that goes with a model."""
    return target.with_name(f"{target.stem}{_REPORT}")


@dataclass(frozen=True)
class Outputs:
    """The files of one output.

    Attributes:
        target: The ``.onnx`` file, absolute.
        data: Its data file, if it may get one.
        report: Its report, if it gets one.
        companions: What goes beside it, with the content.
    """

    target: Path
    data: Path | None = None
    report: Path | None = None
    companions: Mapping[Path, bytes] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All of them."""
        single = (self.target, self.data, self.report)
        return [*(path for path in single if path is not None), *self.companions]


@dataclass(frozen=True)
class _Record:
    """What a run wrote for one model: digests by file name."""

    model: str
    companions: Mapping[str, str]


@dataclass(frozen=True)
class Earlier:
    """What earlier runs wrote into the folder of an output.

    Attributes:
        target: The output, absolute.
        own: The record of a run to this output.
        others: Those of outputs beside it that are still there.
    """

    target: Path
    own: _Record | None
    others: tuple[_Record, ...]

    @classmethod
    def at(cls, target: Path) -> "Earlier":
        """Read the reports in the folder of an output."""
        reports = sorted(target.parent.glob(f"*{_REPORT}"))
        found = {path: record for path in reports if (record := _read(path)) is not None}
        own = found.pop(report_file(target), None)
        others = [record for record in found.values() if os.path.lexists(target.with_name(record.model))]
        return cls(target, own if own is not None and own.model == target.name else None, tuple(others))

    def check(self, outputs: Outputs) -> None:
        """Refuse an output that would replace what was neither named nor written by an earlier run to it.

        Raises:
            OutputError: With the list of these files.
        """
        foreign = [file for file, content in outputs.companions.items() if not self._replaceable(file, content)]
        if outputs.data is not None and os.path.lexists(outputs.data) and not self._own_data(outputs.data):
            foreign.append(outputs.data)
        if outputs.report is not None and os.path.lexists(outputs.report) and self.own is None:
            foreign.append(outputs.report)
        if foreign:
            names = ", ".join(sorted(file.name for file in foreign))
            raise OutputError(
                f"writing {self.target} would replace {names} in {self.target.parent}, not its own or changed since; "
                "choose another folder, or insist with --overwrite (overwrite=True in Python)"
            )

    def pending(self, companions: Mapping[Path, bytes]) -> dict[Path, bytes]:
        """The companions that are not there yet as they should be."""
        return {file: content for file, content in companions.items() if _content(file) != content}

    def stale(self, outputs: Outputs) -> list[Path]:
        """The files of the earlier output that are none of the new one."""
        if self.own is None:
            return []
        data = self.target.with_name(f"{self.target.name}.data")
        left = [data] if outputs.data is None and os.path.lexists(data) and self._own_data(data) else []
        if any(path.name != self.target.name for path in self.target.parent.glob("*.onnx")):
            return left  # which may go with the companions, too
        written = {path.name for path in outputs.files}
        for name in self.own.companions.keys() - written:
            file = self.target.parent / Path(name).name
            content = _content(file)
            if content is not None and hashlib.sha256(content).hexdigest() == self.own.companions[name]:
                left.append(file)
        return left

    def record(self, companions: Mapping[Path, bytes]) -> dict[str, object]:
        """What a report says of the companions: those that this run writes, or that earlier runs wrote as they are."""
        pending = self.pending(companions)
        records = self.others if self.own is None else (self.own, *self.others)
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in companions.items()}
        ours = {
            file.name: digest
            for file, digest in digests.items()
            if file in pending or any(record.companions.get(file.name) == digest for record in records)
        }
        return {"model": self.target.name, "companions": ours}

    def _replaceable(self, file: Path, content: bytes) -> bool:
        found = _content(file)
        if found == content or not os.path.lexists(file):
            return True
        if self.own is None or found is None or any(file.name in record.companions for record in self.others):
            return False
        return self.own.companions.get(file.name) == hashlib.sha256(found).hexdigest()

    def _own_data(self, data: Path) -> bool:
        """Whether a data file goes with the output that was named, and with no other model."""
        others = [path for path in self.target.parent.glob("*.onnx") if path.name != self.target.name]
        named = self.own is not None or os.path.lexists(self.target)
        return named and not any(data.name in data_locations(path) for path in others)


def _content(file: Path) -> bytes | None:
    """What a file holds; None where there is none, or nothing that can be read."""
    try:
        return file.read_bytes()
    except OSError:
        return None


def _read(report: Path) -> _Record | None:
    """The record in a report; one without companions where the report is of a version that did not list them."""
    try:
        content = json.loads(report.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    record = content.get(RECORD)
    if isinstance(record, dict) and isinstance(record.get("model"), str) and isinstance(record.get("companions"), dict):
        return _Record(record["model"], record["companions"])
    if "version" in content and content.keys() & {"rotation", "quantization"}:
        return _Record(f"{report.name.removesuffix(_REPORT)}.onnx", {})
    return None
