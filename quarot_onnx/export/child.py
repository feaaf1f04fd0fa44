"""The child process of ``export.py``: load a model with transformers, export it with optimum.

Takes one JSON argument (source, out_dir, dtype, opset) and writes JSON lines to stdout: ``{"stage": text}``,
``{"note": text}`` or, last, ``{"error": "model" | "output" | "config", "text": one line}``. torch, transformers and
optimum, which take seconds to import, are imported when a look at the source has not failed.
"""

# ruff: noqa: PLC0415

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quarot_onnx.export.loading import TASK, RefusalError, check_architecture, load_folder, load_gguf

_UNWRITABLE = {errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM}

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
    try:
        if source.is_file():
            model, tokenizer = load_gguf(source, request["dtype"])
            _export(model, out_dir, opset, say)
            tokenizer.save_pretrained(out_dir)
        else:
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            check_architecture(source, config["model_type"])
            model, notes = load_folder(source, request["dtype"])
            from optimum.utils.save_utils import maybe_load_preprocessors

            _export(model, out_dir, opset, say, preprocessors=maybe_load_preprocessors(str(source)))
            _keep_generation_config(source, out_dir)
            for note in notes:
                say({"note": note})
    except RefusalError as error:
        say({"error": "model", "text": str(error)})
    except ImportError:  # whose last line the parent explains
        raise
    except OSError as error:
        kind = "output" if error.errno in _UNWRITABLE else "model"
        say({"error": kind, "text": f"cannot export {source}: {_one_line(error)}"})
    except Exception as error:  # noqa: BLE001 -- torch, optimum and transformers raise anything
        kind = "config" if opset is not None and "opset" in str(error).lower() else "model"
        say({"error": kind, "text": f"cannot export {source}: {type(error).__name__}: {_one_line(error)}"})


def _export(model: Any, out_dir: Path, opset: int | None, say: Say, **options: Any) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    say({"stage": "exporting through optimum"})
    model.config.use_cache = True
    onnx_export_from_model(model, out_dir, opset=opset, task=TASK, do_validation=False, **options)


def _keep_generation_config(source: Path, out_dir: Path) -> None:
    """Copy the file where transformers did not write it, as it holds settings that contradict each other.

    The ids at which a text ends are in it.
    """
    name = "generation_config.json"
    if (source / name).is_file() and not (out_dir / name).exists():
        shutil.copyfile(source / name, out_dir / name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    main()
