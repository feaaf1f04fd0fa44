"""The ``generate`` command: what a model says goes to standard output as it comes, and speeds to standard error."""

import sys
from collections.abc import Mapping
from pathlib import Path

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.calibration.text_files import decoded, file_text
from quarot_onnx.cli import options as opt
from quarot_onnx.cli.console import notes, print_json, put, remark
from quarot_onnx.cli.generate_options import GenerateOptions
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.generation.generator import Generated, Generator
from quarot_onnx.generation.sampling import Sampling
from quarot_onnx.piecewise.memory import Memory

_STDIN = Path("-")
_SHOWN = 60
"""Characters of a prompt that announce its run."""


def run(options: GenerateOptions, path: Path) -> None:
    """Generate from every prompt; all of them are checked before the first is run.

    Args:
        options: What was typed.
        path: The model's file.

    Raises:
        InputError: An option, a prompt, the tokenizer or the model is at fault.
    """
    sampling, bos = _sampling(options), _bos(options)
    prompts = _prompts(options)
    source = opt.tokenizer_path(options.tokenizer, path)
    memory = Memory.of(options.max_memory, options.by_stages)
    generator = Generator(path, source, threads=options.threads, exact=options.exact, memory=memory)
    tasks = [
        generator.task(prompt, max_new_tokens=options.max_new_tokens, chat=options.chat, bos=bos) for prompt in prompts
    ]
    if generator.saturating:
        count = generator.saturating
        notes([f"{count} of the model's products saturate on this processor; --exact computes them exactly"])
    notes(generator.notes)
    if generator.by_pieces and options.by_stages is None:
        notes([f"{path} does not fit into memory: every token is a pass over the file (--whole opens it all the same)"])
    runs = []
    for number, task in enumerate(tasks, start=1):
        if len(tasks) > 1 and not options.as_json:
            remark(f"[{number}/{len(tasks)}] {_short(task.prompt)}")
        if options.as_json:
            found = generator.run(task, sampling)
        else:
            try:
                found = generator.run(task, sampling, put)
            finally:
                put("\n")  # of an interrupted text, too
            remark(_summary(found, sampling))
        runs.append(_record(found))
    if options.as_json:
        print_json({"model": str(path), "sampling": None if sampling is None else sampling.to_dict(), "runs": runs})


def _sampling(options: GenerateOptions) -> Sampling | None:
    """How tokens are drawn, None for the likeliest.

    Raises:
        ConfigError: What was typed contradicts itself, or is out of range.
    """
    given = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    typed = {name: value for name, value in given.items() if value is not None}
    seed = {} if options.seed is None else {"seed": options.seed}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in (typed | seed).items()]
    if options.greedy and words:
        raise ConfigError(f"--greedy draws nothing and contradicts {words[0]}; leave out one of them")
    if words and not typed:
        raise ConfigError(
            f"{words[0]} is for tokens that are drawn: add --temperature, --top-k or --top-p, or go without"
        )
    return Sampling.from_dict(typed | seed) if typed else None


def _bos(options: GenerateOptions) -> Bos | int:
    chosen = opt.bos_choice(options.bos, options.bos_id)
    if options.chat and chosen is not None:
        raise ConfigError("--chat: the template says what comes first; leave out --bos, --no-bos and --bos-id")
    return Bos.of(chosen)


def _prompts(options: GenerateOptions) -> list[str]:
    """All prompts, those of files last.

    Raises:
        CalibrationError: A file cannot be read.
        ConfigError: There is none.
    """
    found = [*(options.prompt or ()), *map(_prompt_of, options.prompt_file or ())]
    if not found:
        raise ConfigError("nothing to go on with: give --prompt TEXT, or --prompt-file FILE (- for standard input)")
    return found


def _prompt_of(file: Path) -> str:
    """The prompt in a file, as it is whatever its name, without the line end that editors put at its end."""
    piped = file == _STDIN
    text = decoded(sys.stdin.buffer.read(), "on standard input") if piped else file_text(file)
    if not text.strip():
        what, way = ("standard input", "pipe a prompt into it") if piped else (f"the text {file}", "write one into it")
        raise CalibrationError(f"{what} is empty: {way}, or give --prompt TEXT")
    return text.removesuffix("\n").removesuffix("\r")


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _summary(found: Generated, sampling: Sampling | None) -> str:
    """Speeds, and how it ended."""
    speeds = [f"prefill {found.fed} tokens, {found.prefill_speed:.1f} tokens/s"]
    if found.decode_speed is not None:
        speeds.append(f"decode {found.steps} tokens, {found.decode_speed:.1f} tokens/s")
    ended = "the model ended the text" if found.ended else f"stopped after {len(found.ids)} tokens"
    drawn = "" if sampling is None else f"; seed {sampling.seed}"
    return f"{'; '.join(speeds)}; {ended}{drawn}"


def _record(found: Generated) -> Mapping[str, object]:
    return {
        "prompt": found.task.prompt,
        "prompt_ids": list(found.task.ids),
        "text": found.text,
        "ids": list(found.ids),
        "ended": found.ended,
        "prefill_tokens": found.fed,
        "prefill_tokens_per_s": found.prefill_speed,
        "decode_tokens": found.steps,
        "decode_tokens_per_s": found.decode_speed,
    }
