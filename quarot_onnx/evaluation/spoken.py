"""The text that a model goes on with, as tasks of generated text ask for it: the likeliest token, again and again.

A text ends where one of its stops begins, with a token that ends texts, or after so many tokens. Of a context that
leaves no room for these the last tokens count, as lm-eval has it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quarot_onnx.calibration.stops import end_ids
from quarot_onnx.calibration.tokenizer import load_tokenizer
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.distributed.worker import kept
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.evaluation.source import KIND, Source

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


@dataclass(frozen=True, eq=False)
class Asked:
    """A text that is to be gone on with.

    Attributes:
        source: The model.
        tokenizer_path: The tokenizer.json.
        context: The tokens before it, with room for those to come.
        manner: How.
    """

    source: Source
    tokenizer_path: Path
    context: tuple[int, ...]
    manner: Manner


class Voice:
    """An open model with its tokenizer; texts may be asked of it from several threads."""

    def __init__(self, source: Source, tokenizer_path: Path) -> None:
        """Open the model.

        Raises:
            ModelError: It cannot be run, or is none that text can be generated with.
            CalibrationError: The tokenizer cannot be read.
        """
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._ends = end_ids(source.path.parent, tokenizer_path)
        self._decoder = Decoder(source.path, threads=source.threads, exact=source.exact, memory=source.memory)

    def go_on(self, asked: Asked) -> str:
        """The text behind a context.

        Raises:
            ModelError: The model cannot be run.
        """
        decoder, found, text = self._decoder.another(), list[int](), ""
        following = list(asked.context[decoder.model.brought(asked.context) :])
        while len(found) < asked.manner.count:
            token = int(decoder.feed(following).argmax())
            if token in self._ends:
                break
            found.append(token)
            following = [token]
            text = str(self._tokenizer.decode(found, skip_special_tokens=True))
            if any(stop and stop in text for stop in asked.manner.stops):
                break
        for stop in filter(None, asked.manner.stops):
            text = text.split(stop)[0]
        return text


class Spoken:
    """A model that goes on with texts.

    Attributes:
        cut: How many contexts were too long and lost tokens on the left.
    """

    def __init__(self, source: Source, tokenizer_path: Path, positions: int, cluster: Cluster | None = None) -> None:
        """Open the model, or leave that to workers.

        Args:
            source: The model.
            tokenizer_path: Its tokenizer.json.
            positions: Those that it has.
            cluster: Workers, to which the model is known; None where texts are generated here.

        Raises:
            ModelError: It cannot be run, or is none that text can be generated with.
            ClusterError: The workers do not see the tokenizer.
        """
        self.cut = 0
        self._source, self._tokenizer_path, self._positions = source, tokenizer_path.absolute(), positions
        if cluster is None:
            self._texts: Callable[[Iterable[Asked]], Iterator[str]] = partial(map, Voice(source, tokenizer_path).go_on)
        else:
            cluster.check([self._tokenizer_path])
            self._texts = partial(cluster.in_order, go_on)

    def check(self, manner: Manner) -> None:
        """Refuse more new tokens than the model has room for.

        Raises:
            ConfigError: There is none left for a context.
        """
        if not 0 < manner.count < self._positions:
            raise ConfigError(
                f"a task asks for {manner.count} new tokens, and {self._source.path} takes {self._positions}, its "
                f"context among them: set max_gen_toks to less {_WHERE}"
            )

    def go_on(self, asked: Iterable[tuple[Sequence[int], Manner]]) -> Iterator[str]:
        """The texts behind contexts.

        Args:
            asked: Tokens, one or more, and how, looked at by `check`.

        Raises:
            ModelError: The model cannot be run.
            ClusterError: The workers cannot do it.
        """
        return self._texts(self._asked(context, manner) for context, manner in asked)

    def _asked(self, context: Sequence[int], manner: Manner) -> Asked:
        room = self._positions - manner.count
        self.cut += len(context) > room
        return Asked(self._source, self._tokenizer_path, tuple(context[-room:]), manner)


def go_on(asked: Asked) -> str:
    """The text behind a context, in a worker."""
    voice = kept(KIND, (asked.source.token, "texts"), lambda: Voice(asked.source, asked.tokenizer_path))
    return voice.go_on(asked)
