"""Where tensors live: what a CPU shows of it, and that a missing GPU is refused before anything is read."""

import numpy as np
import pytest
import torch

from headrace.engine import Engine, EngineConfig
from headrace.engine.cli import main
from headrace.engine.run.device import Device

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


def test_what_auto_means():
    assert (EngineConfig().kernels, EngineConfig().torch_cache_dtype) == ("reference", "float32")
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
