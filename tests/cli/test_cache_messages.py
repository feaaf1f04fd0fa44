"""What is said of the cache's settings is said in the words of whoever chose them: options, files, Python."""

from collections.abc import Callable
from pathlib import Path

import exports
import pytest
from command_line import Shell

from quarot_onnx import KVCacheConfig, QConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.pipeline import quantize

BUILDERS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "genai": exports.genai_like,
    "dynamo": lambda: exports.dynamo_export("llama"),
}
GQA = "/model/layers.0/attn/GroupQueryAttention is a GroupQueryAttention"
OF_OPTIONS = [
    ("--kv-bits 8 --k-bits 8", "optimum", "--kv-bits 8 and --k-bits 8 say the same thing twice; leave out one"),
    ("--kv-bits 8 --v-bits 4", "optimum", "--kv-bits 8 and --v-bits 4 contradict each other; leave out one"),
    ("--kv-bits 1", "optimum", "--kv-bits 1: keys and values have 2 to 8 bits, or 16"),
    ("--k-bits 9", "optimum", "--k-bits 9: keys and values have 2 to 8 bits, or 16"),
    ("--v_bits 1 --w-bits 16", "optimum", "--v-bits 1: keys and values have 2 to 8 bits, or 16"),
    ("--kv-bits 4 --k-groupsize 1", "optimum", "--k-groupsize 1: a group has 2 or more entries of a head"),
    ("--kv-bits 4 --k-groupsize 7", "optimum", "--k-groupsize 7 does not divide the heads of 32 entries"),
    ("--w-bits 16 --v_bits 4 --v_groupsize 7", "optimum", "--v-groupsize 7 does not divide the heads of 32 entries"),
    ("--kv-bits 8 --k-clip-ratio 2", "optimum", "--k-clip-ratio 2.0: Input should be less than or equal to 1"),
    (
        "--kv-bits 3 --kv-format int",
        "optimum",
        "--kv-format int: --kv-bits 3: integers are kept with 8 or 4 bits; use ",
    ),
    ("--v-bits 3 --kv-format int", "optimum", "--kv-format int: --v-bits 3: integers are kept with 8 or 4 bits; use "),
    ("--kv-bits 8 --k-asym --kv-format int", "optimum", "--kv-format int: --k-asym: integers are kept on symmetric"),
    ("--kv-bits 8 --v-groupsize 16 --kv-format int", "optimum", "--kv-format int: --v-groupsize 16: integers are kept"),
    ("--kv-bits 8 --k-pre-rope --kv-format int", "optimum", "--kv-format int: --k-pre-rope: keys before RoPE would"),
    (
        "--kv-bits 3 --kv-scales head",
        "optimum",
        "--kv-scales head: --kv-bits 3: integers are kept with 8 or 4 bits, and",
    ),
    ("--kv-bits 8 --kv-format fake --kv-scales head", "genai", "--kv-scales head: --kv-format fake, and fake scales"),
    ("--kv-bits 3 --kv-scale-file x.json", "genai", "--kv-scale-file x.json: --kv-bits 3: integers are kept with"),
    ("--kv-bits 8 --kv-scale-file x.json --kv-scales head", "genai", "--kv-scales head: --kv-scale-file x.json says"),
    ("--kv-bits 8 --kv-scale-file x.json --v-clip-ratio 0.9", "genai", "--v-clip-ratio 0.9: the scales of --kv-scale-"),
    ("--kv-bits 8 --kv-scale-file x.json", "genai", "x.json: cannot be read: No such file"),
    (
        "--kv-bits 8 --kv-scales token",
        "genai",
        f"--kv-scales token: {GQA}, whose tokens can have scales of their own with 4 bits alone: use --kv-bits 4, --kv",
    ),
    ("--k-bits 8 --v-bits 4", "genai", f"--k-bits 8 and --v-bits 4: {GQA}, which keeps K and V in one type; give both"),
    ("--k-bits 8", "genai", f"--k-bits 8 alone: {GQA}, which keeps K and V in one type; add --v-bits 8, or round them"),
    ("--v-bits 4", "genai", f"--v-bits 4 alone: {GQA}, which keeps K and V in one type; add --k-bits 4, or round them"),
    ("--kv-bits 8", "dynamo", "the graph has no key/value cache"),
    ("--k-bits 3 --k-pre-rope --r3", "optimum", "--k-pre-rope: keys are rounded before RoPE, and R3 (--r3) rotates"),
    ("--k-bits 3 --k-pre-rope --r3", "genai", "--k-pre-rope: keys are rounded before RoPE, and R3 (--r3) rotates"),
    ("--kv-bits 8 --prefix npz --scheme w8a8-static", "optimum", "keep the prefix in the graph (--prefix graph), or "),
    ("--kv-bits 8 --kv-format in", "optimum", "Invalid value for '--kv-format': no CacheForm has this name"),
]
WAYS = [
    ("--kv-bits 3 --kv-format int", "optimum", "; use --kv-format fake"),
    ("--k-bits 8 --v-bits 4", "genai", "for studies: --kv-format fake"),
    (
        "--kv-bits 8 --kv-scales token",
        "genai",
        "use --kv-bits 4, --kv-scales head, --kv-scales channel or --kv-scales tensor, or round",
    ),
]


