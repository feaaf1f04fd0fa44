"""Results for people: tables and short lines on standard output."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarot_onnx.cli.console import notes, say, table

if TYPE_CHECKING:
    from quarot_onnx.evaluation.fidelity import Fidelity
    from quarot_onnx.io.model_io import SavedModel
    from quarot_onnx.pipeline import Outcome

Content = Mapping[str, Any]

_SHOWN = 12
"""Outputs that are the same in a comparison's table: a cache has two for every layer."""


def written(path: Path) -> None:
    """One line that names what was written."""
    say(f"wrote {path}")


def saved_record(saved: "SavedModel") -> dict[str, object]:
    """The files of an output as JSON types."""
    return {
        "model": str(saved.path),
        "data": None if saved.data_path is None else str(saved.data_path),
        "bytes": saved.bytes_total,
        "report": None if saved.report_path is None else str(saved.report_path),
    }


def optimized(saved: "SavedModel") -> None:
    """What was written, and how it is to be opened."""
    for_ = "the copy is for this kind of processor and this version of onnxruntime: keep the model"
    notes([f"{for_}; open the copy with graph_optimization_level ORT_DISABLE_ALL"])
    say(f"wrote {saved.path} ({megabytes(saved.bytes_total)})")


def outcome_record(outcome: "Outcome") -> dict[str, object]:
    """A run as JSON types."""
    from quarot_onnx.evaluation.report import equivalence_record, fidelity_record  # noqa: PLC0415 - the run has imported it already

    return {
        **saved_record(outcome.saved),
        "equivalence": None if outcome.equivalence is None else equivalence_record(outcome.equivalence),
        "bos": None if outcome.bos is None else {"id": outcome.bos.id, "why": outcome.bos.why},
        "check": None if outcome.fidelity is None else fidelity_record(outcome.fidelity),
        "notes": list(outcome.notes),
        "seconds": dict(outcome.seconds),
        "recipe": dict(outcome.recipe),
    }


def outcome(done: "Outcome") -> None:
    """What was rotated, how exact it was, what was written."""
    from quarot_onnx.graph.metadata import transforms_of  # noqa: PLC0415 - the run has imported it already

    rotation = done.recipe.get("rotation")
    if isinstance(rotation, dict):
        counts = ", ".join(f"{kind} at {count}" for kind, count in rotation["counts"].items())
        say(f"rotated{'' if 'rotate' in done.seconds else ' before'}: {counts} places")
    for entry in transforms_of(done.recipe):
        say(f"{entry['name']}: at {entry['places']} places")
    if done.equivalence is not None:
        e = done.equivalence
        top1 = "" if e.top1_agreement is None else f", top-1 agreement {e.top1_agreement:.2%}"
        noise = "" if e.own_noise is None else f"; rounding alone moves the original by {e.own_noise:.2e}"
        say(
            f"proved: max |Δlogit| {e.max_abs_logit_diff:.2e} (relative {e.max_rel_logit_diff:.2e}{noise}) "
            f"over {e.tokens} tokens{top1}{_beside(len(e.outputs))}"
        )
    if done.bos is not None:
        say(f"calibrated: BOS {done.bos}")
    quantization = done.recipe.get("quantization")
    if isinstance(quantization, dict):
        tables = quantization["embeddings"]
        also = f" and {tables} embedding{'s' if tables > 1 else ''}" if tables else ""
        say(f"quantized: {quantization['linears']} Linears{also}")
    if done.fidelity is not None:
        say(f"checked: {_fidelity(done.fidelity)}")
    seconds = sum(done.seconds.values())
    say(f"wrote {done.saved.path} ({megabytes(done.saved.bytes_total)}, {seconds:.1f} s)")


def _beside(outputs: int) -> str:
    """How many outputs were compared beside the first."""
    return "" if outputs < 2 else f", and {outputs - 1} more output{'s' if outputs > 2 else ''}"


def _fidelity(found: "Fidelity") -> str:
    """A quantized model beside its original, in one line."""
    ratio, exact = found.perplexity_ratio, found.exact_perplexity_ratio
    figures = [f"KL {found.kl:.4f}", f"top-1 agreement {found.top1_agreement:.1%}"]
    if ratio is not None:
        figures.insert(0, f"perplexity {found.perplexity_b:.2f}, {ratio:.3f} x the original's {found.perplexity_a:.2f}")
    line = f"{', '.join(figures)}; {found.tokens} tokens of {found.text}, {found.decode_steps} of them decoded"
    if found.saturating and exact is not None:
        line += f"; {exact:.3f} x with exact products: {found.saturating} saturate on this processor"
    return line


