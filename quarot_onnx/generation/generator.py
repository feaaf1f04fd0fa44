"""Text from a model: a prompt becomes tokens, tokens are added one by one, and are told as text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.bos import Bos, choose_bos
from quarot_onnx.calibration.stops import end_ids
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.calibration.text_files import require_characters
from quarot_onnx.calibration.tokenizer import load_tokenizer, token_ids, tokenizer_file
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.generation.chat import render
from quarot_onnx.generation.room import DEFAULT_NEW, room_of
from quarot_onnx.generation.sampling import Sampling, next_token
from quarot_onnx.generation.stream import TextStream
from quarot_onnx.graph.saturation import saturating_here
from quarot_onnx.piecewise.memory import Memory


@dataclass(frozen=True)
class Task:
    """What is to be generated.

    Attributes:
        prompt: As it was given.
        ids: Its tokens, BOS or chat template among them.
        count: New tokens, at most.
    """

    prompt: str
    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Generated:
    """What a model said.

    Attributes:
        task: What was asked.
        text: What it said, without the prompt.
        ids: Its tokens, without the one that ended it.
        ended: Whether the model ended the text; otherwise all tokens that were asked for are there.
        fed: Tokens of the prompt that were run; a prefix that the model brings is not.
        steps: Tokens run one by one.
        prefill_seconds: Time until the first token was there.
        decode_seconds: Time for the steps.
    """

    task: Task
    text: str
    ids: tuple[int, ...]
    ended: bool
    fed: int
    steps: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_speed(self) -> float:
        """Tokens per second."""
        return self.fed / self.prefill_seconds

    @property
    def decode_speed(self) -> float | None:
        """Tokens per second; None where the first token was the last."""
        return self.steps / self.decode_seconds if self.steps else None


class Generator:
    """A model with its tokenizer.

    Attributes:
        saturating: How many products of the model saturate on this processor unless they are computed exactly.
        by_pieces: Whether the model is run piece by piece, every token a pass over its file.
        notes: What to say of a limit of memory that cannot be kept.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path | None = None,
        *,
        threads: int | None = None,
        exact: bool = False,
        memory: Memory = Memory(),  # noqa: B008 - frozen
    ) -> None:
        """Open a model.

        Args:
            path: The ONNX file, float or quantized.
            tokenizer: A tokenizer.json, or the folder that holds one; None for the model's folder.
            threads: onnxruntime's intra-op threads.
            exact: Compute 8-bit products exactly where this processor's fast way saturates.
            memory: What it may take, and whether the model is run piece by piece for that.

        Raises:
            CalibrationError: No tokenizer, or a config beside it that is not readable.
            ModelError: The model cannot be read or run, or is none that text can be generated with.
        """
        path = Path(path)
        self._source = tokenizer_file(path.parent if tokenizer is None else tokenizer)
        self._tokenizer = load_tokenizer(self._source)
        self._ends = end_ids(path.parent, self._source)
        self._decoder = Decoder(path, threads=threads, exact=exact, memory=memory)
        self.by_pieces, self.notes = self._decoder.by_pieces, self._decoder.notes
        self._room = room_of(self._decoder.model)
        self.saturating = 0 if exact else saturating_here(self._decoder.model.model)

    def task(
        self, prompt: str, *, max_new_tokens: int | None = None, chat: bool = False, bos: int | Bos = Bos.AUTO
    ) -> Task:
        """What a prompt asks of the model.

        Args:
            prompt: The text that the model goes on with, or what the user of a chat says.
            max_new_tokens: At most so many; None for 128, or for as many as fit.
            chat: Write the prompt as the model's chat template says; it says what comes first, too: no BOS is added.
            bos: The BOS id in front of the prompt, or where it comes from.

        Raises:
            CalibrationError: No tokens, some that the model does not know, more than it has room for, no template, or
                a prompt that holds what is no character.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise CalibrationError(f"max_new_tokens is {max_new_tokens}: ask for 1 or more")
        require_characters(prompt, "the prompt")
        text = render(self._source.parent, prompt) if chat else prompt
        ids = token_ids(text, self._tokenizer, "the prompt as the chat template writes it")
        first = None if chat else choose_bos(self._source, bos).id
        if first is not None and ids[:1] != [first]:
            ids = [first, *ids]
        if not ids:
            raise CalibrationError("the prompt is empty, and no BOS stands for it: give some text")
        model = self._decoder.model
        check_vocabulary(np.array(ids), model.inputs.vocab_size, self._tokenizer)
        fed = len(ids) - model.brought(ids)
        count = (max_new_tokens or DEFAULT_NEW) if self._room is None else self._room.new_tokens(fed, max_new_tokens)
        return Task(prompt, tuple(ids), count)

    def run(self, task: Task, sampling: Sampling | None = None, tell: Callable[[str], None] | None = None) -> Generated:
        """Generate.

        Args:
            task: What is asked, from `task`.
            sampling: How tokens are drawn; None for the likeliest.
            tell: Called with the text, piece by piece, as soon as it is there.

        Raises:
            ModelError: The model cannot be run.
        """
        rng = np.random.default_rng(0 if sampling is None else sampling.seed)
        stream, pieces, ids = TextStream(self._tokenizer, task.ids), list[str](), list[int]()
        self._decoder.start()
        fed = list(task.ids[self._decoder.model.brought(task.ids) :])
        seconds, ended, following = list[float](), False, fed
        while len(ids) < task.count:
            start = time.perf_counter()
            token = next_token(self._decoder.feed(following), sampling, rng)
            seconds.append(time.perf_counter() - start)
            ended = token in self._ends
            if ended:
                break
            ids.append(token)
            following = [token]
            _add(stream.add(token), pieces, tell)
        _add(stream.rest(), pieces, tell)
        return Generated(
            task, "".join(pieces), tuple(ids), ended, len(fed), len(seconds) - 1, seconds[0], sum(seconds[1:])
        )


def _add(piece: str, pieces: list[str], tell: Callable[[str], None] | None) -> None:
    if piece:
        pieces.append(piece)
        if tell is not None:
            tell(piece)


def generate(
    path: str | Path,
    prompt: str,
    *,
    tokenizer: str | Path | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    chat: bool = False,
    bos: int | Bos = Bos.AUTO,
    threads: int | None = None,
    memory: Memory = Memory(),  # noqa: B008 - frozen
    tell: Callable[[str], None] | None = None,
) -> Generated:
    """Generate text from one prompt; for several, `Generator` keeps the model open.

    Args:
        path: The ONNX file, float or quantized.
        prompt: As for `Generator.task`, with ``max_new_tokens``, ``chat`` and ``bos``.
        tokenizer: As for `Generator`, with ``threads`` and ``memory``.
        max_new_tokens: See there.
        sampling: As for `Generator.run`, with ``tell``.
        chat: See there.
        bos: See there.
        threads: See there.
        memory: See there.
        tell: See there.

    Raises:
        CalibrationError: Tokenizer, prompt or template are at fault.
        ModelError: The model cannot be read or run, or is none that text can be generated with.
    """
    generator = Generator(path, tokenizer, threads=threads, memory=memory)
    return generator.run(generator.task(prompt, max_new_tokens=max_new_tokens, chat=chat, bos=bos), sampling, tell)
