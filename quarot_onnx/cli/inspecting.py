"""The ``inspect`` command: what a model is and what could be rotated in it, from one look at its graph."""

from pathlib import Path

from quarot_onnx.evaluation.inspection import inspection_record, quantized_record
from quarot_onnx.io import model_io
from quarot_onnx.io.companions import companion_files
from quarot_onnx.io.staging import check_targets
from quarot_onnx.rotation_config.config_file import read_sites, write_config
from quarot_onnx.run.provenance import recorded
from quarot_onnx.sites.detect import Survey, is_quantized
from quarot_onnx.sites.feasible import feasible
from quarot_onnx.sites.integer_caches import without_sites
from quarot_onnx.sites.model import Kind

CONFIG_FILE = "rotation_config.json"


def inspect_model(
    path: Path,
    rotation_config: Path | None,
    config_out: Path | None,
    *,
    split_cache: bool = False,
    overwrite: bool = False,
) -> dict[str, object]:
    """Inspect a model.

    Args:
        path: The .onnx file.
        rotation_config: A file that says where rotations go; None searches the graph.
        config_out: Where to write a rotation_config.json of what was found; None writes nothing.
        split_cache: The other graphs that share its caches are rotated alike.
        overwrite: Whether a file of other content may be replaced there.

    Returns:
        ``inspection_record`` with the model's path, its recipe, and what was written; ``quantized_record`` of a model
        that is quantized.

    Raises:
        InputError: The model, the file, or where it should be written to is at fault.
    """
    model = model_io.load(path)
    if config_out is not None:
        companions = companion_files(path.absolute().parent, exclude=())
        protected = [*model_io.input_files(model), *companions]
        check_targets([config_out.absolute()], protected=protected, overwrite=True, usual=CONFIG_FILE)
    if rotation_config is None and config_out is None and is_quantized(model.graph):
        return quantized_record(model) | {"model": str(path), "recipe": recorded(model)}
    survey, blocks = Survey(model), dict[Kind, int]()
    if rotation_config is None:
        sites = survey.rotatable(split_cache=split_cache)
    else:
        named = read_sites(rotation_config, survey, split_cache=split_cache)
        sites, blocks = named.sites, dict(named.block_sizes)
    # What `rotate` would leave out is left out here, too.
    sites = without_sites(feasible(sites, blocks), model.graph)
    content = inspection_record(model, sites, blocks) | {"model": str(path), "recipe": recorded(model)}
    if config_out is not None:
        write_config(sites, config_out, blocks, overwrite=overwrite)
        content["written_config"] = str(config_out)
    return content
