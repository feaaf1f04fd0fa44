"""The Linears of a model's first blocks, for benchmarks that leave the others in float."""

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linears
from quarot_onnx.sites.model import Sites


def split_after(blocks: int, model: ir.Model, sites: Sites) -> tuple[list[Linear], list[Linear]]:
    """The Linears up to the down projection of a block, and those after it, both in graph order."""
    if not 1 <= blocks <= len(sites.mlps):
        raise SystemExit(f"--blocks {blocks}: the model has {len(sites.mlps)}")
    every = list(linears(model.graph))
    end = [linear.node for linear in every].index(sites.mlps[blocks - 1].node) + 1
    return every[:end], every[end:]
