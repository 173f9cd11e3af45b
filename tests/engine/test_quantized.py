"""Quantised checkpoints end to end: the logits of the same weights written out in fp32, and every damage one error."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from driver import Driver, random_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.engine import Delta, Engine, EngineConfig, SamplingParams
from headrace.engine.cli.quantize import quantize_checkpoint
from headrace.engine.config import ConfigError, ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model import CheckpointError, NemotronH, load_model
from headrace.engine.model.weights import open_weights
from headrace.engine.model.weights.names import modules
from headrace.engine.run.device import Device
from headrace.engine.sizing import cache_sizes
from headrace.kernels import native_is_built, select
from headrace.kernels.formats import Fp8, Nvfp4, Weight, dequantised, format_of, tensors_of
from headrace.kernels.quantize import quantize_fp8, quantize_nvfp4

PATTERN = "ME*-ME*"
SIZES = {"moe_latent_size": 32, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 64,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "mlp_bias": True}  # fmt: skip
FILE = "model.safetensors"
PARTS = {"fp8": ("weight", "weight_scale"), "nvfp4": ("weight", "weight_scale", "weight_scale_2")}
QUANTIZE = {"fp8": quantize_fp8, "nvfp4": quantize_nvfp4}

MAPS: dict[str, Callable[[str], str]] = {
    "fp8": lambda name: "fp8",
    "nvfp4": lambda name: "nvfp4",
    "as released": lambda name: (
        "nvfp4" if ".experts." in name else "fp8" if name.endswith(("in_proj", "out_proj", "shared_experts.up_proj"))
        else "float"
    ),
    "every seam": lambda name: (
        "nvfp4" if name.endswith(("q_proj", "shared_experts.down_proj", "lm_head")) else
        "fp8" if ".experts." in name or name.endswith(("v_proj", "latent_proj", "3.mixer.up_proj"))
        else "float"
    ),
}  # fmt: skip


def store(original: Path, folder: Path, choose: Callable[[str], str], place: str = "inside") -> tuple[Path, Path]:
    """(a quantised checkpoint, the same weights in fp32), with the metadata "inside" config.json or "beside" it."""
    config = ModelConfig.load(original)
    chosen = {name: form for name in modules(config) if (form := choose(name)) != "float"}
    stored, dense, named = {}, {}, {}
    for name, tensor in load_file(original / FILE).items():
        module = name.removesuffix(".weight").removeprefix("backbone.")
        if module not in chosen or not name.endswith(".weight"):
            stored[name] = dense[name] = tensor
            continue
        form = chosen[module]
        weight: Weight = QUANTIZE[form](tensor)
        base = name.removesuffix(".weight")
        stored |= {f"{base}.{part}": t for part, t in zip(PARTS[form], tensors_of(weight), strict=True)}
        stored[f"{base}.input_scale"] = torch.tensor(0.5)  # in the releases; nothing here reads it
        dense[name] = dequantised(weight)
        named[base] = {"quant_algo": form.upper()} | ({"group_size": 16} if form == "nvfp4" else {})
    assert len(named) == len(chosen)
    for index, letter in enumerate(PATTERN):
        if letter == "*":
            mixer = f"backbone.layers.{index}.mixer"
            stored |= {f"{mixer}.k_proj.k_scale": torch.tensor(0.02), f"{mixer}.v_proj.v_scale": torch.tensor(0.05)}
    inside = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": named, "ignore": []}
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION",
              "kv_cache_quant_algo": None, "quantized_layers": named}}  # fmt: skip
    folders = folder / "stored", folder / "dense"
    for made, tensors in zip(folders, (stored, dense), strict=True):
        made.mkdir(parents=True)
        save_file(tensors, made / FILE)
        shutil.copy(original / "config.json", made)
    if place == "beside":
        (folders[0] / "hf_quant_config.json").write_text(json.dumps(beside))
    else:
        values = json.loads((original / "config.json").read_text())
        (folders[0] / "config.json").write_text(json.dumps(values | {"quantization_config": inside}))
    return folders


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("original"), PATTERN, mtp="*E", **SIZES).folder


@pytest.fixture
def stored(original, tmp_path) -> Path:
    return store(original, tmp_path, MAPS["as released"])[0]


def logits(model: NemotronH) -> Tensor:
    """Of two prompts, a chunk each, and of decoded tokens after them."""
    driver = Driver(model, 2)
    vocab = model.config.vocab_size
    prompts = {slot: random_prompt(40 + 9 * slot, vocab, slot) for slot in (0, 1)}
    return torch.cat([driver.step(chunks=prompts), *(driver.step({0: 3 + i, 1: 5 + i}) for i in range(4))])


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """The scale multiplies sums in place of weights: a rounding in another place, grown through the layers."""
    assert (actual - expected).norm() <= 2e-6 * expected.norm()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MAPS)
def test_logits_are_those_of_the_dense_weights(original, tmp_path, name):
    folder, dense = store(original, tmp_path, MAPS[name], place="beside" if name == "fp8" else "inside")
    actual, expected = logits(load_model(folder)), logits(load_model(dense))
    assert_equal_up_to_rounding(actual, expected)
    before = logits(load_model(original))
    assert (expected - before).norm() > 1e-3 * before.norm(), "quantisation must show, or nothing was tested"


def test_drafts_are_those_of_the_dense_weights(original, tmp_path):
    """The MTP module goes through the same layers."""
    folder, dense = store(original, tmp_path, MAPS["nvfp4"])
    hidden, ids = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    actual, expected = (load_model(path).mtp.forward(hidden, ids) for path in (folder, dense))
    assert_equal_up_to_rounding(actual, expected)


def test_exclusions_choose_the_same(original, tmp_path):
    """One algorithm and exclusions, as Nano has them, in place of the map."""
    kept = ("lm_head", "in_proj", "mtp.")
    folder, _ = store(original, tmp_path, lambda name: "float" if any(part in name for part in kept) else "nvfp4")
    expected = logits(load_model(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    excluded = ["lm_head", "*.in_proj", "backbone.layers.*.mixer.conv1d", "mtp*"]
    beside = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded, "kv_cache_quant_algo": None}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
    assert torch.equal(logits(load_model(folder)), expected)


def test_weights_stay_as_they_are_stored(stored):
    """What the loader hands out, and what the packed model keeps."""
    config, files = ModelConfig.load(stored), load_file(stored / FILE)
    with open_weights(stored, config) as weights:
        experts = weights["layers.1.mixer.experts.up_proj"]
        assert (format_of(experts), experts.dtype, len(experts)) == ("nvfp4", torch.uint8, 4)
        for index in range(4):
            name = f"backbone.layers.1.mixer.experts.{index}.up_proj"
            matrix = experts[index]
            assert isinstance(matrix, Nvfp4)
            assert torch.equal(matrix.codes, files[f"{name}.weight"])
            assert torch.equal(matrix.scale, files[f"{name}.weight_scale_2"])
        weight = weights["layers.0.mixer.in_proj.weight"]
        assert isinstance(weight, Fp8) and torch.equal(
            weight.scale, files["backbone.layers.0.mixer.in_proj.weight_scale"]
        )
        assert not any(name.endswith(("input_scale", "weight_scale")) for name in weights)
        assert weights["layers.2.mixer.k_proj.k_scale"] == torch.tensor(0.02)
    model = load_model(stored)
    assert isinstance(model.layers[1].experts.up, Nvfp4)
    assert model.layers[2].kv_scales == pytest.approx((0.02, 0.05))


def test_kernels_without_the_format_are_refused_before_anything_is_read(stored):
    floats = replace(select(), formats=frozenset({"float"}))
    (stored / FILE).write_bytes(b"")  # reading would fail otherwise
    with pytest.raises(ConfigError, match="fp8 and nvfp4 weights, these kernels take float"):
        NemotronH(ModelConfig.load(stored), {}, floats)


# Damage


IN_PROJ, EXPERT = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.experts.2.up_proj"


def change(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        edit(tensors)
        save_file(tensors, folder / FILE)

    return damage


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return change(lambda tensors: tensors.update({name: tensor}))


def drop(*names: str) -> Callable[[Path], None]:
    return change(lambda tensors: [tensors.pop(name) for name in names])


def metadata(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


E4M3 = torch.float8_e4m3fn
DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no scale": (drop(f"{IN_PROJ}.weight_scale"), ["missing", "layers.0.mixer.in_proj.weight_scale"]),
    "no block scales": (drop(f"{EXPERT}.weight_scale"), ["missing", "experts.2.up_proj.weight_scale"]),
    "no global scale": (drop(f"{EXPERT}.weight_scale_2"), ["missing", "experts.2.up_proj.weight_scale_2"]),
    "a scale per row": (put(f"{IN_PROJ}.weight_scale", torch.ones(328)), [IN_PROJ, "[328]", "[]"]),
    "blocks of 32": (put(f"{EXPERT}.weight_scale", torch.ones(48, 1).to(E4M3)), [EXPERT, "[48, 1]", "[48, 2]"]),
    "block scales as floats": (put(f"{EXPERT}.weight_scale", torch.ones(48, 2)), [EXPERT, "F32", "nvfp4", "F8_E4M3"]),
    "scale as bf16": (put(f"{IN_PROJ}.weight_scale", torch.ones((), dtype=torch.bfloat16)), [IN_PROJ, "BF16", "F32"]),
    "codes one by one": (put(f"{EXPERT}.weight", torch.ones(48, 32, dtype=torch.uint8)), ["[48, 32]", "[48, 16]"]),
    "float weight that is named": (put(f"{IN_PROJ}.weight", torch.ones(328, 64)), [IN_PROJ, "F32", "fp8", "F8_E4M3"]),
    "quantised weight that is not named": (
        metadata(lambda config: config["quantization_config"]["quantized_layers"].pop(IN_PROJ)),
        [f"{IN_PROJ}.weight", "F8_E4M3", "(float)", "BF16"],
    ),
    "no metadata": (metadata(lambda config: config.pop("quantization_config")), ["F8_E4M3", "(float)"]),
    "odd input scale": (put(f"{IN_PROJ}.input_scale", torch.ones(2)), [f"{IN_PROJ}.input_scale", "[2]", "[]"]),
    "scale of no weight": (
        put("backbone.layers.2.mixer.q_proj.weight_scale", torch.ones(())), ["left over", "q_proj.weight_scale"],
    ),
    "absent module": (
        metadata(lambda config: config["quantization_config"]["quantized_layers"].update(
            {"backbone.layers.7.mixer.in_proj": {"quant_algo": "FP8"}})),
        ["layers.7.mixer.in_proj", "no such linear layer"],
    ),
    "truncated": (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-3]), [FILE, "truncated"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(stored, name):
    """One line that names the tensor, before anything is read into memory."""
    damage, fragments = DAMAGE[name]
    damage(stored)
    config = ModelConfig.load(stored)
    with pytest.raises(CheckpointError) as error, open_weights(stored, config):
        pytest.fail("opened")
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    for fragment in fragments:
        assert fragment in message, message


def nan_at(name: str, *index: int) -> Callable[[Path], None]:
    """One e4m3 of a tensor becomes NaN."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8)[index] = 0xFF

    return change(edit)


