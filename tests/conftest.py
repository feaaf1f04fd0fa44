"""Fixtures shared by all tests; the builders behind them are in ``support/exports.py``."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a Hugging Face package: tests never reach for the network

import gc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import exports
import further
import onnxruntime as ort
import pytest
from command_line import Shell
from hypothesis import settings

from quarot_onnx.sessions import runtime

# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """onnxruntime's sessions take one thread unless a test says more: processes share the cores already.

    Its other threads would wait busily between two operators.
    """
    usual, opened = runtime.session_options, ort.InferenceSession.__init__

    def plain(session: object, model: object, sess_options: Any = None, *rest: Any, **more: Any) -> None:
        if sess_options is None:
            sess_options = ort.SessionOptions()
            sess_options.intra_op_num_threads = 1
        opened(session, model, sess_options, *rest, **more)

    def one(domains: frozenset[str], *, threads: int | None = None, **more: Any) -> object:
        return usual(domains, threads=1 if threads is None else threads, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "session_options", one)
        patch.setattr(ort.InferenceSession, "__init__", plain)
        yield


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="session")
def llama_optimum() -> Path:
    return exports.optimum_export("llama")


@pytest.fixture(scope="session")
def llama_optimum_tied() -> Path:
    return exports.optimum_export("llama", tied=True)


@pytest.fixture(scope="session")
def llama_dynamo() -> Path:
    return exports.dynamo_export("llama")


@pytest.fixture(scope="session")
def qwen2_optimum() -> Path:
    return exports.optimum_export("qwen2")


@pytest.fixture(scope="session")
def genai() -> Path:
    return exports.genai_like()


@pytest.fixture(scope="session")
def opset23() -> Path:
    return exports.opset23_module_export()


@pytest.fixture(scope="session")
def smollm2_export() -> Path:
    """SmolLM2-135M-Instruct, 539 MB: built in about a minute, then kept; for end-to-end tests only."""
    return exports.smollm2()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests go first, so that no process is left alone with one in the end."""
    further.mark(items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the garbage collector need not go through it again and again, half a second a time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(2000, 10, 50)  # what is imported later is much, too
        gc.enable()
