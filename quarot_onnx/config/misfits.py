"""Settings that do not go together: said once, in keys of a recipe, and put into words by whoever was spoken to.

A recipe's file, LLMC's file and the command line have their own words (`quarot_onnx.recipes.wording`); Python's are
here.
"""

from collections.abc import Callable
from dataclasses import dataclass

_PYTHON: dict[tuple[str, object], str] = {
    ("activations.bits", 8): "activation=UInt8Spec(True, quant_granularity='Token')",
    ("activations.bits", 16): "activation=None",
    ("weights.bits", 8): "weight=UInt8Spec(True)",
    ("activations.granularity", "tensor"): "quant_granularity='Tensor'",
    ("prefix.form", "graph"): "SinkPrefixConfig(form='graph')",
    ("embedding", "int8"): "weight=Int8Spec()",
    ("embedding", "by itself"): "layer_type_config={...: ['Gather']} to give them a weight of their own",
}
"""Settings whose names in Python are not the last part of their key."""

_DROPPED = {
    "smoothing.alpha": "leave out SmoothQuantConfig",
    "format": "leave out output_format",
    "embedding": "leave out Gather",
    "weights.per_channel": "use quant_granularity='Channel'",
    "activations.symmetric": "use symmetric=True",
}
"""What leaving out a setting of a recipe is in Python, where it is not leaving out the last part of its key."""


def python(key: str, value: object) -> str:
    """A setting as Python writes it: ``output_format='fake'``."""
    name = "output_format" if key == "format" else _last(key)
    return _PYTHON.get((key, value), f"{name}={value!r}")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


@dataclass(frozen=True)
class Misfit:
    """What does not go together.

    Attributes:
        key: The setting to blame, as a recipe names it: ``weights.group_size``.
        why: The reason, in words that files, options and Python share.
        ways: Settings any of which mends it, as keys and values.
        droppable: Whether leaving out ``key`` mends it, too.
    """

    key: str
    why: str
    ways: tuple[tuple[str, object], ...] = ()
    droppable: bool = True

    def way_out(self, setting: Callable[[str, object], str], drop: str = "leave it out") -> str:
        """What to do.

        Args:
            setting: Puts a key and its value into words.
            drop: Puts leaving out the setting to blame into words.
        """
        ways = [setting(*way) for way in self.ways]
        used = [f"use {' or '.join(ways)}"] if ways else []
        return ", or ".join([*used, *([drop] if self.droppable else [])])

    def __str__(self) -> str:
        """Reason and way out, as Python has them."""
        return f"{self.why}; {self.way_out(python, _DROPPED.get(self.key, f'leave out {_last(self.key)}'))}"


def groups_across_channels(group_size: int) -> Misfit:
    """Groups beside one scale for the whole weight."""
    return Misfit("weights.per_channel", f"groups of {group_size} lie within channels, which have scales of their own")


def smoothing_float_inputs() -> Misfit:
    """SmoothQuant where no activation is quantized."""
    return Misfit(
        "smoothing.alpha", "activations stay in float, which have nothing to gain", (("activations.bits", 8),)
    )


def corrected_without_scale() -> Misfit:
    """Bias correction where no activation has a fixed scale."""
    return Misfit(
        "activations.bias_correction",
        "no input has a fixed scale, and no mean of it is known",
        (("activations.granularity", "tensor"),),
    )


def order_across_groups(group_size: int) -> Misfit:
    """Features of a group would be rounded apart from each other."""
    return Misfit(
        "weights.act_order",
        f"with groups of {group_size} it needs static groups",
        (("weights.static_groups", True),),
    )