BAD_NUMBERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "NaN weight": (f"{IN_PROJ}.weight", nan_at(f"{IN_PROJ}.weight", 3, 5)),
    "NaN scale": (f"{IN_PROJ}.weight_scale", put(f"{IN_PROJ}.weight_scale", torch.tensor(torch.nan))),
    "infinite scale": (f"{EXPERT}.weight_scale_2", put(f"{EXPERT}.weight_scale_2", torch.tensor(torch.inf))),
    "negative scale": (f"{IN_PROJ}.weight_scale", put(f"{IN_PROJ}.weight_scale", torch.tensor(-1.0))),
    "NaN block scale": (f"{EXPERT}.weight_scale", nan_at(f"{EXPERT}.weight_scale", 47, 1)),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_is_no_number_is_refused_while_loading(stored, name, backend):
    """By tensor, on the backends that read every byte of a weight anyway."""
    if backend == "native" and not native_is_built():
        pytest.skip("the native kernels were not built")
    tensor, damage = BAD_NUMBERS[name]
    damage(stored)
    kernels = select(backend)
    with pytest.raises(CheckpointError, match=re.escape(tensor)):
        load_model(stored, kernels=kernels)
    kernels.close()


def test_kv_scales_are_there_for_every_layer_or_for_none(stored):
    drop("backbone.layers.2.mixer.k_proj.k_scale")(stored)
    with pytest.raises(CheckpointError, match=r"missing 'layers\.2\.mixer\.k_proj\.k_scale'"):
        load_model(stored)


