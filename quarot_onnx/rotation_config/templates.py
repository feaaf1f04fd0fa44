"""Names with ``{layer}`` in them, so that one file serves every depth of a family of models.

=============  ===========================================================================
``{layer}``    0, 1, 2 ...: the entry is repeated for every layer
``{layer+1}``  the layer after it; the entry is then repeated for all layers but the last
``{last}``     the number of the last layer
``{layers}``   the number of layers
=============  ===========================================================================

How many layers there are is what the names with ``{layer}`` say: they count from 0 to the first number that the
graph does not have, and all of them must agree.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError
from quarot_onnx.rotation_config.names import Names, Ref

_T = TypeVar("_T", bound=Strict)

_PLACEHOLDER = re.compile(r"\{(?:layer(?:\+(?P<offset>\d+))?|(?P<layers>layers)|(?P<last>last))\}")


def references(data: object, place: str = "") -> Iterator[Ref]:
    """All texts in plain data, with their key paths."""
    if isinstance(data, str):
        yield Ref(place, data)
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from references(value, f"{place}.{key}" if place else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from references(value, f"{place}[{index}]")


class Layers:
    """The layers that a file's templates span."""

    def __init__(self, names: Names, data: object, found: int) -> None:
        """Count the layers.

        Args:
            names: The graph's names.
            data: The file's content.
            found: The number of decoder blocks in the graph, for files that use only ``{last}`` or ``{layers}``.

        Raises:
            ConfigError: A name has no layer 0 or leaves one out, or two names differ in their number of layers.
        """
        templates = [ref for ref in references(data) if set(_PLACEHOLDER.findall(ref.name)) == {("", "", "")}]
        self.count = found
        for ref in templates:
            count = _count(names, ref)
            if ref is not templates[0] and count != self.count:
                raise ConfigError(
                    f"{ref.place}: {ref.name!r} exists for {count} layers, "
                    f"but {templates[0].name!r} ({templates[0].place}) for {self.count}"
                )
            self.count = count

    def entries(self, entry: _T) -> Iterator[_T]:
        """``entry`` once for every layer that its names ask for; itself when they ask for none."""
        data = entry.to_dict()
        for filled in self._filled(data):
            yield entry if filled == data else type(entry).model_validate(filled)

    def names(self, refs: list[Ref]) -> Iterator[Ref]:
        """The same for single names."""
        for ref in refs:
            yield from (Ref(ref.place, str(name)) for name in self._filled(ref.name))

    def _filled(self, data: object) -> Iterator[object]:
        placeholders = [m for ref in references(data) for m in _PLACEHOLDER.finditer(ref.name)]
        if placeholders and not self.count:
            raise ConfigError(f"{placeholders[0].group()} has no meaning here: the graph has no decoder layers")
        running = [int(m["offset"] or 0) for m in placeholders if not m["last"] and not m["layers"]]
        for layer in range(self.count - max(running)) if running else [0]:
            yield self._fill(data, layer)

    def _fill(self, data: Any, layer: int) -> Any:
        if isinstance(data, str):
            return _PLACEHOLDER.sub(lambda match: self._number(match, layer), data)
        if isinstance(data, dict):
            return {key: self._fill(value, layer) for key, value in data.items()}
        return [self._fill(value, layer) for value in data] if isinstance(data, list) else data

    def _number(self, match: re.Match[str], layer: int) -> str:
        if match["layers"]:
            return str(self.count)
        return str(self.count - 1 if match["last"] else layer + int(match["offset"] or 0))


def _count(names: Names, ref: Ref) -> int:
    """For how many layers in a row, from 0, a name exists."""
    count = 0
    while _PLACEHOLDER.sub(str(count), ref.name) in names:
        count += 1
    if not count:
        name = _PLACEHOLDER.sub("0", ref.name)
        raise ConfigError(f"{ref.place}: {ref.name!r} asks for {name!r}, which the model has not{names.near(name)}")
    beyond = max(_numbers(names, ref.name))
    if beyond > count:
        raise ConfigError(f"{ref.place}: {ref.name!r} exists for layer {beyond}, but not for layer {count}")
    return count


def _numbers(names: Names, template: str) -> Iterator[int]:
    """The layers of all nodes that fit a template."""
    first, *rest = (re.escape(part) for part in _PLACEHOLDER.split(template)[::4])
    pattern = re.compile(first + r"(\d+)" + r"\1".join(rest))
    return (int(match[1]) for match in map(pattern.fullmatch, names) if match)
