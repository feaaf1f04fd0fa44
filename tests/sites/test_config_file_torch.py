"""AMD Quark torch's QuaRot config: module paths against the scopes in names."""

import re
from typing import Any

import exports
import onnx_ir as ir
import pytest

from quarot_onnx.errors import ConfigError
from quarot_onnx.rotation_config.config_file import Dialect, read_sites
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.model import Kind

DOCUMENTED = {
    "name": "quarot",
    "online-had": False,
    "backbone": "model",
    "model_decoder_layers": "model.layers",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "self_attn": "self_attn",
}
OFFLINE, ONLINE = {Kind.R1, Kind.R2}, set(Kind)


@pytest.fixture(scope="module")
def optimum() -> ir.Model:
    return ir.load(exports.optimum_export("llama"))


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, OFFLINE),
        ({"online-had": True}, ONLINE),
        ({"online-had": True, "kv_cache_quant": False}, ONLINE - {Kind.R3}),
        ({"online-had": True, "act_quant": False}, ONLINE - {Kind.R4}),
        ({"online-had": True, "r3": False}, ONLINE - {Kind.R3}),
        ({"r2": False, "mlp": "mlp"}, {Kind.R1}),
    ],
)
def test_what_the_file_states(change: dict[str, Any], kinds: set[Kind], optimum: ir.Model) -> None:
    named = read_sites({**DOCUMENTED, **change}, Survey(optimum))
    assert named.kinds == kinds
    assert named.dialect is Dialect.QUARK_TORCH
    assert {kind for kind, count in named.sites.counts().items() if count} == kinds


def test_online_is_quark_s_default(optimum: ir.Model) -> None:
    assert read_sites({"name": "quarot", "model_decoder_layers": "model.layers"}, Survey(optimum)).kinds == ONLINE


def test_genai_s_scopes_have_names_of_their_own() -> None:
    model = ir.load(exports.genai_like())
    paths = {"v_proj": "attn.qkv_proj", "o_proj": "attn.o_proj", "self_attn": "attn"}
    assert read_sites({**DOCUMENTED, **paths}, Survey(model)).sites.counts() == {"R1": 5, "R2": 2, "R3": 0, "R4": 0}
    with pytest.raises(ConfigError, match=r"self_attn: no node lies in 'model.layers.0.self_attn' \(did you mean"):
        read_sites(DOCUMENTED, Survey(model))


def test_blocks_and_matrices(optimum: ir.Model) -> None:
    named = read_sites({**DOCUMENTED, "online-had": True, "rotation_size": 16, "random": True}, Survey(optimum))
    assert named.block_sizes == {Kind.R1: 16, Kind.R4: 16}
    assert named.notes == ("not read from the rotation config: random (set use_random_had instead)",)


WRONG = {
    "unknown key": ({"o_prj": "x"}, "unknown key 'o_prj' (did you mean 'o_proj'?)"),
    "misspelt hyphen": ({"online-hat": True}, "unknown key 'online-hat' (did you mean 'online-had'?)"),
    "both spellings": ({"online_had": True}, "are the same key"),
    "another algorithm": ({"name": "awq"}, "name='awq'"),
    "layers elsewhere": (
        {"model_decoder_layers": "model.layer"},
        "model_decoder_layers: no node lies in 'model.layer' (did you mean 'model.layers'?)",
    ),
    "backbone elsewhere": ({"backbone": "transformer"}, "backbone: no node lies in 'transformer'"),
    "no such projection": (
        {"v_proj": "self_attn.vproj"},
        "v_proj: no node lies in 'model.layers.0.self_attn.vproj' (did you mean 'model.layers.0.self_attn.v_proj'?)",
    ),
    "another projection": (
        {"v_proj": "self_attn.k_proj"},
        (
            "v_proj: the place is 'model.layers.0.self_attn.k_proj' by the file, but node "
            "'/model/layers.0/self_attn/v_proj/MatMul' by the graph"
        ),
    ),
    "no MLP": ({"online-had": True, "mlp": "ffn"}, "mlp: no node lies in 'model.layers.0.ffn'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_are_named(case: str, optimum: ir.Model) -> None:
    change, message = WRONG[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_sites({**DOCUMENTED, **change}, Survey(optimum))
    assert "\n" not in str(caught.value)


def test_names_without_scopes_are_refused_with_the_way_out() -> None:
    model = ir.load(exports.dynamo_export("llama"))
    with pytest.raises(ConfigError, match=r"carry no module paths.*leave the rotation config out.*\"detect\""):
        read_sites(DOCUMENTED, Survey(model))
