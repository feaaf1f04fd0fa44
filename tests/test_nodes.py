"""All nodes of a graph, in the order of onnx-ir's own traversal, and whether they stand in it."""

import exports
import onnx_ir as ir
import pytest

from quarot_onnx.io.nodes import all_graphs, all_nodes, in_order


def nested() -> ir.Model:
    """An If in an If, whose innermost branch reads from the outermost graph."""
    return ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 18]>
        outer (bool c, float[2] x) => (float[2] y) {
            a = Neg(x)
            y = If(c) <
                then_branch = first () => (float[2] t) {
                    b = Abs(a)
                    t = If(c) <then_branch = deep () => (float[2] d) { d = Add(a, b) },
                               else_branch = deep_too () => (float[2] e) { e = Identity(b) }>
                },
                else_branch = second () => (float[2] f) { f = Identity(a) }
            >
        }""")


@pytest.mark.parametrize("name", ["nested", "optimum phi3", "dynamo llama"])
def test_nodes_and_graphs_are_all_there(name: str) -> None:
    model = nested() if name == "nested" else ir.load(exports.EXPORTS[name]())
    assert list(all_nodes(model.graph)) == list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert list(all_graphs(model)) == list(model.graphs())
    assert in_order(model.graph)
    before = list(all_nodes(model.graph))
    model.graph.sort()
    assert list(all_nodes(model.graph)) == before, "what is in order needs no sorting"


@pytest.mark.parametrize("graph", range(3))
def test_a_node_before_what_it_reads_is_seen(graph: int) -> None:
    """Also where it reads, in a branch, what the outer graph computes after the branch."""
    model = nested()
    body = list(all_graphs(model))[graph]
    first = body[0]
    if graph == 2:  # deep: its one node reads Neg and Abs
        first = model.graph[0]
        body = model.graph
    body.remove(first)
    body.append(first)
    assert not in_order(model.graph)
    model.graph.sort()
    assert in_order(model.graph)
