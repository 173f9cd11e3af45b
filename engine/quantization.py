"""Which modules of a checkpoint are quantised, and how: modelopt's metadata in either place and either form.

Two places, ``quantization_config`` in config.json and the file hf_quant_config.json beside it; where both are, they
must say the same. Two forms: a map (``quant_algo: MIXED_PRECISION``, ``quantized_layers``), in which a module is
quantised if and only if it is named; and one algorithm for every linear layer that is not excluded
(``exclude_modules``, in config.json ``ignore``; ``*`` and ``?`` stand for any characters).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from headrace.engine.errors import ConfigError
from headrace.kernels.formats import BLOCK, Format

HF_QUANT_CONFIG = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
ALGORITHMS: dict[str, Format] = {"FP8": "fp8", "NVFP4": "nvfp4"}
PREFIXES = ("backbone.", "model.")
"""Of module names; published metadata has the first, newer transformers write the second."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the metadata says. Module names are without prefix, as ``weights.names`` has them."""

    modules: Mapping[str, Format] = field(hash=False)  # named one by one
    default: Format | None = None  # of every linear layer that is neither named nor excluded
    excluded: tuple[str, ...] = ()  # names and patterns
    kv_cache: Literal["fp8"] | None = None

    def format_of(self, module: str) -> Format:
        """Of a linear layer's weight."""
        named = self.modules.get(module)
        if named is not None:
            return named
        if self.default is None or any(covers(pattern, module) for pattern in self.excluded):
            return "float"
        return self.default

    @property
    def formats(self) -> frozenset[Format]:
        """All that occur."""
        return frozenset(self.modules.values()) | ({self.default} if self.default else set())


def read_quantization(config: Mapping[str, Any], beside: Any = None) -> Quantization | None:
    """From a parsed config.json and a parsed hf_quant_config.json (None: there is none). None: nothing is quantised.

    Raises ConfigError naming the key.
    """
    inside = config.get("quantization_config")
    read = [] if inside is None else [_from_config(_Keys("quantization_config", inside))]
    if beside is not None:
        read.append(_from_file(_Keys(HF_QUANT_CONFIG, _Keys(HF_QUANT_CONFIG, beside).get("quantization", dict))))
    if len(read) == 2 and read[0] != read[1]:
        raise ConfigError(f"quantization_config and {HF_QUANT_CONFIG} disagree: {_difference(*read)}")
    return read[0] if read else None


def write_quantization(modules: Mapping[str, Format], version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(``quantization_config`` for config.json, the whole of hf_quant_config.json) that name these modules.

    Module names are written as they are given, with the prefix of their tensors.
    """
    algorithms = {form: algorithm for algorithm, form in ALGORITHMS.items()}
    layers: dict[str, dict[str, Any]] = {name: {"quant_algo": algorithms[form]} for name, form in modules.items()}
    for entry in layers.values():
        if entry["quant_algo"] == "NVFP4":
            entry["group_size"] = BLOCK
    shared = {"quant_algo": MIXED, "quantized_layers": layers}
    inside = {"quant_method": "modelopt", **shared, "ignore": [], "kv_cache_scheme": None}
    producer = {"name": "headrace", "version": version}
    return inside, {"producer": producer, "quantization": {**shared, "kv_cache_quant_algo": None}}


class _Keys:
    """Typed access to a parsed object; failures are ConfigErrors that name the key."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be an object, got {values!r:.100}")
        self.where, self.values = where, values

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value; the default where the key is absent or null."""
        value = self.values.get(key)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind):
            raise ConfigError(f"{self.where}: {key} must be a {kind.__name__}, got {value!r:.100}")
        return value


def _from_config(keys: _Keys) -> Quantization:
    """``quantization_config`` of config.json."""
    if (method := keys.get("quant_method", str)) != "modelopt":
        raise ConfigError(f"{keys.where}: quant_method must be 'modelopt', got {method!r}")
    kv_cache: Literal["fp8"] | None = None
    if (scheme := keys.get("kv_cache_scheme", dict, None)) is not None:
        if (scheme.get("type"), scheme.get("num_bits"), scheme.get("dynamic", False)) != ("float", 8, False):
            raise ConfigError(f"{keys.where}: kv_cache_scheme must be static 8-bit float, got {scheme!r:.200}")
        kv_cache = "fp8"
    for name, group in keys.get("config_groups", dict, {}).items():
        weights = _Keys(f"{keys.where}: config_groups: {name}", group).get("weights", dict, {})
        _check_group_size(keys.where, f"config_groups: {name}", weights.get("num_bits"), weights.get("group_size"))
    return _modules(keys, "ignore", kv_cache)


def _from_file(keys: _Keys) -> Quantization:
    """hf_quant_config.json's ``quantization``."""
    algorithm = keys.get("kv_cache_quant_algo", str, None)
    if algorithm not in ("FP8", None):
        raise ConfigError(f"{keys.where}: kv_cache_quant_algo must be 'FP8' or null, got {algorithm!r}")
    return _modules(keys, "exclude_modules", "fp8" if algorithm else None)


