"""The text that a model goes on with, as tasks of generated text ask for it: the likeliest token, again and again.

A text ends where one of its stops begins, with a token that ends texts, or after so many tokens. Of a context that
leaves no room for these the last tokens count, as lm-eval has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarot_onnx.calibration.stops import end_ids
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.evaluation.encoding import Encoding
from quarot_onnx.piecewise.memory import Memory

_USUAL = 256
"""New tokens where a task does not say how many; lm-eval's number."""

_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Their names in tasks, the first that is there counts."""

_KNOWN = frozenset({"until", "do_sample", "temperature", "top_k", "top_p", *_COUNTS})
_WHERE = "in generation_kwargs of its YAML file"


@dataclass(frozen=True)
class Manner:
    """How a text is to be gone on with.

    Attributes:
        stops: What it is cut off at.
        count: New tokens, at most.
    """

    stops: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Manner":
        """Read a task's ``generation_kwargs``.

        Raises:
            ConfigError: It wants tokens to be drawn, or what is not known here.
        """
        if unknown := sorted(given.keys() - _KNOWN):
            raise ConfigError(
                f"a task wants text generated with {unknown[0]}={given[unknown[0]]!r} ({_WHERE}): take it out"
            )
        temperature = float(given.get("temperature") or 0.0)
        asked = given.get("do_sample")
        if bool(asked) if asked is not None else temperature > 0:
            raise ConfigError(
                f"a task wants text to be drawn (do_sample, temperature {temperature:g} {_WHERE}), and the likeliest "
                "token alone is taken here: set do_sample: false"
            )
        until = given.get("until") or ()
        count = next((given[name] for name in _COUNTS if given.get(name) is not None), _USUAL)
        return cls(tuple([until] if isinstance(until, str) else until), int(count))


class Spoken:
    """A model that goes on with texts.

    Attributes:
        cut: How many contexts were too long and lost tokens on the left.
    """

    def __init__(
        self,
        path: str | Path,
        encoding: Encoding,
        positions: int,
        *,
        memory: Memory,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        """Open the model; arguments as for `Answers`, and the tokenizer and the positions that the model has.

        Raises:
            ModelError: It cannot be run, or is none that text can be generated with.
        """
        self.cut = 0
        self._path, self._positions, self._tokenizer = Path(path), positions, encoding.tokenizer
        self._ends = end_ids(self._path.parent, encoding.path)
        self._decoder = Decoder(path, threads=threads, exact=exact, memory=memory)

    def check(self, manner: Manner) -> None:
        """Refuse more new tokens than the model has room for.

        Raises:
            ConfigError: There is none left for a context.
        """
        if not 0 < manner.count < self._positions:
            raise ConfigError(
                f"a task asks for {manner.count} new tokens, and {self._path} takes {self._positions}, its context "
                f"among them: set max_gen_toks to less {_WHERE}"
            )

    def go_on(self, context: Sequence[int], manner: Manner) -> str:
        """The text behind a context.

        Args:
            context: Its tokens, one or more.
            manner: How, looked at by `check`.

        Raises:
            ModelError: The model cannot be run.
        """
        room = self._positions - manner.count
        self.cut += len(context) > room
        ids, found, text = list(context[-room:]), list[int](), ""
        self._decoder.start()
        following = ids[self._decoder.model.brought(ids) :]
        while len(found) < manner.count:
            token = int(self._decoder.feed(following).argmax())
            if token in self._ends:
                break
            found.append(token)
            following = [token]
            text = str(self._tokenizer.decode(found, skip_special_tokens=True))
            if any(stop and stop in text for stop in manner.stops):
                break
        for stop in filter(None, manner.stops):
            text = text.split(stop)[0]
        return text
