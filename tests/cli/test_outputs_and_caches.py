"""What the command line says of outputs and caches that a rotation would change."""

from pathlib import Path

import cached_decoder as cached
from command_line import Shell
from onnx import helper


def test_a_prefill_graph_is_told_of_its_partner(shell: Shell, tmp_path: Path) -> None:
    source = cached.save(cached.build(past=False), tmp_path)
    found = shell.ok("inspect", source, "--json").json
    assert (found["sites"]["R2"], found["sites"]["R3"]) == (0, 0)
    assert shell.ok("inspect", source, "--split-cache", "--json").json["sites"]["R2"] == 2
    alone = shell.ok("rotate", source, tmp_path / "alone.onnx")
    assert "'present.0.value', which comes back by no input of this graph" in alone.err
    assert "--split-cache" in alone.err
    together = shell.ok("rotate", source, tmp_path / "both.onnx", "--split-cache", "--json").json
    assert together["recipe"]["rotation"]["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    assert together["recipe"]["rotation"]["caches"]["present.0.value"] == "R2[16]"
    assert any("rotate every graph that shares it" in note for note in together["notes"])
    assert "R2 is impossible" in shell.fails("rotate", source, tmp_path / "no.onnx", "--r2")


def test_verify_lists_what_was_compared(shell: Shell, tmp_path: Path) -> None:
    model = cached.build(layers=7)
    cached.put_out(model, "fy", helper.make_node("Identity", ["fy"], ["hidden"]))
    source = cached.save(model, tmp_path)
    shell.ok("rotate", source, tmp_path / "rotated.onnx", "--no-r1")
    shown = shell.ok("verify", source, tmp_path / "rotated.onnx").out
    assert "R2[16]" in shown
    assert "and 4 more" in shown
    listed = shell.ok("verify", source, tmp_path / "rotated.onnx", "--json").json["outputs"]
    assert [entry["name"] for entry in listed][:2] == ["logits", "hidden"]  # caches are complete at the end
    assert len(listed) == 2 + 14
    assert {entry["up_to"] for entry in listed} == {None, "R2[16]"}
