"""What can be done to the key/value cache of a graph, and what that needs; nothing is changed here."""

from dataclasses import dataclass

from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.config import QConfig, SmoothQuantConfig
from quarot_onnx.config.choices import CacheForm, CacheScales, PrefixForm
from quarot_onnx.config.kv_cache import FEW_BITS, WHOLE_TOKEN, KVCacheConfig
from quarot_onnx.config.saying import Said, Setting, SettingError
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.graph.metadata import prefix_of, recorded
from quarot_onnx.graph.query import label
from quarot_onnx.kvcache.balance import require_balanceable
from quarot_onnx.kvcache.given import GivenScales, read_scales
from quarot_onnx.kvcache.places import Cache, CachePlaces, FusedPlace, find_cache_places
from quarot_onnx.sites.detect import Survey

_FAKE = Setting("kv_cache.form", "fake", advised=True)


@dataclass(frozen=True, eq=False)
class CachePlan:
    """What is to be done.

    Attributes:
        config: What is asked for.
        places: Where.
        key_scales: What has a scale of keys; TOKEN for those that are found at run time.
        value_scales: The same of values.
        given: Fixed scales of a file; None where they are calibrated or found at run time.
    """

    config: KVCacheConfig
    places: CachePlaces
    key_scales: CacheScales = CacheScales.TOKEN
    value_scales: CacheScales = CacheScales.TOKEN
    given: GivenScales | None = None

    def scales(self, *, keys: bool) -> CacheScales:
        """What has a scale."""
        return self.key_scales if keys else self.value_scales

    @property
    def fixed(self) -> bool:
        """Whether integers are kept on fixed scales."""
        return self.key_scales is not CacheScales.TOKEN

    @property
    def grows(self) -> bool:
        """Whether the caches of operators are rows of bytes, which the graph joins and turns into float."""
        return bool(self.places.fused) and self.config.resolved_form is CacheForm.INT and not self.fixed

    @property
    def kept_by_operators(self) -> bool:
        """Whether operators keep integers themselves, on fixed scales."""
        return bool(self.places.fused) and self.config.resolved_form is CacheForm.INT and self.fixed

    @property
    def halved(self) -> bool:
        """Whether the two halves of a key's entries have scales of their own."""
        integers = self.config.resolved_form is CacheForm.INT
        return integers and self.config.k_bits == 4 and self.key_scales is CacheScales.TOKEN

    @property
    def calibrated(self) -> list[str]:
        """The outputs of the graph that calibration must look at."""
        if not self.fixed or self.given is not None:
            return []
        return [
            cache.present.name or ""
            for cache in self.places.caches
            if self.config.grid(keys=cache.keys).bits is not None
        ]


def plan_cache(survey: Survey, config: KVCacheConfig) -> CachePlan:
    """Find out how a model can have the cache that is asked for.

    Args:
        survey: The float model.
        config: What is asked for; something is quantized.

    Raises:
        ConfigError: Its operators, or the heads' length, do not go with that.
        ModelError: It has no cache, or none that is understood.
    """
    places = find_cache_places(survey)
    _check_groups(config, places)
    if config.resolved_form is CacheForm.FAKE:
        return CachePlan(config, places)
    for place in places.fused:
        _check_fused(place, config)
    if config.scale_file is not None:
        given = read_scales(config.scale_file, config, places)
        return CachePlan(config, places, CacheScales.CHANNEL, CacheScales.CHANNEL, given)
    few = config.k_bits is not None and config.k_bits <= FEW_BITS
    if config.scales is CacheScales.AUTO and places.fused and not few:
        # After R3 one scale for a head of keys holds at every position; RoPE lets those of channels drift, but where
        # keys are balanced over all positions.
        keys = CacheScales.CHANNEL if config.k_balance else CacheScales.HEAD
        return CachePlan(config, places, keys, CacheScales.CHANNEL)
    scales = CacheScales.TOKEN if config.scales is CacheScales.AUTO else config.scales
    if places.fused and scales is CacheScales.TOKEN and not few:
        text = (
            f"{{}}: {label(places.fused[0].node)} is a GroupQueryAttention, whose tokens can have scales of their own "
            "with 4 bits alone: use {}, {}, {} or {}, or round it in float, for studies: {}"
        )
        ways = [Setting("kv_cache.scales", each, advised=True) for each in ("head", "channel", "tensor")]
        four = Setting("kv_cache.bits", FEW_BITS, advised=True)
        raise SettingError(Said(text, (Setting("kv_cache.scales", "token"), four, *ways, _FAKE)))
    return CachePlan(config, places, scales, scales)