def test_input_scales_may_be_absent(stored):
    expected = logits(load_model(stored))
    change(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("input_scale")])(stored)
    assert torch.equal(logits(load_model(stored)), expected)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_kv_scales_that_cannot_be(stored, scale):
    put("backbone.layers.2.mixer.k_proj.k_scale", torch.tensor(scale))(stored)
    with pytest.raises(ConfigError, match=r"layers\.2\.mixer\.k_proj\.k_scale must be a finite number > 0"):
        load_model(stored)


# The KV cache


def test_kv_scales_divide_what_is_cached(stored):
    """The first attention layer reads the same whatever the cache: fp8 pages are those of fp32, scaled and rounded."""
    model = load_model(stored)
    prompt = random_prompt(50, model.config.vocab_size, 1)
    wide, narrow = (Driver(model, 1, kv_dtype=dtype) for dtype in (torch.float32, torch.float8_e4m3fn))
    expected, actual = (driver.step(chunks={0: prompt}) for driver in (wide, narrow))
    for pages, stored_pages, scale in (
        (wide.caches.keys[0], narrow.caches.keys[0], 0.02),
        (wide.caches.values[0], narrow.caches.values[0], 0.05),
    ):
        assert stored_pages.dtype == torch.float8_e4m3fn
        exact = (pages / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert exact.float().nan_to_num().abs().amax() > 16, "scales that use the range"
        assert torch.equal(exact.float().nan_to_num(nan=7), stored_pages.float().nan_to_num(nan=7))
    difference = (actual - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.1, difference
    assert not actual.isnan().any()


@pytest.fixture(scope="module")
def embedded_fp8(tmp_path_factory) -> Path:
    """The embedded model in NVFP4, with metadata that asks for an fp8 KV cache."""
    folder = tmp_path_factory.mktemp("embedded")
    quantize_checkpoint(EMBEDDED_MODEL, folder, "nvfp4")
    for file, key, value in (
        ("config.json", "kv_cache_scheme", {"dynamic": False, "num_bits": 8, "type": "float"}),
        ("hf_quant_config.json", "kv_cache_quant_algo", "FP8"),
    ):
        values = json.loads((folder / file).read_text())
        values["quantization_config" if file == "config.json" else "quantization"][key] = value
        (folder / file).write_text(json.dumps(values))
    return folder


def answers(folder: Path, **options) -> tuple[list[str], torch.dtype, int]:
    """(greedy answers to some questions at once, dtype of the pages, preemptions)."""
    config = EngineConfig(backend="reference", max_sequences=4, max_context=160, **options)
    with Engine(folder, config) as engine:
        questions = ("12 + 34", "What is 912 - 37?", "hello", "84 / 7")
        params = SamplingParams(temperature=0, max_tokens=120)
        streams = [engine.chat_stream([{"role": "user", "content": text}], params) for text in questions]
        texts = ["".join(event.text for event in stream if isinstance(event, Delta)) for stream in streams]
        return texts, engine._loop._runner.caches.keys[0].dtype, engine.stats()["preemptions"]


def test_the_checkpoint_chooses_the_kv_dtype(embedded_fp8):
    """As it says, unless told; and pages of one byte survive being saved and brought back."""
    texts, dtype, preemptions = answers(embedded_fp8)
    assert (dtype, preemptions) == (torch.float8_e4m3fn, 0)
    assert "46" in texts[0] and "875" in texts[1]
    crowded, dtype, preemptions = answers(embedded_fp8, page_size=4, num_pages=40)
    assert (crowded, dtype) == (texts, torch.float8_e4m3fn)
    assert preemptions > 0


def test_pages_of_one_byte_are_sized_so(embedded_fp8):
    config = ModelConfig.load(embedded_fp8)
    sizes = [
        cache_sizes(config, EngineConfig(kv_dtype=dtype, num_pages=64), Device("cpu"))
        for dtype in ("auto", "fp8", "bfloat16", "float32")
    ]
    sizes.append(cache_sizes(ModelConfig.load(EMBEDDED_MODEL), EngineConfig(num_pages=64), Device("cpu")))
    assert [size.page_bytes * 4 // sizes[-1].page_bytes for size in sizes] == [1, 1, 2, 4, 4]
    assert len({size.slot_bytes for size in sizes}) == 1
    with pytest.raises(ValueError, match="kv_dtype must be one of auto, float32, bfloat16, fp8, got 'int8'"):
        EngineConfig(kv_dtype="int8")
