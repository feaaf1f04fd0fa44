"""From a selection and a configuration to rounded weights.

Linears of the decoder are rounded with the configured method; the head and embeddings to nearest, since no Hessian
helps a table, and the head's would cost more than all others together. Linears whose weights stay in float are no
stages of their own: while others are rounded they run as in the float model, their inputs not quantized either.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.padding import Padding
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.calibration.sample import check_ids
from quarot_onnx.config import QConfig
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.rounding import RTNConfig
from quarot_onnx.config.tensor import QTensorConfig
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError
from quarot_onnx.graph.query import Constant
from quarot_onnx.io.links import refuse_broken
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.activations import Activation
from quarot_onnx.quantization.groups import odd_groups
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.quantization.select import LinearJob, Selection, TableJob
from quarot_onnx.quantization.static_ranges import Ranges, activation_of
from quarot_onnx.rounding.blockwise import BlockwiseInputs, Rounding, WeightJob, round_blockwise
from quarot_onnx.rounding.checkpoint import Checkpoint
from quarot_onnx.rounding.plain import PlainWeights
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.sessions.providers import version_record

RoundedOf = Callable[[LinearJob | TableJob], RoundedWeight]
"""Gives the rounded weight of what was selected."""


def check(selection: Selection, config: QConfig, reader: DataReader | None) -> None:
    """Refuse early what would fail late.

    Args:
        selection: What will be quantized.
        config: How.
        reader: The calibration data.

    Raises:
        ConfigError: A group size that leaves a remainder, with the Linear or the embedding and both numbers.
        ModelError: Two of the nodes have one name, which rounded weights go by.
        CalibrationError: The method needs calibration data, and the reader is missing or none.
    """
    linears = [job.name for job in selection.linears if job.config.weight is not None]
    names = Counter([*linears, *(job.name for job in selection.tables)])
    name, count = next(iter(names.most_common(1)), ("", 0))
    if count > 1 and config.low_bit:
        raise ModelError(f"{count} nodes of the graph are named {name!r}: give each a name of its own, or none")
    for odd in odd_groups(selection):
        raise ConfigError(odd.message(f"group_size={odd.size} of the {odd.what}"))
    asking = next((item for item in config.algo_config if item.needs_statistics), None)
    if asking is None:
        return
    if reader is None:
        raise CalibrationError(
            f"{asking.name} needs calibration data: pass a CalibrationDataReader, or {asking.without_data}"
        )
    wrap(reader)


def calibration_samples(config: QConfig, reader: DataReader | None, *, again: bool = False) -> list[Feeds]:
    """The samples that the algorithms ask for; none where they need no statistics.

    Args:
        config: The algorithms.
        reader: Calibration data.
        again: They are looked at more than once for another reason.

    Raises:
        CalibrationError: The reader is empty.
    """
    if reader is None or not (config.needs_samples or again):
        return []
    checked = wrap(reader)
    checked.require_sample()
    return list(islice(checked, config.calib_data_size))


def check_samples(
    selection: Selection, config: QConfig, samples: list[Feeds], reader: str = "the calibration reader"
) -> None:
    """Refuse negative token ids before anything is rotated; of models that take no token ids nothing is known yet.

    Args:
        selection: What will be quantized.
        config: How; nothing is refused where its rounding needs no statistics.
        samples: From `calibration_samples`.
        reader: The class of the reader that they come from, for messages.

    Raises:
        CalibrationError: There are such ids.
    """
    if not samples or config.rounding is None or not config.rounding.needs_statistics:
        return
    padding = Padding(selection.survey.model)
    for number, feeds in enumerate(samples):
        check_ids(padding.tokens(feeds, number), reader, number)


def fingerprint(
    sources: list[Path], config: QConfig, samples: list[Feeds], decode_steps: int | None = 0
) -> dict[str, object]:
    """What decides the result of a run, as JSON types: equal fingerprints, equal results.

    Args:
        sources: The model's files.
        config: The configuration; the files that it names count too.
        samples: The calibration samples.
        decode_steps: Decode steps that follow each; None for the default.
    """
    digest = sha256()
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
    files = [*sources, *_named(config)]
    return {
        "files": [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "config": config.to_dict(),
        "samples": digest.hexdigest(),
        "decode_steps": decode_steps,
        "versions": {name: version(name) for name in ("quarot-onnx", "numpy", "scipy")} | version_record(),
    }


def _named(config: QConfig) -> Iterator[Path]:
    """The files that a configuration names.

    Raises:
        ConfigError: One is not there.
    """
    for key in ("r_config_path", "r1_matrix_path", "r2_matrix_path"):
        path: Path | None = getattr(config.quarot, key, None)
        if path is not None and not path.exists():
            refuse_broken(path.absolute(), ConfigError)
            raise ConfigError(f"{key}: there is no file {path}; name one that is there, or leave {key} out")
        if path is not None:
            yield path


@dataclass(frozen=True, eq=False)
class Task:
    """Weights to round.

    Attributes:
        selection: What is quantized, of a float model that is rotated where it is to be, its large weights external.
        config: How.
        ranges: Of static activations, from ``static_ranges.calibrate``.
        samples: From ``calibration_samples``.
        file: The model's file.
        cluster: Workers that take the samples through the model; None where that is done here.
    """

    selection: Selection
    config: QConfig
    ranges: Ranges
    samples: list[Feeds]
    file: Path
    cluster: Cluster | None = None

    def jobs(self) -> list[WeightJob]:
        """The Linears whose weights are rounded, in graph order.

        Those that quantize their input alike have the same activation object.
        """
        activations: dict[object, Activation] = {}
        jobs = []
        for job in self.selection.linears:
            linear, spec = job.linear, job.config.activation
            if job.config.weight is None:
                continue
            if (linear.input, spec) not in activations:
                activations[linear.input, spec] = activation_of(spec, linear.input.name or "", self.ranges)
            jobs.append(replace(_linear_job(job), linear=linear, activation=activations[linear.input, spec]))
        return jobs


def round_weights(
    task: Task, checkpoint: Checkpoint, scratch: Path, progress: Progress, memory: Memory
) -> tuple[dict[str, RoundedWeight], tuple[str, ...]]:
    """Round the weights that statistics of their inputs are taken for.

    Args:
        task: What and how.
        checkpoint: Takes the results; its earlier ones are used.
        scratch: A folder for hidden states that do not fit into memory.
        progress: Called with weights done and their number.
        memory: How many hidden states are kept in memory.

    Returns:
        The weights by the names of their nodes, and what the user should know.

    Raises:
        CalibrationError: NaN in an activation.
        ModelError: A weight holds NaN or infinity.
    """
    method, survey = task.config.rounding, task.selection.survey
    if method is None or not method.needs_statistics:
        return {}, ()
    head = {linear.node for linear in survey.sites.head}
    aware = [job for job in task.jobs() if job.linear and job.linear.node not in head]
    if not aware:
        return {}, ()
    rounding = Rounding(method, checkpoint, progress, len(aware))
    # Where V cannot be traced, blocks begin at O: what matters is that there are as many of them.
    marks = [attention.value or attention.output for attention in survey.sites.attentions]
    starts = {linear.node for linear in marks if linear is not None}
    quantize = method.aq_calibration
    inputs = BlockwiseInputs(survey.model, starts, task.samples, quantize, scratch, memory, task.file, task.cluster)
    round_blockwise(aware, rounding, inputs)
    return rounding.rounded, tuple(rounding.notes)


def weights_of(config: QConfig, weights: Mapping[str, RoundedWeight]) -> RoundedOf:
    """The weights of whatever was selected: those that were rounded before, others to nearest when they are written.

    Args:
        config: Its method's choice of the clip search holds for all of them.
        weights: From ``round_weights``.
    """
    plain = PlainWeights(clip=config.low_bit and (config.rounding or RTNConfig()).mse)

    def of(job: LinearJob | TableJob) -> RoundedWeight:
        if job.name in weights:
            return weights[job.name]
        return plain.rounded(_linear_job(job) if isinstance(job, LinearJob) else _table_job(job))

    return of


def _linear_job(job: LinearJob) -> WeightJob:
    assert job.config.weight is not None, "a weight in float is no job"
    return WeightJob(job.name, job.linear.weight, scheme(job.config.weight), job.linear.alpha)


def _table_job(job: TableJob) -> WeightJob:
    return WeightJob(job.name, _turned(job.table), scheme(job.weight))


def scheme(spec: QTensorConfig) -> WeightScheme:
    """The family of grids that a spec describes."""
    return WeightScheme(
        spec.bits,
        symmetric=spec.symmetric,
        signed=spec.data_type.signed,
        group_size=spec.group_size,
        per_channel=spec.quant_granularity is not QuantGranularity.Tensor,
    )


def _turned(table: Constant) -> Constant:
    """A table [rows, hidden] as [hidden, rows], so that rows are channels."""
    return Constant(table.value, table.tensor, not table.transposed, table.dtype)
