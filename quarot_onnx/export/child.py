"""The child process of ``export.py``: load a model with transformers, export it with optimum.

Takes one JSON argument (source, out_dir, dtype, opset) and writes JSON lines to stdout: ``{"stage": text}`` or, last,
``{"error": "model" | "output" | "config", "text": one line}``. torch, transformers and optimum, which take seconds to
import, are imported when a look at the source has not failed.
"""

# ruff: noqa: PLC0415

import difflib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

_TASK = "text-generation-with-past"
_UNWRITABLE = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM}


class RefusalError(Exception):
    """A request that cannot be carried out, in the user's words."""


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
            model, tokenizer = _load_gguf(source, request["dtype"])
            from optimum.exporters.onnx import onnx_export_from_model

            say({"stage": "exporting through optimum"})
            onnx_export_from_model(model, out_dir, opset=opset, task=_TASK, do_validation=False)
            tokenizer.save_pretrained(out_dir)
        else:
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            _check_architecture(source, config["model_type"])
            from optimum.exporters.onnx import main_export

            say({"stage": "exporting through optimum"})
            options = {"dtype": request["dtype"], "opset": opset, "do_validation": False, "local_files_only": True}
            main_export(str(source), out_dir, task=_TASK, **options)
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_architecture(source: Path, model_type: str) -> None:
    from optimum.exporters.onnx import main_export  # noqa: F401 -- what registers the architectures
    from optimum.exporters.tasks import TasksManager

    types = TasksManager.get_supported_model_type_for_task(_TASK, exporter="onnx")
    if model_type not in types:
        near = difflib.get_close_matches(model_type, types, n=3)
        hint = f"; it knows {', '.join(near)} and others" if near else ""
        raise RefusalError(
            f"{source} is of architecture {model_type!r}, which optimum cannot export with a cache{hint}"
        )


def _load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, dequantized to ``dtype``."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
    except (ValueError, IndexError, KeyError) as error:
        raise RefusalError(f"{path} is truncated or damaged; fetch the GGUF file again") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    field = fields.get("general.architecture")
    architecture = str(field.contents()) if field else "none"
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise RefusalError(
            f"{path} is of architecture {architecture!r}, which transformers cannot read; it reads {known}"
        )
    where = {"gguf_file": path.name, "local_files_only": True}
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch_dtype, **where)
    _check_architecture(path, str(model.config.model_type))
    model.config.use_cache = True
    return model, AutoTokenizer.from_pretrained(path.parent, **where)


if __name__ == "__main__":
    main()
