"""Capture: what is launched, specialised as on the GPU, without running."""

import lab_kernels
import pytest
import torch

from headrace.kernels.lab.launches import capture, execute
from headrace.kernels.triton.target import architecture, override

CPU = torch.device("cpu")


def test_capture_records_and_runs_nothing():
    x, out = torch.ones(100), torch.zeros(100)
    with capture(90) as launches:
        lab_kernels.scale[(2,)](x, out, 100, 2.0, BLOCK=64, num_warps=2, num_stages=1, enable_fp_fusion=False)
        lab_kernels.scale[lambda meta: (meta["n"] // meta["BLOCK"], 3)](x, out, 128, 2.0, BLOCK=64)
    assert out.sum() == 0
    first, second = launches
    assert (first.name, first.grid, first.ctas, first.arch) == ("scale", (2, 1, 1), 2, 90)
    assert second.grid == (2, 3, 1)
    assert first.arguments["x"] is x and first.constexprs == {"BLOCK": 64}
    assert (first.options.num_warps, first.options.num_stages, first.options.enable_fp_fusion) == (2, 1, False)
    assert [name for name, _ in first.parameters()] == ["x", "out", "n", "factor"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_specialisation_follows_alignment_and_values(device):
    x = torch.empty(4096, dtype=torch.bfloat16, device=device)
    with capture(90) as launches:
        lab_kernels.scale[(1,)](x, x[8:], 64, 1.5, BLOCK=64)
        lab_kernels.scale[(1,)](x[1:], x, 63, 1.5, BLOCK=64)
        lab_kernels.scale[(1,)](x, x, 1, 1.5, BLOCK=64)
    aligned, odd, one = launches
    assert aligned.divisible() == {"x", "out", "n"}
    assert aligned.signature == {"x": "*bf16", "out": "*bf16", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    assert odd.divisible() == {"out"}
    assert one.constexprs == {"n": 1, "BLOCK": 64}
    assert [name for name, _ in one.parameters()] == ["x", "out", "factor"]


def test_none_and_tuples():
    x, bias, out = torch.arange(64.0), torch.full((64,), 3.0), torch.zeros(64)
    with execute(90) as executions:
        lab_kernels.optional_bias[(1,)](x, None, out, BLOCK=64)
    assert executions[0].launch.constexprs == {"bias": None, "BLOCK": 64}
    assert torch.equal(out, x)
    with execute(90):
        lab_kernels.optional_bias[(1,)](x, bias, out, BLOCK=64)
    assert torch.equal(out, x + 3)
    with execute(90):
        lab_kernels.with_tuple[(1,)]((x, out), 40, BLOCK=64)
    assert torch.equal(out, torch.where(torch.arange(64) < 40, x, x + 3))


def test_ops_see_the_architecture_only_inside():
    assert architecture(CPU) == 90
    with capture(120):
        assert architecture(CPU) == 120
        with override(80):
            assert architecture(CPU) == 80
    assert architecture(CPU) == 90


def test_launching_is_as_before_afterwards():
    original = lab_kernels.scale.run.__func__
    with pytest.raises(ZeroDivisionError), capture(90):
        raise ZeroDivisionError
    assert lab_kernels.scale.run.__func__ is original


def test_unknown_options_are_refused():
    with capture(90), pytest.raises(KeyError, match="num_wraps"):
        lab_kernels.scale[(1,)](torch.ones(4), torch.ones(4), 4, 1.0, BLOCK=64, num_wraps=4)


def test_meta_tensors_cannot_be_executed():
    x = torch.empty(64, device="meta")
    with execute(90), pytest.raises(RuntimeError, match="x is on meta"):
        lab_kernels.scale[(1,)](x, x, 64, 1.0, BLOCK=64)


@pytest.mark.parametrize(("axis", "most"), [("x", 2**31 - 1), ("y", 65535), ("z", 65535)])
def test_a_grid_that_no_gpu_takes_is_refused(axis, most):
    x = torch.empty(64)

    def launch(extent: int) -> None:
        grid = tuple(extent if name == axis else 1 for name in "xyz")
        lab_kernels.scale[grid](x, x, 64, 1.0, BLOCK=64)

    with capture(90) as launches:
        launch(most)
        with pytest.raises(ValueError, match=f"scale: a grid of {most + 1} along {axis}, .* at most {most}"):
            launch(most + 1)
    assert [one.ctas for one in launches] == [most]
