"""Do the fixed scales of a key/value cache hold at positions that calibration never saw?

    python benchmarks/cache_positions.py MODEL.onnx CALIBRATION.txt TEST.txt [--calibrated 512] [--length 4096]

The model is rotated with R3 and without. Peaks of keys and values are taken on windows of ``--calibrated`` tokens, and
one window of ``--length`` tokens of the test text is rounded with them, to 8 bits: per channel, head and tensor.
Printed is the relative error, the norm of what rounding changes by the norm of what there was, for parts of the window;
the share of values beyond the scales; beside it the error of scales found for every token and head, which know nothing
of positions. Of all layers the mean.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx import KVCacheConfig, QuarotConfig
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.text import choose_bos, load_tokenizer, read_text, tokenizer_file, windows
from quarot_onnx.config.choices import CacheScales
from quarot_onnx.kvcache.integers import highest, rounded
from quarot_onnx.kvcache.scales import Observed, fixed_scales
from quarot_onnx.pipeline import rotate
from quarot_onnx.sessions import runtime

BITS = 8
NONE = np.zeros((0, 0, 0), np.float32)
KINDS = (CacheScales.CHANNEL, CacheScales.HEAD, CacheScales.TENSOR)


def caches(model: Path, ids: NDArray[np.int64]) -> Iterator[tuple[bool, NDArray[np.float32]]]:
    """Keys and values of a window, cache by cache."""
    inputs = ModelInputs.from_path(model)
    names = [present for _, present in inputs.presents]
    found = runtime.session(model, low_memory=True).run(names, inputs.feed(ids[None]))
    for name, array in zip(names, found, strict=True):
        yield "key" in name, array[:, :, : len(ids)]


def relative(x: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float64]:
    """The relative error of every position, [positions]."""
    change = rounded(x, scales, BITS).astype(np.float32) * scales - x
    return np.sqrt((change.astype(np.float64) ** 2).sum((0, 1, 3)) / (x.astype(np.float64) ** 2).sum((0, 1, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--calibrated", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    source = tokenizer_file(options.model.parent)
    tokenizer, bos = load_tokenizer(source), choose_bos(source).id
    cut = [
        windows(read_text(path), tokenizer, length=length, count=count, bos_id=bos)
        for path, length, count in (
            (options.calibration, options.calibrated, options.windows),
            (options.test, options.length, 1),
        )
    ]
    edges = [1, 64, options.calibrated, *range(1024, options.length + 1, 1024)]
    parts = list(itertools.pairwise(edges))
    with tempfile.TemporaryDirectory() as folder:
        for r3 in (True, False):
            model = Path(folder) / f"{r3}" / "model.onnx"
            rotate(options.model, model, QuarotConfig(r3=r3), verify=False)
            print(f"\n{'with' if r3 else 'without'} R3: relative error at positions, and values beyond the scales")
            table(model, cut[0], cut[1][0], parts)


def table(model: Path, calibration: NDArray[np.int64], test: NDArray[np.int64], parts: list[tuple[int, int]]) -> None:
    """Measure one model, and print."""
    peaks: list[NDArray[np.float64]] = []
    for row in calibration:
        own = [np.abs(array).max(axis=(0, 2)).astype(np.float64) for _, array in caches(model, row)]
        peaks = own if not peaks else [np.maximum(*pair) for pair in zip(peaks, own, strict=True)]
    config = KVCacheConfig(bits=BITS)
    errors: dict[tuple[bool, str], list[NDArray[np.float64]]] = {}
    beyond: dict[tuple[bool, str], list[float]] = {}
    for (keys, array), peak in zip(caches(model, test), peaks, strict=True):
        for kind in KINDS:
            scales = fixed_scales(Observed(peak, NONE), config.grid(keys=keys), kind)
            errors.setdefault((keys, kind), []).append(relative(array, scales))
            beyond.setdefault((keys, kind), []).append(float((np.abs(array) > scales * (highest(BITS) + 0.5)).mean()))
        own = (np.abs(array).max(axis=-1, keepdims=True) / highest(BITS)).astype(np.float32)
        errors.setdefault((keys, "token"), []).append(relative(array, own))
    print("| | scales | " + " | ".join(f"{a}-{b}" for a, b in parts) + " | beyond |")
    print("|---|---|" + "--:|" * (len(parts) + 1))
    for (keys, kind), found in errors.items():
        mean = np.mean(found, axis=0)
        cells = " | ".join(f"{mean[a:b].mean():.4f}" for a, b in parts)
        share = f"{100 * np.mean(beyond[keys, kind]):.3f} %" if (keys, kind) in beyond else ""
        print(f"| {'K' if keys else 'V'} | {str(kind).lower()} | {cells} | {share} |")


if __name__ == "__main__":
    main()
