"""Where tensors live: what a CPU shows of it, and that a missing GPU is refused before anything is read."""

import sys

import numpy as np
import pytest
import torch
from networks import Scripted, scripted_engine

from headrace.engine import Engine, EngineConfig, EngineFailed, GenerationError, options
from headrace.engine.cli import main
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model import Caches
from headrace.engine.run.device import Device
from headrace.engine.run.memory import plan_caches, unit_bytes
from headrace.engine.sizing import step_bytes
from headrace.kernels import select

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_uploads_keep_shapes_and_share_one_copy():
    device = Device("cpu")
    arrays = [np.arange(6).reshape(2, 3), np.empty((0, 3), np.int64), np.array([7])]
    tensors = device.upload(arrays)
    assert [t.tolist() for t in tensors] == [a.tolist() for a in arrays]
    assert [t.shape for t in tensors] == [a.shape for a in arrays]
    assert tensors[0].untyped_storage().data_ptr() == tensors[2].untyped_storage().data_ptr()
    memory = torch.zeros(10, dtype=torch.int64)
    for _ in range(2):
        placed = device.upload(arrays, memory)
        assert [t.tolist() for t in placed] == [a.tolist() for a in arrays]
        assert placed[0].data_ptr() == memory.data_ptr()
    assert device.upload([np.arange(11)], memory)[0].data_ptr() != memory.data_ptr(), "no room: memory of its own"


def test_a_download_is_a_copy():
    device = Device("cpu")
    with device.work():
        source = torch.arange(3)
        copy = device.download(source)
        source.zero_()
    device.wait()
    assert copy.tolist() == [0, 1, 2]
    assert device.available_bytes() > 0


def test_a_step_has_room_beside_the_pages(tmp_path):
    config = ModelConfig.load(EMBEDDED_MODEL)
    few, many = (step_bytes(config, EngineConfig(max_sequences=n)) for n in (1, 1024))
    assert many > 1024 * 12 * config.vocab_size > few > 0

    class Gpu(Device):
        def __init__(self):
            super().__init__("cpu")
            self.cuda, self.torch = True, torch.device("cuda")

        def available_bytes(self):
            return 1 << 30

    one = Caches.allocate(config, 1, 1, 16, device="meta")
    options = {"num_slots": 2, "page_size": 16, "model_context": 1 << 40}
    page, slot = unit_bytes(one)
    full = plan_caches(one, Gpu(), **options).num_pages
    less = plan_caches(one, Gpu(), **options, step_bytes=1 << 29).num_pages
    assert full == int(((1 << 30) - 2 * slot) * 0.85) // page
    assert less == int(((1 << 29) - 2 * slot) * 0.85) // page


def test_a_lost_device_ends_the_engine(text):
    """A failing step costs its requests; a device that then fails to answer costs the engine, which says so."""
    network = Scripted(lambda token: token + 1)
    network.fail_on = 333
    with scripted_engine(text, network) as engine:
        device = engine._loop._runner.device
        with pytest.raises(GenerationError, match="planted kernel failure"):
            engine.generate([333])
        assert engine.accepting

        def gone():
            raise RuntimeError("an illegal memory access was encountered")

        device.wait = gone
        with pytest.raises(GenerationError, match="the device cpu is lost: an illegal memory access"):
            engine.generate([333])
        with pytest.raises(EngineFailed, match="lost"):
            engine.generate([300])


def test_a_backend_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "headrace.kernels.triton", None)
    for name in [name for name in sys.modules if name.startswith("headrace.kernels.triton")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="backend 'triton' needs the package"):
        select("triton")


def test_what_auto_means(monkeypatch):
    for built, kernels in ((True, "native"), (False, "reference")):
        monkeypatch.setattr(options, "native_is_built", lambda built=built: built)
        assert (EngineConfig().kernels, EngineConfig().torch_cache_dtype) == (kernels, "float32")
    gpu = EngineConfig(device="cuda:0")
    assert (gpu.kernels, gpu.torch_cache_dtype) == ("triton", "bfloat16")
    mixed = EngineConfig(device="cuda", backend="reference", cache_dtype="float32")
    assert (mixed.kernels, mixed.torch_cache_dtype) == ("reference", "float32")


@needs_no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_named(name, capsys):
    with pytest.raises(ValueError, match=f"device '{name}' is not there: torch .* sees no CUDA device"):
        Engine(config=EngineConfig(device=name))
    assert main(["generate", "1 + 1", "--device", name]) == 2
    assert capsys.readouterr().err.startswith(f"headrace: device '{name}' is not there")


def test_a_low_precision_cache_is_used():
    with Engine(config=EngineConfig(cache_dtype="bfloat16", max_sequences=2)) as engine:
        caches = engine._loop._runner.caches
        assert {t.dtype for t in (*caches.keys, *caches.values, *caches.conv)} == {torch.bfloat16}
        assert {t.dtype for t in caches.ssm} == {torch.float32}
        assert "7" in engine.chat([{"role": "user", "content": "3 + 4"}]).content
