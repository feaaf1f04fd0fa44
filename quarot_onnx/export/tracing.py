"""What torch would freeze as it traces a model, traced as it holds for all texts."""

# ruff: noqa: PLC0415

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def traceable(model: Any) -> Iterator[None]:
    """Have torch trace what depends on the tokens as it holds for all.

    Mixtures of experts loop over those that some token chose (``nonzero``), or pass over those that none did
    (``numel``): the trace goes over all of them. Rotary embeddings of Cohere 2 are computed as optimum has Cohere's
    computed.
    """
    import torch
    from optimum.exporters.onnx.model_patcher import patched_cohere_rotary_forward

    chosen, count = torch.Tensor.nonzero, torch.Tensor.numel

    def nonzero(tensor: Any, **options: Any) -> Any:
        if tensor.ndim == 1 and tensor.dtype == torch.bool and not options:
            return torch.arange(int(tensor.shape[0]))[:, None]
        return chosen(tensor, **options)

    def numel(tensor: Any) -> Any:
        found = count(tensor)
        return 1 if tensor.ndim == 1 and tensor.dtype == torch.int64 and int(found) == 0 else found

    rotary = {type(module) for module in model.modules() if type(module).__name__ == "Cohere2RotaryEmbedding"}
    before = {kind: kind.forward for kind in rotary}
    torch.Tensor.nonzero, torch.Tensor.numel = nonzero, numel
    try:
        for kind in rotary:
            kind.forward = patched_cohere_rotary_forward
        yield
    finally:
        torch.Tensor.nonzero, torch.Tensor.numel = chosen, count
        for kind, forward in before.items():
            kind.forward = forward
