"""Results as JSON types, for reports and for ``--json``."""

from quarot_onnx.evaluation.equivalence import Equivalence
from quarot_onnx.evaluation.fidelity import Fidelity
from quarot_onnx.evaluation.perplexity import Perplexity
from quarot_onnx.processor import described
from quarot_onnx.sessions.providers import record as provider_record


def equivalence_record(result: Equivalence) -> dict[str, object]:
    """The figures of a comparison of two models."""
    return {
        "max_abs_logit_diff": result.max_abs_logit_diff,
        "max_rel_logit_diff": result.max_rel_logit_diff,
        "rel_l2": result.rel_l2,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "tokens": result.tokens,
        "decode_steps": result.decode_steps,
        "dtype": result.dtype.name,
        "tolerance": {
            "max_rel": result.tolerance.max_rel,
            "rel_l2": result.tolerance.rel_l2,
            "top1": result.tolerance.top1,
        },
        "own_noise": result.own_noise,
        "passed": result.passed,
        "outputs": [
            {
                "name": output.name,
                "up_to": output.up_to or None,
                "max_abs_diff": output.max_abs,
                "max_rel_diff": output.max_rel,
                "rel_l2": output.rel_l2,
                "passed": output.passed,
            }
            for output in result.outputs
        ],
        "not_compared": dict(result.not_compared),
        **provider_record(),
    }


def fidelity_record(result: Fidelity) -> dict[str, object]:
    """The figures of a quantized model beside its original's."""
    return {
        "kl": result.kl,
        "decode_kl": result.decode_kl,
        "top1_agreement": result.top1_agreement,
        "perplexity_a": result.perplexity_a,
        "perplexity_b": result.perplexity_b,
        "perplexity_ratio": result.perplexity_ratio,
        "exact_perplexity_ratio": result.exact_perplexity_ratio,
        "saturating_products": result.saturating,
        "tokens": result.tokens,
        "decode_steps": result.decode_steps,
        "text": result.text,
        "not_decoded": result.not_decoded or None,
        "processor": described(),
        "max_kl": result.limits.max_kl,
        "max_ppl_ratio": result.limits.max_ppl_ratio,
        "passed": result.passed,
        **provider_record(),
    }


def perplexity_record(result: Perplexity) -> dict[str, object]:
    """The perplexity and everything needed to compute it again."""
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "bos_id": result.bos_id,
        "bos_why": result.bos_why,
        "tokenizer": str(result.tokenizer),
        "joining": result.joining,
        "nll": result.nll,
        "seconds": result.seconds,
        "notes": list(result.notes),
        "saturating_products": result.saturating,
        "exact": result.exact,
        **provider_record(),
    }
