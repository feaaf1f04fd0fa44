"""Every shipped rotation config on an export of its architecture by its exporter; and the docs' examples."""

import json
import re
from pathlib import Path

import exports
import onnx_ir as ir
import pytest
from test_config_file import picture

from quarot_onnx.rotation_config.config_file import read_sites
from quarot_onnx.sites.detect import Survey, detect
from quarot_onnx.sites.model import Kind

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "rotation_configs").glob("*.json"))
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3")
EXPORTERS = {
    "optimum": exports.optimum_export,
    "dynamo": exports.dynamo_export,
    # The builder spells all of these alike, but for biases
    "genai": lambda name: exports.genai_like(bias=name == "qwen2"),
}


def export(path: Path) -> ir.Model:
    architecture, exporter = path.stem.split("-")
    name = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    return ir.load(EXPORTERS[exporter](name))


def test_there_is_one_for_each() -> None:
    assert {path.stem for path in SHIPPED} == {f"{a}-{e}" for a in ARCHITECTURES for e in EXPORTERS}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_names_what_detection_finds(path: Path) -> None:
    model = export(path)
    found = picture(detect(model))
    named = read_sites(path, Survey(model))
    read = picture(named.sites)
    assert {key: read[key] for key in ("r2", "mlps", "heads", "rest")} == {
        key: found[key] for key in ("r2", "mlps", "heads", "rest")
    }
    assert (read["norms"] == found["norms"]) == (Kind.R1 in named.kinds or not found["norms"])
    assert (read["r3"] == found["r3"]) == (Kind.R3 in named.kinds or not found["r3"])
    left_out = {"gemma3": {Kind.R1}}
    assert set(Kind) - named.kinds == left_out.get(path.stem, left_out.get(path.stem.split("-")[0], set()))


@pytest.mark.parametrize("layers", [1, 3])
def test_one_file_serves_every_depth(layers: int) -> None:
    model = ir.load(exports.genai_like(layers=layers))
    sites = read_sites(ROOT / "rotation_configs" / "llama-genai.json", Survey(model)).sites
    assert sites.counts() == {"R1": 2 * layers + 1, "R2": layers, "R3": layers, "R4": layers}


EXAMPLES = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "rotation_config.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_documented_examples_run(number: int, tmp_path: Path) -> None:
    (tmp_path / "rotation_config.json").write_text(EXAMPLES[number])
    named = read_sites(tmp_path / "rotation_config.json", Survey(ir.load(exports.optimum_export("llama"))))
    assert named.kinds or named.sites.online_pairs, json.loads(EXAMPLES[number])
