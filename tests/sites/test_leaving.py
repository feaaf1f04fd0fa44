"""What a rotation changes leaves the graph only as a cache that the same graph takes back."""

from pathlib import Path

import cached_decoder as cached
import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from rotating import request

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import rotate
from quarot_onnx.rotation.plan import plan_rotation
from quarot_onnx.rotation_config.config_file import read_sites
from quarot_onnx.sites.detect import Survey, detect
from quarot_onnx.sites.model import Kind

FLOAT16, BFLOAT16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
node = helper.make_node


def out_by(how: str, value: str) -> list[onnx.NodeProto]:
    """The nodes between a value and its output."""
    identity, cast = node("Identity", [value], ["i"]), node("Cast", [value], ["c"], to=FLOAT16)
    body = helper.make_graph(
        [node("Identity", [value], ["inner"])], "body", [], [helper.make_tensor_value_info("inner", 1, None)]
    )
    return {
        "direct": [],
        "Identity": [identity],
        "Cast": [cast],
        "chain": [identity, node("Cast", ["i"], ["c"], to=FLOAT16), node("Identity", ["c"], ["j"]),
                  node("Cast", ["j"], ["k"], to=TensorProto.FLOAT)],
        "Reshape": [node("Reshape", [value, "column"], ["flat"])],
        "part": [node("Split", [value], ["left", "right"], axis=-1, num_outputs=2), node("Identity", ["right"], ["i"])],
        "joined": [node("Concat", [value, value], ["twice"], axis=0)],
        "sum": [node("ReduceSum", [value, "last"], ["total"], keepdims=0)],
        "Squeeze": [node("Unsqueeze", [value, "last"], ["u"]), node("Squeeze", ["u", "last"], ["v"])],
        "If": [node("If", ["yes"], ["chosen"], then_branch=body, else_branch=body)],
    }[how]  # fmt: skip


WAYS = ("direct", "Identity", "Cast", "chain", "Reshape", "part", "joined", "sum", "Squeeze", "If")
# A value, and the rotation that must stay away: R1 everywhere, R2 in layer 0 alone.
VALUES = {"x0": "R1", "r0": "R1", "a0y": "R1", "a0x": "R1", "o0": "R1", "d0": "R1", "fy": "R1",
          "v0_0": "R2", "v0_2": "R2", "cx0": "R2", "ctx0": "R2"}  # fmt: skip


def exposed(value: str, how: str) -> tuple[onnx.ModelProto, str]:
    model = cached.build()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]).astype(bool), "yes"))
    kind = FLOAT16 if how == "Cast" else TensorProto.FLOAT
    return model, cached.put_out(model, value, *out_by(how, value), kind=kind)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("value", VALUES)
def test_an_output_counts_however_it_leaves(value: str, how: str, tmp_path: Path) -> None:
    model, name = exposed(value, how)
    source, target = cached.save(model, tmp_path), tmp_path / "rotated.onnx"
    done = rotate(source, target, QuarotConfig(use_random_had=True), verify=False)
    assert done.recipe["rotation"]["counts"] == (
        {"R2": 2, "R4": 2} if VALUES[value] == "R1" else {"R1": 5, "R2": 1, "R4": 2}
    )
    assert any(note.startswith(VALUES[value]) for note in done.notes)
    before, after = (cached.run(path, {"input_ids": cached.IDS}) for path in (source, target))
    # Rounding of the type; what is rotated differs by about one.
    limit = 2e-3 if how in ("Cast", "chain") else 1e-5
    assert cached.difference(before[name], after[name]) < limit
    assert cached.difference(before["logits"], after["logits"]) < 1e-5


@pytest.mark.parametrize("value", ["mm0", "pr0", "sc0", "q0_2", "a0m", "a0r"])
def test_what_no_rotation_reaches_may_leave(value: str, tmp_path: Path) -> None:
    model, name = exposed(value, "Identity")
    source, target = cached.save(model, tmp_path), tmp_path / "rotated.onnx"
    assert rotate(source, target, QuarotConfig()).recipe["rotation"]["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    before, after = (cached.run(path, {"input_ids": cached.IDS}) for path in (source, target))
    assert cached.difference(before[name], after[name]) < 1e-5


@pytest.mark.parametrize("how", ["direct", "Identity", "Cast", "chain"])
@pytest.mark.parametrize("value", ["q0_2", "k0_2"])
def test_queries_and_keys_that_leave_get_no_r3(value: str, how: str, tmp_path: Path) -> None:
    model, name = exposed(value, how)
    sites = detect(model_io.load(cached.save(model, tmp_path)))
    assert sites.counts() == {"R1": 5, "R2": 2, "R3": 1, "R4": 2}
    assert [(entry.kind, repr(name) in entry.reason) for entry in sites.left_out] == [(Kind.R3, True)]


def test_a_weight_that_is_an_output_keeps_what_it_holds(tmp_path: Path) -> None:
    model = cached.build()
    for name in ("Wo0", "a0g"):
        cached.put_out(model, name)
    source, target = cached.save(model, tmp_path), tmp_path / "rotated.onnx"
    rotate(source, target, QuarotConfig())
    before, after = (cached.run(path, {"input_ids": cached.IDS}) for path in (source, target))
    for name in ("Wo0", "a0g"):
        np.testing.assert_array_equal(before[name], after[name])


def test_a_config_file_does_not_open_the_way(tmp_path: Path) -> None:
    """Also where the file names the places itself."""
    model, _ = exposed("v0_2", "Identity")
    loaded = model_io.load(cached.save(model, tmp_path))
    place = {"attention": "node_pr0", "value": "node_v0_0", "output": "node_o0"}
    sites = read_sites({"format": "quarot_onnx/1", "R2": [place]}, Survey(loaded)).sites
    assert not sites.r2
    assert "V leaves the graph as 'i'" in next(sites.why_not(Kind.R2)).reason


def test_a_copy_of_the_cache_is_no_cache(tmp_path: Path) -> None:
    model = cached.build()
    cached.put_out(model, "present.0.value", node("Identity", ["present.0.value"], ["copy"]))
    sites = detect(model_io.load(cached.save(model, tmp_path)))
    assert sites.counts()["R2"] == 1
    assert "V leaves the graph as 'copy' too" in next(sites.why_not(Kind.R2)).reason


def test_an_output_that_is_listed_twice_is_one(tmp_path: Path) -> None:
    model = cached.build()
    model.graph.output.append(model.graph.output[2])
    model.graph.output.append(model.graph.output[0])
    assert detect(model_io.load(cached.save(model, tmp_path))).counts()["R2"] == 2


PREFILL = "comes back by no input of this graph"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ({"past": False}, PREFILL),
        ({"past": True, "present": False}, "'past_key_values.0.key' comes in and does not leave"),
        ({"past": True, "cross": "given"}, "'past_cross.0.key' comes in and does not leave"),
        ({"past": False, "cross": "made"}, PREFILL),
    ],
    ids=["prefill", "no present", "second half", "first half"],
)
def test_a_cache_of_another_graph_stays_as_it_is(graph: dict, reason: str, tmp_path: Path) -> None:
    model = model_io.load(cached.save(cached.build(**graph), tmp_path))
    sites = detect(model)
    assert (sites.counts()["R2"], sites.counts()["R3"]) == (0, 0)
    assert all(any(reason in entry.reason for entry in sites.why_not(kind)) for kind in (Kind.R2, Kind.R3))
    assert all("--split-cache" in e.reason for e in sites.why_not(Kind.R2) if "from the graph input" not in e.reason)
    together = detect(model, split_cache=True)
    assert together.counts()["R2"] == 2
    assert all("past_cross" in e.reason or "cross-attention" in e.reason for e in together.why_not(Kind.R2))