@pytest.mark.parametrize(("options", "exporter", "named"), [*OF_OPTIONS, *WAYS])
def test_options_are_named_as_they_were_typed(
    shell: Shell, options: str, exporter: str, named: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    error = shell.fails("quantize", BUILDERS[exporter](), out / "model.onnx", *options.split())
    assert named in error
    assert not named.startswith("--") or error.startswith(f"error: {named}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            "--k-groupsize 16 --k-asym",
            "of no effect, as the key/value cache stays in float: --k-groupsize 16, --k-asym",
        ),
        ("--w-bits 16 --v-bits 8 --k-pre-rope", "of no effect, as keys stay in float: --k-pre-rope"),
        ("--w-bits 16 --kv-bits 3", "nothing gets smaller: --kv-bits 3: integers are kept with 8 or 4 bits"),
        ("--w-bits 16 --k-bits 3", "nothing gets smaller: --k-bits 3: integers are kept with 8 or 4 bits"),
    ],
)
def test_notes_name_options(shell: Shell, options: str, told: str, tmp_path: Path) -> None:
    source = BUILDERS["optimum"]()
    quick = ("--no-verify", "--no-check")
    assert told in shell.ok("quantize", source, tmp_path / "model.onnx", *options.split(), *quick).err


FILES = [
    (
        "kv_cache: {bits: 4, k_groupsize: 7}",
        "{file}: kv_cache.k_groupsize: 7 does not divide the heads of 32",
        "optimum",
    ),
    ("kv_cache: {k_bits: 8, v_bits: 4}", "{file}: kv_cache.k_bits: 8 and kv_cache.v_bits: 4: ", "genai"),
    ("kv_cache: {bits: 8, scales: token}", "{file}: kv_cache.scales: 'token': ", "genai"),
]


@pytest.mark.parametrize(("section", "named", "exporter"), FILES)
def test_files_are_named_with_their_keys(shell: Shell, section: str, named: str, exporter: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"weights: {{bits: 16}}\n{section}\n")
    error = shell.fails("quantize", BUILDERS[exporter](), tmp_path / "out.onnx", "--recipe", file)
    assert error.startswith(f"error: {named.format(file=file)}")


def test_a_shared_number_of_bits_is_named_as_the_file_has_it(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("weights: {bits: 16}\nkv_cache: {bits: 3}\n")
    options = ("--recipe", file, "--no-verify", "--no-check")
    told = shell.ok("quantize", BUILDERS["optimum"](), tmp_path / "out.onnx", *options).err
    assert f"nothing gets smaller: {file}: kv_cache.bits: 3: integers are kept" in told
    error = shell.fails("quantize", BUILDERS["optimum"](), tmp_path / "b.onnx", *options, "--kv-format", "int")
    assert "--kv-format int: kv_cache.bits: 3: integers are kept with 8 or 4 bits; use " in error


def test_llmc_has_its_own_keys_and_values(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "llmc.yml"
    file.write_text(
        "quant: {method: RTN, weight: {bit: 8, symmetric: true, granularity: per_channel, group_size: -1},\n"
        "  kvcache: {method: Naive, bit: 4, symmetric: false, granularity: per_group, group_size: 7}}\n"
        "save: {save_fake: false}\n"
    )
    source = BUILDERS["optimum"]()
    error = shell.fails("quantize", source, tmp_path / "out.onnx", "--recipe", file)
    assert error.startswith(f"error: {file}: quant.kvcache.group_size: 7 does not divide the heads of 32")
    error = shell.fails("quantize", source, tmp_path / "out.onnx", "--recipe", file, "--kv-format", "int")
    assert "--kv-format int: quant.kvcache.symmetric: False: integers are kept on symmetric grids" in error


def test_python_has_its_own_words(tmp_path: Path) -> None:
    def told(exporter: str, **cache: object) -> str:
        try:
            quantize(BUILDERS[exporter](), tmp_path / "m.onnx", QConfig(None, algo_config=[KVCacheConfig(**cache)]))
        except ConfigError as error:
            return str(error)
        return "nothing"

    assert told("optimum", bits=4, k_groupsize=7).startswith("k_groupsize=7 does not divide the heads of 32")
    assert told("genai", k_bits=8).startswith(f"k_bits=8 alone: {GQA}, which keeps K and V in one type; add v_bits=8")
    assert told("genai", bits=8, scales="token").endswith("or round it in float, for studies: form='fake'")
    assert told("optimum", bits=3, form="int").startswith("KVCacheConfig: form='int': k_bits=3: integers are kept")
    assert told("optimum", bits=8, v_bits=4).startswith("KVCacheConfig: bits=8 and v_bits=4 contradict each other")
