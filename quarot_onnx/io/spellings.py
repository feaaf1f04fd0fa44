"""One spelling for what onnxruntime accepts in several, so that nothing further on has to know the others.

* The standard domain may be called ``ai.onnx``; here it is ``""``.
* Nodes may stand in any order (common float16 converters append their Casts); here each stands behind what it reads.
* Initializers may be listed among the inputs. From IR version 4 on such an input has a default, which whoever runs the
  model may override (the rank of an adapter, a temperature): it stays an input. Before, every initializer had to be
  listed, and all of them are constants: that is what the ONNX specification says and what onnxruntime does.
* Local functions may import another version of an operator set than the model. ONNX and onnxruntime then apply the
  model's, which is right where every operator means the same in both; they are inlined here.
* onnxruntime's optimiser puts an activation into the Gemm before it (FusedGemm), and a bias into the Skip-norm behind
  it. Here they are taken out again; it puts them back when it loads the result.
"""

from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.io.names import Names
from quarot_onnx.io.nodes import all_graphs, all_nodes, in_order, subgraphs
from quarot_onnx.io.opsets import STANDARD_DOMAINS, means_the_same
from quarot_onnx.io.tensors import read_array

_DEFAULTS_SINCE = 4
"""The IR version from which an initializer that is an input is its default, and one that is none a constant."""


_ACTIVATION_OPTIONS = {
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
}
"""What the activations of a FusedGemm take."""

_SKIP_BIAS = 3
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul"})


def name_standard_domain(proto: onnx.ModelProto) -> None:
    """Call the standard domain ``""`` wherever the model calls it ``ai.onnx``; of two imports the last one counts."""
    for imports in (proto.opset_import, *(function.opset_import for function in proto.functions)):
        for opset in imports:
            if opset.domain in STANDARD_DOMAINS:
                opset.domain = ""
    for node in _nodes(proto):
        if node.domain in STANDARD_DOMAINS and node.domain:
            node.domain = ""


def respell(model: ir.Model, source: object) -> None:
    """Sort the nodes, inline functions, part fused nodes, make the initializers of old models constants; in place.

    Args:
        model: The model, as it was deserialized.
        source: Its file, for messages.

    Raises:
        ModelError: Nodes of one name, or that need each other's results, or a function whose operators mean something
            else in the version that the model imports.
    """
    _refuse_shared_names(model, source)
    for function in model.functions.values():
        _sort(function, source)
    _sort(model.graph, source)
    if model.functions:
        for function in _called(model):
            _import_as_model(function, model, source)
        common_passes.InlinePass()(model)
    parted = [node for node in all_nodes(model.graph) if node.op_type in _PARTED]
    names = Names(model) if parted else None
    for node in parted:
        assert names is not None
        _PARTED[node.op_type](node, names)
    if (model.ir_version or 0) < _DEFAULTS_SINCE:
        common_passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = _DEFAULTS_SINCE  # before, an initializer that is no input was not allowed


def weights_with_default(graph: ir.Graph) -> str:
    """A clause for errors that find no constant weights, where some are inputs with a default; else nothing."""
    names = [str(value.name) for value in graph.inputs if value.is_initializer() and len(value.shape or ()) > 1]
    if not names:
        return ""
    return (
        f"; {len(names)} matrices, such as {names[0]!r}, are inputs with a default and so no constants: if nobody is "
        "to override them, export with keep_initializers_as_inputs=False or take them out of the graph's inputs"
    )


def _refuse_shared_names(model: ir.Model, source: object) -> None:
    """Refuse a graph with several nodes of one name, as onnxruntime does; graphs inside may have its names."""
    for body in (*all_graphs(model), *_called(model)):
        counts = Counter(node.name for node in body if node.name)
        if shared := [f"{name!r} ({count} nodes)" for name, count in counts.items() if count > 1]:
            raise ModelError(
                f"{source} has nodes of one name, {first_and_more(shared)}, and onnxruntime opens no such graph; give "
                "each a name of its own, or none, and save it again"
            )


def _sort(body: ir.Graph | ir.Function, source: object) -> None:
    if in_order(body):  # which most files are, and to see it takes less than to sort
        return
    try:
        body.sort()
    except ValueError as error:
        names = " needs ".join(repr(node.name or node.outputs[0].name) for node in _cycle(body))
        raise ModelError(
            f"the graph of {source} has a cycle: {names}; no runtime can run it, export the model again"
        ) from error


def _cycle(body: ir.Graph | ir.Function) -> list[ir.Node]:
    """Nodes each of which needs the next one's result; the last one is the first again."""
    waiting = {node: set(_needs(node)) for node in all_nodes(body)}
    ready = [node for node, needs in waiting.items() if not needs]
    users: dict[ir.Node, list[ir.Node]] = {}
    for node, needs in waiting.items():
        for need in needs:
            users.setdefault(need, []).append(node)
    while ready:
        done = ready.pop()
        del waiting[done]
        for user in users.get(done, ()):
            waiting[user].discard(done)
            if not waiting[user]:
                ready.append(user)
    way: list[ir.Node] = []
    node = next(iter(waiting))
    while node not in way:
        way.append(node)
        node = next(iter(waiting[node]))
    return [*way[way.index(node) :], node]