def _check_groups(config: KVCacheConfig, places: CachePlaces) -> None:
    for cache in places.caches:
        head_dim, grid = cache.attention.head_dim, config.grid(keys=cache.keys)
        if grid.group_size not in {None, WHOLE_TOKEN} and head_dim % grid.group_size:
            text = (
                f"{{}} does not divide the heads of {head_dim} entries of {cache.attention.name}; use a divisor, or -1 "
                "for all heads of a token"
            )
            raise SettingError(Said(text, (_of(cache, "groupsize", grid.group_size),)))
        if head_dim % 2 and grid.bits == 4 and config.resolved_form is CacheForm.INT:
            text = (
                f"{{}}: the heads of {head_dim} entries of {cache.attention.name} cannot lie two in a byte; use {{}}, "
                "or round them in float: {}"
            )
            eight = _of(cache, "bits", 8, advised=True)
            raise SettingError(Said(text, (_of(cache, "bits", grid.bits), eight, _FAKE)))


def _of(cache: Cache, name: str, value: object, *, advised: bool = False) -> Setting:
    """A setting of keys or of values."""
    return Setting(f"kv_cache.{'k' if cache.keys else 'v'}_{name}", value, advised)


def _check_fused(place: FusedPlace, config: KVCacheConfig) -> None:
    if place.node.op_type != "GroupQueryAttention":
        text = (
            f"{label(place.node)} ({place.node.op_type}) keeps its cache itself, in float: of the fused operators "
            "GroupQueryAttention alone takes integers; leave the cache in float, or round it in float, for studies: {}"
        )
        raise SettingError(Said(text, (_FAKE,)))
    if config.k_bits != config.v_bits:
        given = [(cache, config.grid(keys=cache.keys).bits) for cache in (place.keys, place.values)]
        asked = tuple(_of(cache, "bits", bits) for cache, bits in given if bits is not None)
        other = next((_of(cache, "bits", asked[0].value, advised=True) for cache, bits in given if bits is None), None)
        why = f"{label(place.node)} is a GroupQueryAttention, which keeps K and V in one type"
        if other is None:
            text, ways = f"{{}} and {{}}: {why}; give both as many", asked
        else:
            text, ways = f"{{}} alone: {why}; add {{}}", (*asked, other)
        raise SettingError(Said(f"{text}, or round them in float, for studies: {{}}", (*ways, _FAKE)))


def require_reader(plan: CachePlan, reader: DataReader | None) -> None:
    """Refuse fixed scales without calibration data.

    Raises:
        CalibrationError: There are none.
    """
    if plan.calibrated and reader is None:
        tokens = ", or use scales=token" if not plan.places.fused or plan.config.k_bits == FEW_BITS else ""
        raise CalibrationError(
            "the fixed scales of the key/value cache need calibration data: pass a CalibrationDataReader"
            f"{tokens}, or round it in float, for studies (form='fake')"
        )


def needs_calibration(survey: Survey, config: QConfig) -> bool:
    """Whether a cache that is asked for has fixed scales; arguments and errors are those of `plan_cache`."""
    return config.kv_cache is not None and bool(plan_cache(survey, config.kv_cache).calibrated)


def check_cache(survey: Survey, config: QConfig, reader: DataReader | None) -> CachePlan | None:
    """Refuse early what would fail late.

    Args:
        survey: The float model, as it comes.
        config: What is asked for.
        reader: Calibration data.

    Returns:
        What is to be done to the cache, should nothing else change; None for nothing.

    Raises:
        ConfigError: As from `plan_cache`; keys before RoPE beside R3; a file of scales beside SmoothQuant; or a prefix
            that is fed would have to be integers.
        ModelError: As from there; or keys that are to be balanced cannot be.
        CalibrationError: Fixed scales, and no calibration data.
    """
    if config.kv_cache is None:
        return None
    plan = plan_cache(survey, config.kv_cache)
    require_reader(plan, reader)
    if config.balances_keys:
        require_balanceable(survey)
    before_rope = config.kv_cache.k_bits is not None and config.kv_cache.k_pre_rope
    if before_rope and config.quarot is not None and config.quarot.r3:
        text = "{}: keys are rounded before RoPE, and R3 ({}) rotates them behind it; leave out one of the two"
        both = (Setting("kv_cache.k_pre_rope", value=True), Setting("rotation.r3", value=True))
        raise SettingError(Said(text, both))
    if plan.given is not None and any(isinstance(item, SmoothQuantConfig) for item in config.algo_config):
        raise ConfigError(
            f"{plan.given.path}: its scales are not of what SmoothQuant makes of the values; leave out the file, or "
            "SmoothQuant"
        )
    held = prefix_of(recorded(survey.model))
    form = config.prefix.form if config.prefix is not None else None if held is None else held[0]
    if form == PrefixForm.NPZ and config.kv_cache.resolved_form is CacheForm.INT:
        text = (
            "a prefix in a file beside the model is a cache in float, and the graph is to take integers: keep the "
            "prefix in the graph ({}), or round the cache in float, for studies: {}"
        )
        raise SettingError(Said(text, (Setting("prefix.form", "graph", advised=True), _FAKE)))
    return plan
