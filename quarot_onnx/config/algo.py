"""The base of all algorithm configurations."""

from quarot_onnx.config.files import FileConfig


class AlgoConfig(FileConfig):
    """What all algorithm configurations have in common: the name that tells them apart in a file."""

    unlisted = ("name",)  # whoever gets to see the keys has named the algorithm already, or need not

    name: str

    @property
    def needs_statistics(self) -> bool:
        """Whether it measures the model on calibration data."""
        return False

    @property
    def without_data(self) -> str:
        """What whoever has none can do, in words."""
        return "leave it out"
