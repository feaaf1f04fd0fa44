"""The algorithms of a quantization: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), then one of :mod:`.rounding`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, ValidationInfo, model_validator

from quarot_onnx.config.algo import AlgoConfig
from quarot_onnx.config.formats import Placed
from quarot_onnx.config.kv_cache import KVCacheConfig
from quarot_onnx.config.misfits import corrected_without_scale, smoothing_float_inputs
from quarot_onnx.config.paths import ConfigPath
from quarot_onnx.config.prefix import SinkPrefixConfig
from quarot_onnx.config.rounding import (
    ROUNDINGS,
    GPTAQConfig,
    GPTQConfig,
    HessianConfig,
    QronosConfig,
    RoundingConfig,
    RTNConfig,
)
from quarot_onnx.config.smoothing import SmoothQuantConfig
from quarot_onnx.errors import did_you_mean


def _mixes(block: int) -> int:
    if block == 1:
        raise ValueError("blocks of 1 are no rotation; use 2 or more, or switch the rotation off")
    return block


BlockSize = Annotated[int, Field(ge=1, strict=True), AfterValidator(_mixes)]
"""The blocks of a block-diagonal rotation."""


_Size = Annotated[int, Field(ge=1, strict=True)]


class QuarotConfig(AlgoConfig):
    """Which rotations, of which size, from where.

    The first three are AMD Quark's, in its order. Where Quark defaults to ``r_matrix_dim=4096`` and needs
    ``r_config_path``, both may be left out here: the graph decides.

    Attributes:
        r_matrix_dim: Order of R1, the hidden size of the model; None reads it from the graph. A number that does
            not fit the graph is an error, not a request.
        use_random_had: Randomise the Hadamard matrices (R = diag(s)·H/sqrt(n)) with `seed`.
        r_config_path: The rotation config file that says where the rotations go; None finds the places in the graph.
        r1: Rotate the residual stream; None decides from the scheme and the rotation config. So for the others.
        r2: Rotate the values of each head.
        r3: Rotate queries and keys after RoPE, online; pays with a quantized KV cache.
        r4: Rotate the input of the down projection, online; pays with quantized activations.
        seed: Seed of the random signs, recorded in the output.
        block_size: Order of the blocks where a block-diagonal rotation is wanted; None takes the full size.
        r1_matrix_path: An orthogonal matrix [n, n] as .npy to use as R1.
        r2_matrix_path: An orthogonal matrix [head_dim, head_dim] as .npy to use as R2.
        split_cache: The graphs that this one shares its cache with (a prefill graph and its decode graph) are rotated
            with the same options, so that R2 and R3 may go where the cache leaves for another graph.
        name: ``"quarot"``.
    """

    positional = ("r_matrix_dim", "use_random_had", "r_config_path")

    name: Literal["quarot"] = "quarot"
    r_matrix_dim: _Size | None = None
    use_random_had: StrictBool = False
    r_config_path: ConfigPath = None
    r1: StrictBool | None = None
    r2: StrictBool | None = None
    r3: StrictBool | None = None
    r4: StrictBool | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    block_size: BlockSize | None = None
    r1_matrix_path: ConfigPath = None
    r2_matrix_path: ConfigPath = None
    split_cache: StrictBool = False

    @model_validator(mode="after")
    def _matrices_are_used(self) -> Self:
        for name, wanted, path in (("r1", self.r1, self.r1_matrix_path), ("r2", self.r2, self.r2_matrix_path)):
            if wanted is False and path is not None:
                raise ValueError(f"{name}=False contradicts {name}_matrix_path='{path}'; leave out one of them")
        return self

    @property
    def leaves_open(self) -> bool:
        """Whether it names no rotation, so that the graph and the scheme decide on all of them."""
        said = (self.r1, self.r2, self.r3, self.r4, self.r_config_path, self.r1_matrix_path, self.r2_matrix_path)
        return all(value is None for value in said)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for everything in this configuration that has no effect."""
        # Files that are written name every field: the seed that is the default anyway asks for nothing.
        if self.use_random_had or self.seed == type(self).model_fields["seed"].default:
            return ()
        return ("seed has no effect: no Hadamard is random; add use_random_had (on the command line --random-had)",)


_ALGORITHMS: dict[str, type[AlgoConfig]] = {
    "quarot": QuarotConfig,
    "smooth_quant": SmoothQuantConfig,
    "sink_prefix": SinkPrefixConfig,
    "kv_cache": KVCacheConfig,
    **ROUNDINGS,
}


