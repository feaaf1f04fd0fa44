"""Carry out a plan: weights get transforms, norms get ones, online rotations get nodes.

Nothing is computed here but the online factors; transforms are evaluated when the model is written.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import consumers, label, resolve_constant
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.edits import BalanceEdit, GammaEdit, HeadEdit, OnlineEdit, Plan, WeightEdit
from quarot_onnx.rotation.online import OnlineWriter
from quarot_onnx.rotation.rope import RopeSplitter
from quarot_onnx.rotation.transform import WeightTransform
from quarot_onnx.sites.model import HEADS_PACKED, Attention, Norm

_Build = Callable[[ir.Value], list[ir.Node]]

_DENSE_HEAD = 128
"""Up to this head_dim, Q and K are rotated by one whole matrix."""


def apply_plan(model: ir.Model, plan: Plan, shapes: Shapes | None = None) -> None:
    """Edit ``model`` in place.

    Args:
        model: The model whose sites the plan was made from.
        plan: A plan that was validated; nothing in it can fail but a bug.
        shapes: Of the model's graph; None: they are inferred.
    """
    _Application(model, shapes or Shapes(model)).run(plan)


class _Application:
    """The state that edits share: unique names, factors, the ones of folded norms."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._editor = Editor(model)
        self._online = OnlineWriter(self._editor)
        self._ropes = RopeSplitter(self._editor)
        self._shapes = shapes
        self._ones: dict[tuple[int, ir.DataType], ir.Value] = {}
        self._rotated: dict[tuple[ir.Value, int], ir.Value] = {}
        self._made: dict[ir.Value, list[tuple[WeightTransform, ir.Value]]] = {}

    def run(self, plan: Plan) -> None:
        """Apply every edit; transforms capture the original tensors, so their order does not matter."""
        for edit in plan.edits:
            if isinstance(edit, WeightEdit):
                self._weight(edit, plan.suffix)
            elif isinstance(edit, GammaEdit):
                self._gamma(edit.norm)
            elif isinstance(edit, OnlineEdit):
                self._before(edit)
            elif isinstance(edit, BalanceEdit):
                self._balance(edit)
            else:
                self._heads(edit)

    def _weight(self, edit: WeightEdit, suffix: str) -> None:
        """Replace one use of a weight; equal transforms share the result, the last other use takes the name over."""
        source = edit.transform.source.value
        old = edit.node.inputs[edit.index]
        assert old is not None
        name = source.name or "weight"
        made = self._made.setdefault(source, [])
        value = next((value for transform, value in made if transform.same_as(edit.transform)), None)
        alone = len(consumers(source)) == 1 and not source.is_graph_output()
        if value is None and old is source and alone and source.is_initializer():
            # The same value, with another tensor: the name stays.
            tensor = edit.transform.tensor(name, label(edit.node))
            source.const_value = tensor
            source.shape = ir.Shape(tensor.shape.numpy())
            return
        if value is None:
            value = self._editor.initializer(f"{name}_{suffix}", edit.transform.tensor(name, label(edit.node)))
            made.append((edit.transform, value))
        self._editor.replace_input(edit.node, edit.index, value)

    def _gamma(self, norm: Norm) -> None:
        """γ, folded into the readers, becomes ones: one initializer for all norms of a size."""
        assert norm.gamma is not None
        assert norm.gamma_use is not None
        key = (norm.gamma.shape[-1], norm.gamma.dtype)
        if key not in self._ones:
            tensor = ir.Tensor(np.ones(key[0], dtype=key[1].numpy()), dtype=key[1])
            self._ones[key] = self._editor.initializer("quarot/ones", tensor)
        node, index = norm.gamma_use
        self._editor.replace_input(node, index, self._ones[key])

    def _before(self, edit: OnlineEdit) -> None:
        """Rotate a Linear's input; Linears that share an input and its rotation share the nodes."""
        linear = edit.linear
        self._straighten(linear)
        x, dtype = linear.input, linear.weight.dtype
        key = (x, id(edit.factors))
        if key not in self._rotated:
            stem = f"{linear.name}/{edit.kind}"
            single = len(edit.factors.factors) == 1 and edit.factors.block == edit.factors.size
            if single:
                nodes = self._online.build_plain(x, edit.factors.factors[0], dtype, stem)
            else:
                nodes = self._online.build(x, edit.factors, dtype, stem)
            self._editor.after_value(x, nodes)
            self._rotated[key] = nodes[-1].outputs[0]
        linear.node.replace_input_with(0, self._rotated[key])

    def _straighten(self, linear: Linear) -> None:
        """A Gemm with transA gets its input the right way round, so that its last axis can be rotated."""
        if linear.transposed_input and linear.node.attributes.get("transA"):
            perm = ir.AttrInt64s("perm", [1, 0])
            flip = self._editor.node("Transpose", [linear.input], f"{linear.name}/Transpose", attributes=[perm])
            self._editor.before(linear.node, [flip])
            linear.node.replace_input_with(0, flip.outputs[0])
            self._editor.set_int(linear.node, "transA", 0)

    def _heads(self, edit: HeadEdit) -> None:
        """R3: rotate every head of Q and of K after RoPE."""
        rotate = partial(self._rotate_heads, rotation=edit.rotation, stem=f"{label(edit.attention.node)}/R3")
        self._behind_rope(edit.attention, rotate, rotate)

    def _balance(self, edit: BalanceEdit) -> None:
        """Multiply every head of Q and of K after RoPE by a matrix of its own, K without its centre."""
        mix = partial(self._mix_heads, stem=f"{label(edit.attention.node)}/Balance")
        queries = partial(mix, matrices=edit.queries)
        keys = partial(mix, matrices=edit.keys, centres=edit.centres)
        self._behind_rope(edit.attention, queries, keys)

    def _behind_rope(self, attention: Attention, queries: _Build, keys: _Build) -> None:
        """Put nodes behind RoPE, where all that reads Q, or K, reads what they make of it."""
        heads = attention.heads
        assert heads is not None
        if heads.fused is not None:
            split = self._ropes.split(attention)
            for index, (value, build) in enumerate(((split.query, queries), (split.key, keys))):
                nodes = build(value)
                self._editor.before(heads.fused, nodes)
                heads.fused.replace_input_with(index, nodes[-1].outputs[0])
            return
        assert heads.query is not None
        assert heads.key is not None
        self._editor.redirect(heads.query, queries)
        self._editor.redirect(heads.key, keys)

    def _mix_heads(
        self,
        value: ir.Value,
        stem: str,
        matrices: NDArray[np.float64],
        centres: NDArray[np.float64] | None = None,
    ) -> list[ir.Node]:
        """The nodes that centre and multiply heads, [batch, heads, seq, head_dim] or [batch, seq, heads · head_dim].

        What was taken out of a fused operator just now is packed.
        """
        dtype = self._shapes.dtype(value) or self._dtype()
        packed = self._shapes.rank(value) in {None, HEADS_PACKED}
        return self._online.build_heads(value, matrices, dtype, stem, packed=packed, centres=centres)

    def _rotate_heads(self, value: ir.Value, rotation: Rotation, stem: str) -> list[ir.Node]:
        """The nodes that rotate heads: orthonormal, so that the cache holds K R itself."""
        online = rotation.online(_DENSE_HEAD)
        factors = (online.factors[0] * online.weight_scale, *online.factors[1:])
        dtype = self._shapes.dtype(value) or self._dtype()
        if len(factors) == 1 and self._shapes.last(value) == rotation.size and online.block == rotation.size:
            return self._online.build_plain(value, factors[0], dtype, stem)
        return self._online.build(value, replace(online, factors=factors), dtype, stem)

    def _dtype(self) -> ir.DataType:
        """The type of activations where the exporter wrote none: that of the first Linear's weight."""
        for node in self._editor.graph:
            constant = resolve_constant(node.inputs[1]) if node.op_type == "MatMul" else None
            if constant is not None:
                return constant.dtype
        return ir.DataType.FLOAT
