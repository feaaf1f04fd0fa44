"""How far each method's Linears are from the float model's, on text that was calibrated on and on text that was not.

    python benchmarks/layer_errors.py MODEL.onnx --calib TRAIN.txt --text TEST.txt OTHER.txt [--bits 4 --act-bits 4]

The model is rotated (R1, R2, and R4 with `--act-bits`), and the Linears of the first decoder blocks are taken in the
order of the graph. At each, every method rounds the same weight W with the same statistics of the calibration text;
what it gives, Q, is measured on each text: how much the squared error of the output grows beyond that of the quantized
path's inputs alone, as a part of the output's energy,

    (||XW - X~Q||^2 - ||XW - X~W||^2) / ||X~W||^2,

negative where Q makes up for some of the inputs' error. The path goes on with the method named first. Means over all
Linears, in per cent; W itself is 0.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
from first_blocks import split_after

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.calibration.readers import TextReader, wrap
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.rounding import GPTAQConfig, GPTQConfig, QronosConfig, RoundingConfig, RTNConfig
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import rotate
from quarot_onnx.quantization.activations import round_trip
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.quantization.static_ranges import activation_of
from quarot_onnx.recipes.build import activation_spec
from quarot_onnx.recipes.own import Activations
from quarot_onnx.rounding.methods import round_weight
from quarot_onnx.sites.detect import detect
from quarot_onnx.stages.blocks import find_stages
from quarot_onnx.stages.runner import Replacement, StageRunner

METHODS: dict[str, RoundingConfig] = {
    "qronos": QronosConfig(),
    "qronos, alpha 0.5": QronosConfig(alpha=0.5),
    "qronos, alpha 1": QronosConfig(alpha=1.0),
    "qronos, alpha 1, damping 0.01": QronosConfig(alpha=1.0, perc_damp=0.01),
    "qronos, alpha 1, damping 1": QronosConfig(alpha=1.0, perc_damp=1.0),
    "gptaq": GPTAQConfig(),
    "gptaq, damping 0.01": GPTAQConfig(perc_damp=0.01),
    "gptaq, alpha 1": GPTAQConfig(alpha=1.0),
    "gptq": GPTQConfig(),
    "gptq, damping 0.1": GPTQConfig(perc_damp=0.1),
    "rtn": RTNConfig(),
}

Matrix = npt.NDArray[np.float64]


def excess(found: Statistics, weight: Matrix, rounded: Matrix) -> float:
    """With d = Q - W: (|X~d|^2 - 2 <X~d, (X - X~)W>) / |X~W|^2."""
    assert found.drift is not None
    moved = rounded - weight
    grown = np.vdot(moved, found.hessian @ moved) - 2.0 * np.vdot(moved, found.drift.T @ weight)
    return float(grown / np.vdot(weight, found.hessian @ weight))


def measured(
    source: Path, texts: Sequence[tuple[Path, int]], blocks: int, bits: int, activations: Activations
) -> Iterator[tuple[str, list[float]]]:
    """For each stage and method the excess on each text; they come with a number of windows, calibration first."""
    model = model_io.load(source)
    spec = activation_spec(activations)
    chosen, _ = split_after(blocks, model, detect(model))
    kinds = {id(linear): activation_of(spec, linear.input.name or "", {}) for linear in chosen}
    stages = find_stages(chosen, {chosen[0].node}, lambda linear: linear.transposed_input)
    with ExitStack() as stack:
        runners = [
            StageRunner(
                model,
                stages,
                list(wrap(TextReader(source, text, samples=count, seq_len=512, spread=False))),
                follow_float=True,
                scratch=Path(stack.enter_context(tempfile.TemporaryDirectory())),
                limit=1 << 30,
            )
            for text, count in texts
        ]
        before: Replacement | None = None
        for number, stage in enumerate(stages):
            kind = kinds[id(stage.linears[0])]
            fake = None if kind is None else lambda rows, kind=kind: round_trip(rows, kind)
            found = [runner.statistics(number, before, fake) for runner in runners]
            weight = np.concatenate([seen(linear.weight, linear.alpha) for linear in stage.linears], axis=1)
            weight = weight.astype(np.float64)
            results = {
                name: round_weight(
                    weight, found[0] if options.needs_statistics else None, WeightScheme(bits), options, name
                ).weight.dequantized()
                for name, options in METHODS.items()
            }
            for name, rounded in results.items():
                yield name, [excess(one, weight, rounded.astype(np.float64)) for one in found]
            widths = itertools.accumulate(linear.weight.shape[1] for linear in stage.linears)
            parts = np.split(results[next(iter(METHODS))], list(widths)[:-1], axis=1)
            given = tuple(np.ascontiguousarray(part) for part in parts)
            before = Replacement(lambda given=given: given, fake)
            print(f"{stage.input.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of Linears by rounding method, on several texts.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--calib", type=Path, required=True, metavar="TEXT", help="calibration text")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="TEXT", help="held-out texts")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens (default: 16)")
    parser.add_argument("--windows", type=int, default=4, help="windows of each held-out text (default: 4)")
    parser.add_argument("--blocks", type=int, default=3, help="decoder blocks (default: 3)")
    parser.add_argument("--bits", type=int, default=4, help="of weights (default: 4)")
    parser.add_argument("--act-bits", type=int, default=16, help="of activations per token; 16 for float (default)")
    given = parser.parse_args()
    few = given.act_bits < 8
    activations = Activations(bits=given.act_bits, symmetric=not few, clip_ratio=0.9 if few else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        rotate(given.model, source, QuarotConfig(use_random_had=True, r4=activations.quantized), verify=False)
        texts = [(given.calib, given.samples), *((text, given.windows) for text in given.text)]
        sums: dict[str, list[list[float]]] = {}
        for name, figures in measured(source, texts, given.blocks, given.bits, activations):
            sums.setdefault(name, []).append(figures)
    print(f"\n| method |{''.join(f' {text.stem} |' for text, _ in texts)}\n|---|{'--:|' * len(texts)}")
    for name, rows in sums.items():
        print(f"| {name} |{''.join(f' {100 * value:.2f} |' for value in np.mean(rows, axis=0))}")


if __name__ == "__main__":
    main()
