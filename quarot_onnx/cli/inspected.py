"""What ``inspect`` found, for people."""

from pathlib import Path

from quarot_onnx.cli.console import say, table
from quarot_onnx.cli.render import Content, megabytes, written
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import first_and_more
from quarot_onnx.processor import EXACT_PRODUCTS


def _structure(name: str) -> str:
    """What a graph is built like, which is no claim on which model it is."""
    return name if " " in name else f"as of {name}"


def show(content: Content) -> None:
    """A model's structure, its sites, its Hadamards."""
    if "quantized" in content:
        _quantized(content)
        return
    heads = f"{content['num_heads']} heads, {content['num_kv_heads']} KV heads of {content['head_dim']}"
    tied = "tied" if content["tied_embeddings"] else "untied"
    rows = [
        ["structure", f"{_structure(content['architecture'])}, {content['layers']} layers"],
        ["hidden / intermediate", f"{content['hidden_size']} / {content['intermediate_size']}"],
        ["attention", heads],
        ["embedding", f"{content['vocab_size']} rows, head {tied}"],
        ["graph", f"{content['nodes']} nodes, opset {content['opset']}, {content['linears']} Linears"],
        ["weights", megabytes(content["weight_bytes"])],
    ]
    table(str(content["model"]), ["", "found"], rows)
    sites = [[kind, str(count), _uses(content, kind)] for kind, count in content["sites"].items()]
    table("Rotation sites", ["rotation", "sites", "Hadamard"], sites)
    for line in content["left_out_grouped"]:
        say(f"left out {line}")
    _in_branches(content)
    recipe = content.get("recipe")
    if recipe and recipe.get("rotation"):
        say(f"already rotated: {recipe['rotation']['counts']}")
    _held_prefix(recipe)
    if "sinks" in content:
        _sinks(content["sinks"])
    if "written_config" in content:
        written(Path(content["written_config"]))


def _in_branches(content: Content) -> None:
    """The Linears that are in sight of no rotation and no quantization."""
    found = content["linears_in_branches"]
    if found:
        count = sum(entry["linears"] for entry in found)
        names = first_and_more([f"the {entry['op_type']} {entry['node']}" for entry in found], 3)
        say(f"left as they are: {count} Linear{'s' if count > 1 else ''} inside {names}")


def _held_prefix(recipe: Content | None) -> None:
    """The sink prefix that a model has."""
    from quarot_onnx.graph.metadata import prefix_of  # noqa: PLC0415 - the inspection has imported it already

    found = prefix_of(recipe)
    if found is not None:
        where = (
            "in the graph" if found[0] == PrefixForm.GRAPH else "in a file beside the model, to be fed as past inputs"
        )
        say(f"sink prefix: {list(found[1])}, {where}")


def _sinks(found: list[Content]) -> None:
    """Prefixes, and what outliers cost behind them."""
    rows = [
        [
            " ".join(f"{token} {word!r}" for token, word in zip(entry["prefix"], entry["tokens"], strict=True))
            or "none",
            f"{entry['bits']:.2f}",
            f"{entry['worst']:.0f} at {entry['input']}",
            str(entry["pieces"]),
            ", ".join(f"{word!r} {count}" for word, count in entry["outliers"]) or "none",
        ]
        for entry in found
    ]
    table("Attention sinks", ["prefix", "bits lost", "largest / median", "pieces with outliers", "outliers"], rows)


def _quantized(content: Content) -> None:
    """A quantized model, and what this processor makes of it."""
    counts = ((content["recipe"] or {}).get("rotation") or {}).get("counts", {})
    rows = [
        ["quantized operators", ", ".join(f"{count} {name}" for name, count in content["quantized"].items())],
        ["graph", f"{content['nodes']} nodes, opset {content['opset']}"],
        ["weights", megabytes(content["weight_bytes"])],
        ["rotation", ", ".join(f"{kind} at {count}" for kind, count in counts.items()) or "none"],
        ["processor", content["processor"]],
        ["products that saturate without VNNI", str(content["saturating_products"])],
    ]
    table(str(content["model"]), ["", "found"], rows)
    _in_branches(content)
    _held_prefix(content["recipe"])
    if content["processor_saturates"] and content["saturating_products"]:
        say(f"on this processor these are not exact; onnxruntime's session option {EXACT_PRODUCTS}=1 makes them so")


def _uses(content: Content, kind: str) -> str:
    """The Hadamards of one kind, with factors and cost where they are online."""
    lines = []
    for use in content["hadamards"]:
        if use["rotation"] == kind:
            online = "·".join(map(str, use["factors"]))
            cost = f", online as {online}, {use['relative_cost']:.1%} of its Linear's work" if online else ""
            lines.append(use["construction"] + cost)
    return "; ".join(lines)
