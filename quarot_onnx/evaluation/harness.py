"""A model as lm-eval asks it. lm-eval is imported with this module."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quarot_onnx.evaluation.answers import Answers
from quarot_onnx.evaluation.encoding import Encoding
from quarot_onnx.evaluation.spoken import Manner, Spoken
from quarot_onnx.progress import Progress

Asked = tuple[Any, Sequence[int], Sequence[int]]


class OnnxModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """Answers lm-eval's requests with a session of onnxruntime."""

    def __init__(
        self,
        answers: Answers,
        encoding: Encoding,
        progress: Progress | None = None,
        spoken: Callable[[], Spoken] | None = None,
    ) -> None:
        """Take the model and its tokenizer.

        Args:
            answers: The model.
            encoding: The tokenizer.
            progress: Called with requests done and their number.
            spoken: Opens the model for generated text; None where no task asks for any.
        """
        super().__init__()
        self._answers, self._encoding, self._progress, self._spoken = answers, encoding, progress, spoken
        self.cut = 0
        """Contexts of generated text that lost their beginning."""

    @property
    def eot_token_id(self) -> int:
        """What lm-eval puts before a text without context."""
        return self._encoding.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: object) -> list[int]:
        """The ids of a text."""
        return self._encoding.ids(string, special=add_special_tokens is not False)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log likelihood of continuations; lm-eval's own bar is off, ``progress`` tells the same."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Asked], **_options: object) -> list[tuple[float, bool]]:
        return self._answers.score([(context, continuation) for _, context, continuation in requests], self._progress)

    def loglikelihood_rolling(self, requests: Any, **_options: object) -> list[float]:
        """The log likelihood of whole texts, in windows of the model's positions that overlap in one token."""
        windows: list[tuple[Sequence[int], Sequence[int]]] = []
        bounds = [0]
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self._answers.positions, 1)
            windows += map(make_disjoint_window, cut)
            bounds.append(len(windows))
        found = [total for total, _ in self._answers.score(windows, self._progress)]
        return [sum(found[start:stop]) for start, stop in pairwise(bounds)]

    def generate_until(self, requests: Any, **_options: object) -> list[str]:
        """What the model goes on with, the likeliest tokens; all that is asked is looked at before the first is run.

        Raises:
            ConfigError: Tokens are to be drawn, or there is no room for as many.
        """
        assert self._spoken is not None, "opened for tasks of generated text"
        asked = [(context, Manner.of(given), given) for context, given in (request.args for request in requests)]
        spoken, found = self._spoken(), list[str]()
        for _, manner, _ in asked:
            spoken.check(manner)
        texts = spoken.go_on((self.tok_encode(context), manner) for context, manner, _ in asked)
        for (context, _, given), text in zip(asked, texts, strict=True):
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, given), found[-1])
            if self._progress is not None:
                self._progress(len(found), len(asked))
        self.cut += spoken.cut
        return found
