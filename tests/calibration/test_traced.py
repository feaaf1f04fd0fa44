"""What an input is for, by what becomes of it."""

import onnx_ir as ir
import pytest

from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.traced import mask_role


@pytest.mark.parametrize("sink", ["all = Identity (masked)", "all = Concat <axis=3> (masked, sink)"])
def test_what_is_added_to_scores_is_a_bias(sink: str) -> None:
    """Also where the score of a sink stands beside them, as in gpt-oss."""
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[b, 2, s, 8] q, float[b, 2, 8, t] k, float[b, 1, s, t] extra, float[b, 2, s, 1] sink) => (shares)
        {{
            scores = MatMul (q, k)
            masked = Add (scores, extra)
            {sink}
            shares = Softmax <axis=-1> (all)
        }}"""
    )
    assert mask_role(model.graph.inputs[2]) is InputRole.BIAS