def comparison(content: Content) -> None:
    """The figures of a quantized model beside its original's."""
    rows = [
        ["perplexity of the original", _figure(content["perplexity_a"], ".4f")],
        ["perplexity of the quantized model", _figure(content["perplexity_b"], ".4f")],
        ["ratio", _figure(content["perplexity_ratio"], ".4f")],
        ["ratio with exact products", _figure(content["exact_perplexity_ratio"], ".4f")],
        ["KL divergence (nats)", f"{content['kl']:.4e}"],
        ["KL of decode steps", _figure(content["decode_kl"], ".4e")],
        ["top-1 agreement", f"{content['top1_agreement']:.3%}"],
        ["tokens (decode steps)", f"{content['tokens']} ({content['decode_steps']})"],
        ["text", content["text"]],
        ["processor", content["processor"]],
        ["products that saturate on it", str(content["saturating_products"])],
        ["verdict", "within the limits" if content["passed"] else "PAST THE LIMITS"],
    ]
    if content["max_kl"] is None and content["max_ppl_ratio"] is None:
        del rows[-1]
    table("Comparison", ["figure", "value"], rows)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def equivalence(content: Content) -> None:
    """The figures of a comparison."""
    top1, noise = content["top1_agreement"], content["own_noise"]
    rows = [
        ["max |Δlogit|", f"{content['max_abs_logit_diff']:.3e}"],
        ["max |Δlogit| / max |logit|", f"{content['max_rel_logit_diff']:.3e}"],
        *([] if noise is None else [["of the original when rounding moves it", f"{noise:.3e}"]]),
        ["relative L2 error", f"{content['rel_l2']:.3e}"],
        ["KL divergence (nats)", "-" if content["kl"] is None else f"{content['kl']:.3e}"],
        ["top-1 agreement", "-" if top1 is None else f"{top1:.3%}"],
        ["tokens (decode steps)", f"{content['tokens']} ({content['decode_steps']})"],
        ["verdict", "the same" if content["passed"] else "DIFFERENT"],
    ]
    table("Comparison", ["figure", "value"], rows)
    same = [entry for entry in content["outputs"] if entry["passed"]]
    different = [entry for entry in content["outputs"] if not entry["passed"]]
    others = [_difference(entry) for entry in (*different, *same[:_SHOWN])]
    if rest := same[_SHOWN:]:
        worst = {figure: max(entry[figure] for entry in rest) for figure in ("max_rel_diff", "rel_l2")}
        also = f"and {len(rest)} more (--json lists them)"
        others.append(_difference({"name": also, "up_to": None, "passed": True, **worst}))
    table("Outputs compared", ["output", "up to", "max / max", "relative L2", "verdict"], others)
    for name, reason in content["not_compared"].items():
        say(f"not compared: {name}: {reason}")


def _difference(entry: Content) -> list[str]:
    """One output's row."""
    figures = [f"{entry[figure]:.3e}" for figure in ("max_rel_diff", "rel_l2")]
    return [entry["name"], entry["up_to"] or "-", *figures, "the same" if entry["passed"] else "DIFFERENT"]


def perplexity(content: Content) -> None:
    """A perplexity with all that is needed to take it again."""
    from quarot_onnx.calibration.bos import BosChoice  # noqa: PLC0415 - the run has imported it already

    rows = [
        ["perplexity", f"{content['perplexity']:.4f}"],
        ["tokens scored", str(content["tokens"])],
        ["windows", f"{content['windows']} of {content['seq_len']} tokens"],
        ["BOS", str(BosChoice(content["bos_id"], content["bos_why"]))],
        ["tokenizer", str(content["tokenizer"])],
        ["joining", content["joining"]],
        ["seconds", f"{content['seconds']:.1f}"],
    ]
    if content["saturating_products"]:
        rows.insert(-1, ["saturating products", _saturating(content)])
    table(f"{content['model']} on {content['text']}", ["", "value"], rows)


def _saturating(content: Content) -> str:
    count = f"{content['saturating_products']} on this processor"
    return f"{count}, computed exactly" if content["exact"] else f"{count}; --exact computes them exactly"


def demo(content: Content) -> None:
    """The demo's table."""
    rows = [
        [
            row["name"],
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['size_mb']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
        ]
        for row in content["rows"]
    ]
    columns = ["SmolLM2-135M", "perplexity", "ratio", "MB", "seconds", "tokens/s"]
    table(f"Models and results.json in {content['out']}", columns, rows)
    say(f"processor: {content['processor']}")
    say("seconds: to rotate, prove, calibrate and quantize; tokens/s: prefill of 256 tokens")


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"
