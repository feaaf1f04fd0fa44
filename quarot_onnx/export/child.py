"""The child process of ``export.py``: load a model with transformers, export it with optimum.

Takes one JSON argument (source, out_dir, dtype, opset) and writes JSON lines to stdout: ``{"stage": text}``,
``{"note": text}`` or, last, ``{"error": "model" | "output" | "config", "text": one line}``. torch, transformers and
optimum, which take seconds to import, are imported when a look at the source has not failed.
"""

# ruff: noqa: PLC0415

import errno
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quarot_onnx.export.gguf_source import load_gguf
from quarot_onnx.export.loading import TASK, RefusalError, check_architecture, load_folder, no_tokenizer, one_line
from quarot_onnx.export.tracing import traceable
from quarot_onnx.export.unlisted import PASSED_ON, is_listed, prepare, refusal

_ATTENTION = 14
"""The oldest opset in which torch exports the attention of most models."""
_ELSEWHERE = "choose another folder"
_WAYS_OUT = {
    errno.ENOSPC: f"free some space, or {_ELSEWHERE}",
    errno.EDQUOT: f"free some space, or {_ELSEWHERE}",
    errno.EFBIG: f"raise the limit on the size of files (ulimit -f), or {_ELSEWHERE}",
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
}
"""What to do where the output cannot be written, by the system's number of the error."""
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

Say = Callable[[dict[str, str]], None]


def main() -> None:
    """Carry out the request in ``sys.argv[1]``."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print to stdout joins the log

    def say(message: dict[str, str]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    request = json.loads(sys.argv[1])
    source, out_dir, opset = Path(request["source"]), Path(request["out_dir"]), request["opset"]
    say({"stage": f"reading {source.name}"})
    if opset is not None and (refused := _opset_refusal(opset)):
        say(refused)
        return
    try:
        if source.is_file():
            model, tokenizer, notes = load_gguf(source, request["dtype"])
            check = export_model(source, model, out_dir, opset, say)
            if tokenizer is not None:
                tokenizer.save_pretrained(out_dir)
        else:
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            check_architecture(source, config["model_type"])
            model, notes = load_folder(source, request["dtype"])
            from optimum.utils.save_utils import maybe_load_preprocessors

            preprocessors = maybe_load_preprocessors(str(source))
            check = export_model(source, model, out_dir, opset, say, preprocessors=preprocessors)
            notes = [*notes, *complete(source, out_dir)]
        del model  # whose memory the comparison of an export needs
        gc.collect()  # optimum leaves its forward bound to itself
        notes = [*notes, *check()]
        for note in notes:
            say({"note": note})
    except RefusalError as error:
        say({"error": "model", "text": str(error)})
    except ImportError:  # whose last line the parent explains
        raise
    except OSError as error:
        say(unwritten(source, error))
    except Exception as error:  # noqa: BLE001 -- torch, optimum and transformers raise anything
        say(failed(source, error, opset))


def export_model(
    source: Path, model: Any, out_dir: Path, opset: int | None, say: Say, **options: Any
) -> Callable[[], list[str]]:
    """Export a model of a folder or file ``source``.

    Returns:
        What checks the export, where it has to be, and gives notes on it; it needs no model any more.

    Raises:
        RefusalError: Its architecture is not on optimum's list and cannot be exported as those that are.
    """
    from optimum.exporters.onnx import onnx_export_from_model

    unlisted = None if is_listed(model.config.model_type) else prepare(source, model)
    say({"stage": "exporting through optimum"})
    model.config.use_cache = True
    options |= unlisted.options if unlisted else {}
    try:
        with traceable(model):
            onnx_export_from_model(model, out_dir, opset=opset, task=TASK, do_validation=False, **options)
    except Exception as error:
        if unlisted and not isinstance(error, PASSED_ON) and not _of_opset(error, opset):
            reason = f"it cannot be exported as a Llama is ({one_line(error)})"
            raise refusal(source, unlisted.model_type, reason) from error
        raise

    def check() -> list[str]:
        if unlisted is None:
            return []
        say({"stage": "comparing it with the model in torch"})
        return [unlisted.check(out_dir)]

    return check


def failed(source: Path, error: Exception, opset: int | None) -> dict[str, str]:
    """The message on an error of torch, optimum or transformers."""
    text = f"cannot export {source}: {type(error).__name__}: {one_line(error)}"
    if _of_opset(error, opset):
        return {"error": "config", "text": f"{text}; choose another opset, or none, for the model's default"}
    return {"error": "model", "text": text}


def _of_opset(error: Exception, opset: int | None) -> bool:
    """Whether an opset that was asked for is to blame."""
    return opset is not None and "opset" in str(error).lower()


def _opset_refusal(opset: int) -> dict[str, str] | None:
    from torch.onnx import _constants

    least, most = _constants.ONNX_MIN_OPSET, _constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET
    if least <= opset <= most:
        return None
    way_out = f"choose one from {_ATTENTION} to {most}, or none, for the model's default"
    return {"error": "config", "text": f"opset {opset} cannot be exported; {way_out}"}


def unwritten(source: Path, error: OSError) -> dict[str, str]:
    """The message on an error of the system: of the output where it is one of writing, else of the model."""
    reading = str(error.filename or "").startswith(str(source))
    way_out = None if reading else _WAYS_OUT.get(error.errno or 0)
    text = f"cannot export {source}: {one_line(error)}"
    return {"error": "output", "text": f"{text}; {way_out}"} if way_out else {"error": "model", "text": text}


def complete(source: Path, out_dir: Path) -> list[str]:
    """Add what optimum leaves out in silence, as transformers finds fault with it.

    Args:
        source: The Hugging Face folder.
        out_dir: Its export.

    Returns:
        A note where no tokenizer came out.
    """
    for name in _BESIDE:
        if (source / name).is_file() and not (out_dir / name).exists():
            shutil.copyfile(source / name, out_dir / name)
    if (out_dir / "tokenizer.json").is_file():
        return []
    return [no_tokenizer(f"{source} has none, nor a tokenizer that could be converted to one")]


if __name__ == "__main__":
    main()