def _modules(keys: _Keys, exclude: str, kv_cache: Literal["fp8"] | None) -> Quantization:
    algorithm = keys.get("quant_algo", str)
    excluded = keys.get(exclude, list, [])
    if not all(isinstance(pattern, str) for pattern in excluded):
        raise ConfigError(f"{keys.where}: {exclude} must name modules, got {excluded!r:.100}")
    patterns = tuple(sorted({_without_prefix(pattern) for pattern in excluded}))
    if algorithm != MIXED:
        default = _format(keys.where, "quant_algo", algorithm)
        if keys.get("quantized_layers", dict, None):
            raise ConfigError(f"{keys.where}: quantized_layers belongs to quant_algo {MIXED!r}, got {algorithm!r}")
        _check_group_size(keys.where, "quant_algo", 4 if default == "nvfp4" else 8, keys.values.get("group_size"))
        return Quantization({}, default, patterns, kv_cache)
    modules = dict(_named(keys))
    for name in modules:
        if any(covers(pattern, name) for pattern in patterns):
            raise ConfigError(f"{keys.where}: {name!r} is in quantized_layers and in {exclude}")
    return Quantization(modules, None, (), kv_cache)


def _named(keys: _Keys) -> Iterator[tuple[str, Format]]:
    seen = set()
    for name, value in keys.get("quantized_layers", dict).items():
        entry = _Keys(f"{keys.where}: quantized_layers: {name}", value)
        found = _format(keys.where, f"quantized_layers: {name}: quant_algo", entry.get("quant_algo", str))
        bits = 4 if found == "nvfp4" else 8
        _check_group_size(keys.where, f"quantized_layers: {name}", bits, value.get("group_size"))
        module = _without_prefix(name)
        if module in seen:
            raise ConfigError(f"{keys.where}: quantized_layers names {module!r} twice, with different prefixes")
        seen.add(module)
        yield module, found


def _format(where: str, key: str, algorithm: str) -> Format:
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    return ALGORITHMS[algorithm]


def _check_group_size(where: str, key: str, bits: Any, size: Any) -> None:
    """Only NVFP4 has one; there are files that spell 'none' as 0."""
    wanted = (BLOCK, None) if bits == 4 else (None, 0)
    if size not in wanted:
        raise ConfigError(f"{where}: {key}: group_size must be {wanted[0]!r}, got {size!r}")


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def covers(pattern: str, module: str) -> bool:
    """Whether a pattern means the module: its name, that of something it is part of, or a pattern of either."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")


def _difference(inside: Quantization, beside: Quantization) -> str:
    """One thing that only one of the two says."""
    if inside.kv_cache != beside.kv_cache:
        return f"KV cache {inside.kv_cache} and {beside.kv_cache}"
    if inside.default != beside.default:
        return f"{inside.default or MIXED} and {beside.default or MIXED}"
    for name in sorted({*inside.modules, *beside.modules}):
        pair = inside.modules.get(name), beside.modules.get(name)
        if pair[0] != pair[1]:
            return f"module {name!r} is {pair[0] or 'not named'} and {pair[1] or 'not named'}"
    return f"{sorted({*inside.excluded} ^ {*beside.excluded})[0]!r} is excluded by only one"