def both(prefill: Path, decode: Path, more: dict | None = None) -> np.ndarray:
    """The logits of a decode step on the prefill graph's cache."""
    made = cached.run(prefill, {"input_ids": cached.IDS} | (more or {}))
    cache = {name.replace("present", "past_key_values"): value for name, value in made.items() if "present" in name}
    cross = {f"past_cross.{name[2]}.{part}": made[name] for name in made if name[:2] in ("ck", "cv")
             for part in ("key", "value") if part[0] == name[1]}  # fmt: skip
    return cached.run(decode, {"input_ids": cached.IDS[:, :1]} | cache | cross)["logits"]


def test_a_prefill_graph_alone_fits_its_untouched_partner(tmp_path: Path) -> None:
    prefill, decode = (cached.save(cached.build(past=past), tmp_path, f"{past}.onnx") for past in (False, True))
    for options in (QuarotConfig(), QuarotConfig(use_random_had=True), QuarotConfig(r4=False)):
        rotate(prefill, tmp_path / "rotated.onnx", options, verify=False)
        assert cached.difference(both(prefill, decode), both(tmp_path / "rotated.onnx", decode)) < 1e-5


@pytest.mark.parametrize("cross", ["", "made"])
@pytest.mark.parametrize("r3", [False, True])
def test_two_halves_rotated_alike_fit(cross: str, r3: bool, tmp_path: Path) -> None:
    halves = (cached.build(past=False, cross=cross), cached.build(cross="given" if cross else ""))
    paths = [cached.save(model, tmp_path, f"{i}.onnx") for i, model in enumerate(halves)]
    options = QuarotConfig(use_random_had=True, seed=3, split_cache=True, r3=r3)
    targets = [tmp_path / f"rotated{i}.onnx" for i in range(2)]
    for path, target in zip(paths, targets, strict=True):
        done = rotate(path, target, options, verify=False)
        assert done.recipe["rotation"]["counts"]["R2"] == 2
        assert any("rotate every graph that shares it" in note for note in done.notes)
    more = {"encoder": np.random.default_rng(1).standard_normal((1, 5, cached.HIDDEN)).astype(np.float32)}
    more = more if cross else {}
    assert cached.difference(both(*paths, more), both(*targets, more)) < 1e-5
    assert cached.difference(both(*paths, more), both(paths[0], targets[1], more)) > 1e-2


def test_the_plan_says_which_outputs_hold_which_rotation(tmp_path: Path) -> None:
    sites = detect(model_io.load(cached.save(cached.build(layers=1), tmp_path)))
    plan = plan_rotation(sites, request())
    assert plan.caches == {"present.0.value": "R2[16]", "present.0.key": "R3[16]"}
    assert plan.record()["caches"] == plan.caches


def fused(change: str) -> ir.Model:
    """A genai-like graph: GroupQueryAttention with Q, K and V packed, without some of its caches."""
    model = model_io.load(exports.genai_like())
    if change == "no present":
        kept = [value for value in model.graph.outputs if "present" not in str(value.name)]
        model.graph.outputs.clear()
        model.graph.outputs.extend(kept)
    for attention in (item for item in model.graph if item.op_type == "GroupQueryAttention"):
        for place in (3, 4) if change == "no past" else ():
            attention.replace_input_with(place, None)
    return model


@pytest.mark.parametrize(("change", "reason"), [("no present", "comes in and does not leave"), ("no past", PREFILL)])
def test_fused_attentions_without_some_of_their_caches(change: str, reason: str) -> None:
    whole = detect(fused("")).counts()
    sites = detect(fused(change))
    assert sites.counts() == whole | {"R2": 0, "R3": 0}
    assert all(reason in entry.reason for entry in sites.left_out)
    assert detect(fused(change), split_cache=True).counts() == whole
