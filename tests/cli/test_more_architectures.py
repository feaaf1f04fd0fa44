"""Many architectures as they are exported, rotated, with a cache of integers, and told what is left out."""

from pathlib import Path

import more_architectures
import pytest
from command_line import Shell

# R1, R2, R3, R4 in two layers, or four. R1 passes no LayerNorm, no post-norm and no experts; R4 is for what all tokens
# go through. Bloom puts Q, K and V of each head together.
COUNTS = {
    "arcee": (5, 2, 2, 2),
    "bloom": (0, 0, 2, 2),
    "cohere": (0, 2, 2, 2),
    "gemma2": (0, 2, 2, 2),
    "glm": (5, 2, 2, 2),
    "gpt2": (0, 2, 2, 2),
    "gpt_bigcode": (0, 2, 2, 2),
    "gpt_oss": (0, 2, 2, 0),
    "granite": (5, 2, 2, 2),
    "helium": (5, 2, 2, 2),
    "nemotron": (0, 2, 2, 2),
    "olmo": (0, 2, 2, 2),
    "opt": (0, 2, 2, 2),
    "smollm3": (5, 2, 2, 2),
    "stablelm": (0, 2, 2, 2),
    "biogpt": (0, 2, 2, 2),
    "cohere2": (0, 4, 4, 4),
    "dots1": (0, 2, 2, 2),
    "ernie4_5": (5, 2, 2, 2),
    "exaone4": (0, 4, 4, 4),
    "glm4": (0, 2, 2, 2),
    "hunyuan_v1_dense": (5, 2, 2, 2),
    "mixtral": (0, 2, 2, 0),
    "olmo3": (0, 4, 4, 4),
    "olmoe": (0, 2, 2, 0),
    "qwen2_moe": (0, 2, 2, 2),
    "seed_oss": (5, 2, 2, 2),
    "starcoder2": (0, 2, 2, 2),
}


def test_all_are_expected() -> None:
    assert COUNTS.keys() == {**more_architectures.ARCHITECTURES, **more_architectures.UNLISTED}.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_rotated_and_its_cache_quantized(name: str, shell: Shell, tmp_path: Path) -> None:
    source = more_architectures.export(name)
    counts = dict(zip(("R1", "R2", "R3", "R4"), COUNTS[name], strict=True))
    found = shell.ok("inspect", source, "--json").json
    assert (found["layers"], found["sites"]) == (counts["R3"], counts)
    done = shell.ok("quantize", source, tmp_path / "q", "--kv-bits", 8, "--json").json
    assert {kind: done["recipe"]["rotation"]["counts"].get(kind, 0) for kind in counts} == counts
    assert done["equivalence"]["passed"]
    # Eight bits everywhere: some 1e-3 nats in models of few layers with random weights; a cache that decode steps read
    # otherwise than they wrote it gives 1e-1 and more.
    assert max(done["check"]["kl"], done["check"]["decode_kl"]) < 2e-2
    assert any("the key/value cache takes" in note for note in done["notes"])
    assert not any("left in float at" in note for note in done["notes"])


@pytest.mark.parametrize("name", ["bloom", "gpt_bigcode"])
def test_keys_whose_heads_lie_elsewhere_are_refused_before_the_work(name: str, shell: Shell, tmp_path: Path) -> None:
    """Bloom's lie along the third axis, GPT-BigCode's queries along the last of four."""
    source = more_architectures.export(name)
    command = ("quantize", source, tmp_path / "q", "--w-bits", 16, "--kv-bits", 4)
    refused = shell.fails(*command)
    assert "keys cannot be balanced, as their heads are not to be told apart behind RoPE" in refused
    assert "--no-k-balance" in refused
    shell.ok(*command, "--no-k-balance")
