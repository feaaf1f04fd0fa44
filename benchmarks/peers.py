"""What 8 bits with fixed scales cost to make, here and with other tools for ONNX: processor time, memory, perplexity.

    python benchmarks/peers.py MODEL.onnx TEXT [--eval TEXT] [--samples 8] [--seq-len 256] [--envs FOLDER] [--peer NAME]

quarot_onnx rotates, proves and quantizes, as it does by default and piece by piece; onnxruntime's quantize_static, AMD
Quark and AIMET-ONNX quantize as they do by default, min-max and MatMuls where they can be told so. All read the same
windows of the text. Peers but onnxruntime get an environment of their own in ``--envs``, made once; where that cannot
be made, or a peer fails, its row tells the reason. Every tool is a process of its own, watched from outside; ratios are
to onnxruntime's. Outputs are removed.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = {
    "quark": ("torch==2.13.0", "amd-quark==0.13", "onnxruntime==1.32.0"),
    "aimet": ("torch==2.13.0", "aimet-onnx==2.42.0"),
}
"""What pip installs into the environment of a peer, one after the other."""

NAMES = {
    "quarot": "quarot_onnx",
    "pieces": "quarot_onnx, `--by-stages`",
    "onnxruntime": "quantize_static",
    "quark": "AMD Quark",
    "aimet": "AIMET-ONNX",
}


@dataclass
class Reader:
    """Samples from a folder, as onnxruntime's calibration readers give them."""

    files: list[Path]
    place: int = 0

    def get_next(self) -> dict[str, Any] | None:
        import numpy as np  # noqa: PLC0415 - also runs in the environments of peers

        if self.place == len(self.files):
            return None
        self.place += 1
        return dict(np.load(self.files[self.place - 1]))

    def rewind(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (feeds := self.get_next()) is not None:
            yield feeds


def static_int8(model: Path, out: Path, reader: Any) -> None:
    """onnxruntime's own tool: W8A8 with fixed scales, an activation's per tensor, a weight's per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415

    quantize_static(
        model, out, reader, quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"], per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )  # fmt: skip


def calibration_reader(files: list[Path]) -> Any:
    """The samples as a reader that onnxruntime's tools take."""
    from onnxruntime.quantization import CalibrationDataReader  # noqa: PLC0415

    return type("Samples", (Reader, CalibrationDataReader), {})(files)


def with_onnxruntime(model: Path, out: Path, files: list[Path]) -> None:
    static_int8(model, out, calibration_reader(files))


def with_quark(model: Path, out: Path, files: list[Path]) -> None:
    from quark.onnx import CalibMethod, Int8Spec, ModelQuantizer, QConfig, QLayerConfig, UInt8Spec  # noqa: PLC0415

    layer = QLayerConfig(activation=UInt8Spec(calibration_method=CalibMethod.MinMax), weight=Int8Spec())
    config = QConfig(global_config=layer, OpTypesToQuantize=["MatMul", "Gemm"], UseExternalData=True)
    ModelQuantizer(config).quantize_model(str(model), str(out), calibration_reader(files))


def with_aimet(model: Path, out: Path, files: list[Path]) -> None:
    import onnx  # noqa: PLC0415
    from aimet_onnx.quantsim import QuantizationSimModel  # noqa: PLC0415
    from aimet_onnx.utils import duplicate_shared_initializers  # noqa: PLC0415

    model_proto = onnx.load(model)
    duplicate_shared_initializers(model_proto.graph)
    sim = QuantizationSimModel(
        model_proto, param_type="int8", activation_type="int8", providers=["CPUExecutionProvider"]
    )
    sim.compute_encodings(Reader(files))
    onnx.save(sim.to_onnx_qdq(), out, save_as_external_data=True, location=f"{out.name}.data")


WORK: dict[str, Callable[[Path, Path, list[Path]], None]] = {
    "onnxruntime": with_onnxruntime,
    "quark": with_quark,
    "aimet": with_aimet,
}


def environment(peer: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made where it is not there."""
    python = folder / peer / "bin" / "python"
    ready = folder / peer / "ready"
    if ready.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder / peer], check=True)
    for package in PACKAGES[peer]:
        install = [python, "-m", "pip", "install", "--quiet", package]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {package}: {last_line(done.stderr)}")
    ready.touch()
    return python


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1].strip()[:160] if lines else "no reason given"


def write_samples(model: Path, text: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """The windows of the text as feeds of the model, a file each."""
    import numpy as np  # noqa: PLC0415

    from quarot_onnx.calibration.readers import TextReader  # noqa: PLC0415

    reader, number = TextReader(model, text, samples=arguments.samples, seq_len=arguments.seq_len), 0
    while (feeds := reader.get_next()) is not None:
        np.savez(folder / f"{number:05}.npz", **feeds)
        number += 1


def perplexity(model: Path, source: Path, text: Path) -> float:
    from quarot_onnx.evaluation.perplexity import perplexity as measured  # noqa: PLC0415

    return measured(model, text, source.parent).perplexity


def command_of(peer: str, arguments: argparse.Namespace, out: Path, samples: Path) -> list[str]:
    """What makes the output of a tool."""
    if peer in ("quarot", "pieces"):
        words = ["quantize", arguments.model, out, "--scheme", "w8a8-static", "--calib-text", arguments.text]
        words += ["--calib-samples", arguments.samples, "--calib-seq-len", arguments.seq_len, "--no-check", "--quiet"]
        words += ["--by-stages"] if peer == "pieces" else []
        return [sys.executable, "-m", "quarot_onnx", *map(str, words)]
    python = sys.executable if peer == "onnxruntime" else environment(peer, arguments.envs)
    return [*map(str, (python, Path(__file__).resolve(), arguments.model, samples, "--work", peer, "--out", out))]


def row(peer: str, arguments: argparse.Namespace, samples: Path, usual: dict[str, float]) -> str:
    """A line of the table."""
    from scale import run  # noqa: PLC0415 - beside this file, and none of the peers' business

    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        out, said = Path(folder) / "model.onnx", Path(folder) / "errors.txt"
        try:
            with said.open("w") as errors:
                cost = run(command_of(peer, arguments, out, samples), errors)
        except RuntimeError as error:
            return f"| {NAMES[peer]} | cannot be installed: {error} |"
        except SystemExit:
            return f"| {NAMES[peer]} | fails: {last_line(said.read_text(errors='replace'))} |"
        if peer == "onnxruntime":
            usual.update(user=cost.user, peak=cost.peak)
        cells = [f"{cost.wall:.1f}", f"{cost.user:.1f}", f"{cost.user / usual['user']:.2f}"]
        cells += [f"{cost.peak:,.0f}", f"{cost.peak / usual['peak']:.2f}"]
        if arguments.eval is not None:
            try:
                found = perplexity(out, arguments.model, arguments.eval)
                cells.append(f"{found / usual['perplexity']:.3f}")
            except Exception as error:  # noqa: BLE001 - whatever it is, the row says so
                cells.append(last_line(str(error)))
    return f"| {NAMES[peer]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What 8 bits cost to make, here and with other tools for ONNX.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("text", type=Path, metavar="TEXT", help="what is calibrated on")
    parser.add_argument("--eval", type=Path, metavar="TEXT", help="perplexities on this text, relative to float")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="windows (default: 8)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="L", help="tokens of a window (default: 256)")
    parser.add_argument("--envs", type=Path, default=Path(".peers"), metavar="FOLDER", help="default: .peers")
    parser.add_argument("--peer", choices=NAMES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model, arguments.envs = arguments.model.absolute(), arguments.envs.absolute()
    if arguments.work is not None:
        WORK[arguments.work](arguments.model, arguments.out, sorted(arguments.text.glob("*.npz")))
        return
    heads = ["s", "user s", "relative", "peak MB", "relative", *["perplexity"] * (arguments.eval is not None)]
    usual: dict[str, float] = {}
    if arguments.eval is not None:
        usual["perplexity"] = perplexity(arguments.model, arguments.model, arguments.eval)
    print(f"| | {' | '.join(heads)} |")
    print(f"|---|{'--:|' * len(heads)}")
    with tempfile.TemporaryDirectory() as samples:
        write_samples(arguments.model, arguments.text, Path(samples), arguments)
        for peer in ("onnxruntime", *(peer for peer in arguments.peer or NAMES if peer != "onnxruntime")):
            print(row(peer, arguments, Path(samples), usual), flush=True)


if __name__ == "__main__":
    main()
