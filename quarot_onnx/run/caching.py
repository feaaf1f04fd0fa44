"""The key/value cache of a run."""

from quarot_onnx.kvcache.apply import apply_cache, cache_notes, calibrate_cache, plan_cache
from quarot_onnx.progress import of_phase
from quarot_onnx.run.preparing import Run, Start


def quantize_cache(start: Start, run: Run) -> tuple[str, ...]:
    """Quantize the cache of the float model in place, where that is asked for.

    Args:
        start: The model.
        run: What is asked for.

    Returns:
        What the user should know.
    """
    if run.config.kv_cache is None:
        return ()
    survey = start.selection.survey
    plan = plan_cache(survey, run.config.kv_cache)
    progress = of_phase(run.progress, "cache")
    seen = calibrate_cache(start.file, plan, start.reader, max_samples=start.limit, progress=progress)
    notes = cache_notes(plan)
    apply_cache(survey, plan, seen)
    run.clock.lap("cache")
    return notes
