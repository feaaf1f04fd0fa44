"""Rotate a model file and judge the result, in one line of a test."""

from pathlib import Path

import onnx_ir as ir

from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.io import model_io
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Demand, Plan, RotationRequest, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, Sites

ALL = tuple(Kind)

# float32 rounds at 6e-8; the tiny models have some 50 operators in a row and a rotation doubles them: an error of about
# 1e-6 of the largest logit is expected. A forgotten γ, bias or transpose gives 1e-1 and more. float16 rounds 8192 times
# more coarsely.
RTOL = {ir.DataType.FLOAT: 1e-5, ir.DataType.FLOAT16: 1e-2}


def request(*kinds: Kind, demand: Demand = Demand.REQUIRED, **options: object) -> RotationRequest:
    return RotationRequest(dict.fromkeys(kinds or ALL, demand), **options)  # type: ignore[arg-type]


def rotate(source: Path, folder: Path, wanted: RotationRequest | None = None) -> tuple[Path, Sites, Plan]:
    """Rotate ``source`` into ``folder``; everything that is possible, unless told otherwise."""
    model = model_io.load(source)
    sites = detect(model)
    plan = plan_rotation(sites, wanted or request(demand=Demand.IF_POSSIBLE, seed=1))
    apply_plan(model, plan)
    target = folder / "rotated" / "model.onnx"
    model_io.save(model, target, companions_from=source.parent)
    return target, sites, plan


def check_equivalent(source: Path, target: Path) -> None:
    """The logits of prefills and decode steps agree."""
    result = compare(source, target)
    assert result.max_rel_logit_diff < RTOL[result.dtype]
    assert result.passed