def as_algorithm(value: object, info: ValidationInfo) -> object:
    """The algorithm configuration that a mapping with a ``name`` describes; anything else passes through.

    Raises:
        ValueError: No such algorithm, or no name.
    """
    if isinstance(value, AlgoConfig):
        if not isinstance(value, tuple(_ALGORITHMS.values())):
            raise ValueError(f"{type(value).__name__} is a base class; use GPTQConfig(...) or another")  # noqa: TRY004 - becomes a ConfigError
        return value
    if isinstance(value, type):
        raise ValueError(f"{value.__name__} is a class; write {value.__name__}()")  # noqa: TRY004 - becomes a ConfigError
    known = ", ".join(_ALGORITHMS)
    if not isinstance(value, Mapping):
        raise ValueError(f"not an algorithm configuration; give QuarotConfig(...) or a mapping with name: {known}")  # noqa: TRY004 - becomes a ConfigError
    data: dict[str, Any] = dict(value)
    name = str(data.get("name"))
    if name not in _ALGORITHMS:
        raise ValueError(f"no algorithm is named {name!r}{did_you_mean(name, _ALGORITHMS)}; set name to {known}")
    return _ALGORITHMS[name].model_validate(data, context=info.context)


def refuse_disorder(algorithms: Sequence[AlgoConfig]) -> None:
    """Raise ValueError unless there is at most one of each kind, in the order in which they are carried out."""
    kinds = (QuarotConfig, SmoothQuantConfig, SinkPrefixConfig, RoundingConfig, KVCacheConfig)
    places = [next(place for place, kind in enumerate(kinds) if isinstance(item, kind)) for item in algorithms]
    for place, kind in enumerate(kinds):
        if places.count(place) < 2:
            continue
        if kind is RoundingConfig:
            names = " and ".join(item.name for item in algorithms if isinstance(item, RoundingConfig))
            raise ValueError(f"more than one rounding, {names}; give one of them")
        raise ValueError(f"more than one {kind.__name__}; give one")
    if places != sorted(places):
        first = next(place for place, later in itertools.pairwise(places) if place > later)
        before = ("", "the smoothing", "the prefix", "the rounding", "the cache")[first]
        order = "rotate, then smooth, then keep a prefix, then round, then quantize the cache"
        raise ValueError(f"{before} stands too early; {order}")


def with_settled_balance(algorithms: tuple[AlgoConfig, ...]) -> tuple[AlgoConfig, ...]:
    """The algorithms, in order; with balanced keys where R3 would come in, they gain, and nothing was said."""
    quarot = next((item for item in algorithms if isinstance(item, QuarotConfig)), None)
    if quarot is None or quarot.r3 is not None or quarot.r_config_path is not None:
        return algorithms
    return tuple(
        item.model_copy(update={"k_balance": True})
        if isinstance(item, KVCacheConfig) and item.k_balance is None and item.gains_from_balance
        else item
        for item in algorithms
    )


def refuse_idle(algorithms: Sequence[AlgoConfig], layers: Sequence[Placed], *, bias_correction: bool) -> None:
    """Raise ValueError for an algorithm that has nothing to work on, or works on groups as it cannot.

    Args:
        algorithms: In any order.
        layers: All layer configurations.
        bias_correction: Whether biases are to be corrected.
    """
    activations = [layer.config.activation for layer in layers]
    if bias_correction and not any(spec is not None and spec.has_fixed_scale for spec in activations):
        raise ValueError(f"bias_correction: {corrected_without_scale()}")
    for item in algorithms:
        if isinstance(item, RoundingConfig) and layers and all(layer.config.weight is None for layer in layers):
            raise ValueError(
                f"{item.name} has nothing to round: all weights stay in float; leave it out of algo_config, or give a "
                "weight"
            )
        if isinstance(item, SmoothQuantConfig) and all(layer.config.activation is None for layer in layers):
            raise ValueError(f"{item.name}: {smoothing_float_inputs()}")
        if isinstance(item, HessianConfig):
            for layer in layers:
                if layer.linear and layer.config.weight is not None:
                    item.refuse_order_with_groups(layer.config.weight.group_size)


__all__ = [
    "AlgoConfig",
    "GPTAQConfig",
    "GPTQConfig",
    "HessianConfig",
    "KVCacheConfig",
    "QronosConfig",
    "QuarotConfig",
    "RTNConfig",
    "RoundingConfig",
    "SinkPrefixConfig",
    "SmoothQuantConfig",
    "as_algorithm",
    "refuse_disorder",
    "refuse_idle",
    "with_settled_balance",
]
