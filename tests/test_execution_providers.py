"""Execution providers: which there are, and that sessions run on the one that is named.

onnxruntime's usual build has one beside the CPU, Azure's, which leaves all nodes of these graphs to the CPU.
"""

from typing import Any

import exports
import onnxruntime
import pytest

from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.io import model_io
from quarot_onnx.sessions import providers, runtime
from quarot_onnx.sessions.providers import CPU, Provider, running_on
from quarot_onnx.sessions.skeleton import open_augmented

AZURE = "AzureExecutionProvider"


@pytest.mark.parametrize("name", ["azure", "Azure", AZURE, AZURE.lower()])
def test_names(name: str) -> None:
    assert Provider.of(name) == Provider(AZURE)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        (
            "cuda",
            (),
            "CUDAExecutionProvider is not in this build of onnxruntime; here are: azure, cpu; `pip install onn",
        ),
        ("xnnpack", (), "XnnpackExecutionProvider is not in this build of onnxruntime; here are: azure, cpu$"),
        ("opnvino", (), r"no execution provider 'opnvino' \(did you mean 'openvino'\?\); here are: azure, cpu"),
        ("azure", ("device_id",), "option 'device_id' of a provider: give KEY=VALUE"),
        ("azure", ("=1",), "option '=1' of a provider: give KEY=VALUE"),
        ("cpu", ("threads=1",), "'threads' is an option of a provider, and the CPU has none"),
    ],
)
def test_refusals(name: str, options: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Provider.of(name, options)


def test_floats_are_computed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    assert Provider.of("cuda").options == {"use_tf32": "0"}
    assert Provider.of("cuda", ["device_id=1", "use_tf32=1"]).options == {"use_tf32": "1", "device_id": "1"}


def by_path() -> Any:
    return runtime.session(exports.optimum_export("llama"))


def by_graph() -> Any:
    return open_augmented(model_io.load(exports.optimum_export("llama")))


@pytest.mark.parametrize("way", [by_path, by_graph])
def test_sessions_run_on_it(way: Any) -> None:
    assert way().get_providers() == [CPU]
    with running_on(Provider(AZURE)):
        assert way().get_providers() == [AZURE, CPU]
        with running_on(None):
            assert way().get_providers() == [AZURE, CPU]
    assert way().get_providers() == [CPU]


@pytest.mark.parametrize("way", [by_path, by_graph])
def test_one_that_does_not_start(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime takes the CPU then, and only its log says so."""
    kept = onnxruntime.InferenceSession

    def failing(model: Any, options: Any, **_more: object) -> Any:
        return kept(model, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", failing)
    with running_on(Provider(AZURE)), pytest.raises(ModelError, match=f"onnxruntime cannot start {AZURE}: look"):
        way()


def test_libraries_in_python_packages_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVIDIA's lie where the system does not look for them; what is not there, the system may have."""
    found: list[str] = []

    def preload() -> None:
        found.append("asked")
        print("Failed to load libcublas.so")

    kept = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, options, **_: kept(model, options))
    providers.load_libraries.cache_clear()
    for name in (AZURE, "CUDAExecutionProvider"):
        with running_on(Provider(name)), pytest.raises(ModelError, match="cannot start") as told:
            by_path()
        assert ("onnxruntime-gpu[cuda,cudnn]" in str(told.value)) is (name != AZURE)
    assert found == ["asked"]
    assert capsys.readouterr().out == ""


def test_what_is_said_of_16_bits() -> None:
    half, single = (model_io.load(exports.EXPORTS[case]()) for case in ("optimum fp16", "optimum llama"))
    assert providers.notes(half) == ()
    with running_on(Provider(AZURE)):
        assert providers.notes(single) == ()
        assert "may compute in float16 itself" in providers.notes(half)[0]