def _needs(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that must run before ``node`` is done: those it reads from, and those in its subgraphs."""
    yield from (producer for value in node.inputs if value is not None and (producer := value.producer()) is not None)
    for graph in subgraphs(node):
        yield from graph


def _called(model: ir.Model) -> Iterator[ir.Function]:
    """The functions that the graph calls, themselves or through others."""
    found: set[ir.Function] = set()
    frontier: list[ir.Graph | ir.Function] = [model.graph]
    while frontier:
        for node in all_nodes(frontier.pop()):
            function = model.functions.get(node.op_identifier())
            if function is not None and function not in found:
                found.add(function)
                frontier.append(function)
                yield function


def _import_as_model(function: ir.Function, model: ir.Model, source: object) -> None:
    """Let a function import the operator sets in the versions that the model imports.

    Raises:
        ModelError: Some operator means something else then.
    """
    for domain, version in list(function.opset_imports.items()):
        wanted = model.opset_imports.setdefault(domain, version)
        if version == wanted:
            continue
        for node in function.all_nodes():
            if node.domain == domain and not means_the_same(node, version, wanted):
                raise ModelError(
                    f"the function {function.domain}::{function.name} of {source} imports version {version} of the "
                    f"operators of {domain or 'ai.onnx'!r} and the model {wanted}, in which {node.op_type} "
                    f"{node.name or node.outputs[0].name!r} means something else; export both with one version"
                )
        function.opset_imports[domain] = wanted


def _part_activation(gemm: ir.Node, names: Names) -> None:
    """A FusedGemm becomes a Gemm and its activation."""
    if gemm.domain != "com.microsoft":
        return
    graph, activation = gemm.graph, gemm.attributes.pop("activation").as_string()
    assert graph is not None
    options = []
    for name in ("alpha", "beta"):
        value = gemm.attributes.pop(f"activation_{name}", None)
        if value is not None and name in _ACTIVATION_OPTIONS.get(activation, ()):
            options.append(ir.AttrFloat32(name, value.as_float()))
    gemm.attributes.pop("activation_gamma", None)
    gemm.domain, gemm.op_type = "", "Gemm"
    old = gemm.outputs[0]
    made = ir.Node("", activation, [old], options, name=names.unique(f"{gemm.name or old.name}/{activation}"))
    new = made.outputs[0]
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    made.replace_input_with(0, old)
    graph.insert_after(gemm, made)
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = names.unique(f"{old.name}/gemm")


def _part_bias(norm: ir.Node, names: Names) -> None:
    """The bias that a Skip-norm adds goes back to the product that it belongs to."""
    bias = norm.inputs[_SKIP_BIAS] if len(norm.inputs) > _SKIP_BIAS else None
    makers = [None if value is None else value.producer() for value in norm.inputs[:2]]
    index = next((i for i, maker in enumerate(makers) if maker is not None and maker.op_type in _PRODUCTS), None)
    if bias is None or index is None or norm.graph is None:
        return
    value = norm.inputs[index]
    assert value is not None
    add = ir.Node("", "Add", [value, bias], name=names.unique(f"{norm.name or norm.outputs[0].name}/bias"))
    add.outputs[0].name = names.unique(f"{value.name}/bias")
    add.outputs[0].type, add.outputs[0].shape = value.type, value.shape
    norm.graph.insert_before(norm, add)
    norm.replace_input_with(index, add.outputs[0])
    norm.replace_input_with(_SKIP_BIAS, None)


_PARTED = {"FusedGemm": _part_activation, "SkipSimplifiedLayerNormalization": _part_bias}


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model, in subgraphs and functions too."""
    frontier = [proto.graph.node, *(function.node for function in proto.functions)]
    while frontier:
        for node in frontier.pop():
            yield node
            for attribute in node.attribute:
                graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                frontier.extend(graph.node for graph in graphs)


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes with large tensors into initializers, and read the other large tensors among attributes.

    onnxruntime takes external data for initializers only.
    """
    for node in list(all_nodes(model.graph)):
        for name, attribute in list(node.attributes.items()):
            tensor = attribute.value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            output = node.outputs[0]
            if (
                node.op_type == "Constant"
                and node.domain == ""
                and node.graph is not None
                and not output.is_graph_output()
            ):
                weight = ir.Value(
                    name=output.name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                    const_value=tensor,
                )
                node.graph.register_initializer(weight)
                output.replace_all_uses_with(weight)
                node.graph.remove(node, safe=True)
            else:
                node.attributes[name] = ir.AttrTensor(
                    name, ir.Tensor(read_array(tensor), dtype=tensor.dtype, name=tensor.name)
                )
