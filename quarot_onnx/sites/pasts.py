"""Which inputs of a graph hold the earlier keys and values of an attention."""

import onnx_ir as ir

from quarot_onnx.graph.caches import FUSED_CACHES, pasts_behind
from quarot_onnx.graph.query import data_input
from quarot_onnx.sites.attention import FUSED
from quarot_onnx.sites.scores import context_product, score_product

KEY, VALUE = 1, 2
"""Where fused attentions take K and V, and where they put out the caches of both."""


def past_inputs(attention: ir.Node, which: int) -> list[ir.Value]:
    """The inputs of the graph that hold an attention's earlier keys (``KEY``) or values (``VALUE``).

    Args:
        attention: The Softmax or the fused operator.
        which: Of which.
    """
    if (attention.domain, attention.op_type) in FUSED:
        caches = FUSED_CACHES[attention.domain, attention.op_type]
        places = (which, *(index for index, out in caches.items() if out == which))
        held = [attention.inputs[index] for index in places if index < len(attention.inputs)]
        return [past for value in held for past in pasts_behind(value)]
    product = context_product(attention.outputs[0]) if which == VALUE else score_product(data_input(attention))
    return [] if product is None else pasts_behind(product.inputs[1])
