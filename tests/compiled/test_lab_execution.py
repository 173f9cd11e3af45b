"""Compiled kernels executed on the CPU: right ones agree with torch, planted bugs are named, bytes are counted."""

import re

import lab_kernels
import pytest
import torch

from headrace.kernels.lab.compile import compile_launch
from headrace.kernels.lab.launches import capture, execute
from headrace.kernels.lab.ptx import AsyncCopyError, PtxError, RaceError, run

ARCHITECTURES = [80, 90, 100, 120]
SECTOR = 32


def operands(tokens=16, columns=256, rows=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return x, weight, torch.zeros(tokens, rows)


def multiply(x, weight, out, **options):
    settings = {"BLOCK_N": 32, "BLOCK_K": 64, "num_stages": 3, "num_warps": 2, "enable_fp_fusion": False} | options
    grid = (weight.shape[0] // settings["BLOCK_N"],)
    lab_kernels.multiply[grid](x, weight, out, x.shape[1], weight.shape[0], TOKENS=x.shape[0], **settings)


def captured(launch, *tensors, arch=90, **options):
    with capture(arch) as launches:
        launch(*tensors, **options)
    return compile_launch(launches[0]), launches[0]


def without_each_barrier(compiled, launch, start=0, end=None):
    """For every barrier in that part of the code: whether a race is seen when it alone is taken out."""
    seen = []
    for barrier in re.compile(r"bar\.sync\s+0\s*;").finditer(compiled.ptx, start, end or len(compiled.ptx)):
        try:
            run(compiled, launch, ptx=compiled.ptx[: barrier.start()] + compiled.ptx[barrier.end() :])
            seen.append(False)
        except RaceError:
            seen.append(True)
    return seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matrix_products(arch, dtype):
    x, weight, out = operands(dtype=dtype)
    with execute(arch) as executions:
        multiply(x, weight, out, **({"BLOCK_K": 32} if dtype == torch.float32 else {}))
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-5, atol=1e-4)
    assert any("mma.sync" in opcode for opcode in executions[0].statistics.instructions) == (dtype != torch.float32)


def test_narrow_matrix_products():
    """fp8 by fp8: mma m16n8k32 on sm_89, which has it as mma.sync."""
    x, weight, out = operands()
    x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    with execute(89) as executions:
        multiply(x, weight, out)
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-5, atol=1e-4)
    assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in executions[0].statistics.instructions


def test_tokens_in_a_tile_do_not_change_a_row():
    x, weight, out = operands(tokens=32)
    few = torch.zeros(8, 64)
    with execute(90):
        multiply(x, weight, out)
        multiply(x[:8], weight, few)
    assert torch.equal(out[:8], few)


@pytest.mark.parametrize("arch", [90, 100])
def test_reductions_through_shared_memory(arch):
    x, out = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    with execute(arch) as executions:
        lab_kernels.row_sums[(1,)](x, out, 1024, ROWS=4, COLUMNS=1024, num_warps=4)
    torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-4)
    assert executions[0].statistics.shared_requests > 0


def test_the_last_program_adds_the_parts():
    x, parts, out = torch.arange(256.0), torch.zeros(4), torch.zeros(1)
    counter = torch.zeros(1, dtype=torch.int32)
    with execute(90):
        for _ in range(2):
            lab_kernels.sum_of_parts[(4,)](x, parts, out, counter, BLOCK=64, SPLITS=4)
    assert out.item() == x.sum() and counter.item() == 0


def test_a_sample_leaves_counters_as_they_were():
    x, parts, out = torch.arange(256.0), torch.zeros(4), torch.zeros(1)
    counter = torch.zeros(1, dtype=torch.int32)
    with capture(90) as launches:
        lab_kernels.sum_of_parts[(4,)](x, parts, out, counter, BLOCK=64, SPLITS=4)
    run(compile_launch(launches[0]), launches[0], {(1, 0, 0): 2.0, (3, 0, 0): 2.0})
    assert parts.tolist() == [0, x[64:128].sum(), 0, x[192:].sum()] and counter.item() == 0 and out.item() == 0


# ---------------------------------------------------------------------- planted bugs


def test_out_of_bounds_load_names_argument_and_line():
    x, out = torch.zeros(100), torch.zeros(100)
    message = r"28 lanes of CTA \(1, 0, 0\), the first 4 bytes past the end of x \(400 bytes\): .*lab_kernels.py:16:"
    with pytest.raises(PtxError, match=message), execute(90):
        lab_kernels.scale_unmasked[(2,)](x, out, 100, 1.0, BLOCK=64, num_warps=2)


def test_bounds_are_those_of_the_view():
    """The neighbour in the same storage is out of bounds, and so is another argument's memory."""
    both = torch.zeros(200)
    with pytest.raises(PtxError, match="past the end of x"), execute(90):
        lab_kernels.scale_unmasked[(2,)](both[:100], both[100:], 100, 1.0, BLOCK=64)


def test_out_of_bounds_before_the_start():
    x, out = torch.zeros(128), torch.zeros(64)
    with pytest.raises(PtxError, match="4 bytes before the start of x"), execute(90):
        lab_kernels.gather[(1,)](x[64:], out, -1, BLOCK=64, num_warps=2)


def test_removed_barriers_are_seen():
    """Each barrier between the warps' partial sums and their reading, taken out alone."""
    x, out = torch.randn(4, 1024), torch.zeros(4)
    compiled, launch = captured(lambda: lab_kernels.row_sums[(1,)](x, out, 1024, ROWS=4, COLUMNS=1024, num_warps=4))
    run(compiled, launch)
    assert without_each_barrier(compiled, launch)[:2] == [True, True]


def test_removed_barriers_of_a_pipeline_are_seen():
    """In the loop: before a tile is read, and before it is overwritten. Those outside may guard against nothing."""
    compiled, launch = captured(multiply, *operands())
    start = compiled.ptx.index("Loop Header")
    assert without_each_barrier(compiled, launch, start, compiled.ptx.index("bra", start)) == [True, True]


def test_removed_wait_is_seen():
    compiled, launch = captured(multiply, *operands(columns=512))
    run(compiled, launch)
    first = re.search(r"cp\.async\.wait_group\s+\S+\s*;", compiled.ptx)
    with pytest.raises(AsyncCopyError, match="before its asynchronous copy was waited for"):
        run(compiled, launch, ptx=compiled.ptx.replace(first[0], ""))


def test_a_wait_for_too_few_groups_is_seen():
    compiled, launch = captured(multiply, *operands(columns=512))
    later = re.sub(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 2}", compiled.ptx)
    with pytest.raises(AsyncCopyError):
        run(compiled, launch, ptx=later)


def test_misaligned_access_is_seen():
    """Compiled for aligned pointers, launched with another: what a wrong specialisation does."""
    x, out = torch.zeros(129), torch.zeros(128)
    compiled, launch = captured(lambda: lab_kernels.scale[(1,)](x, out, 128, 1.0, BLOCK=128, num_warps=1))
    launch.arguments["x"] = x[1:]
    with pytest.raises(PtxError, match="misaligned 16-byte access"):
        run(compiled, launch)


def test_divergent_barrier_is_seen():
    x, out = torch.randn(4, 1024), torch.zeros(4)
    compiled, launch = captured(lambda: lab_kernels.row_sums[(1,)](x, out, 1024, ROWS=4, COLUMNS=1024, num_warps=4))
    barrier = re.search(r"bar\.sync\s+0\s*;", compiled.ptx)[0]
    skip = "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, 40; @p bra over; " + barrier + " over: }"
    with pytest.raises(PtxError, match="divergent barrier"):
        run(compiled, launch, ptx=compiled.ptx.replace(barrier, skip, 1))


def test_an_unknown_instruction_is_named_when_it_is_reached():
    x, out = torch.ones(64), torch.zeros(64)
    compiled, launch = captured(lambda: lab_kernels.scale[(1,)](x, out, 64, 1.0, BLOCK=64))
    start = compiled.ptx.index("ld.param")
    unknown = compiled.ptx[:start] + "wgmma.fence.sync.aligned; " + compiled.ptx[start:]
    with pytest.raises(PtxError, match="not implemented: wgmma.fence"):
        run(compiled, launch, ptx=unknown)
    skipped = compiled.ptx[:start] + "bra.uni L; wgmma.fence.sync.aligned; L: " + compiled.ptx[start:]
    run(compiled, launch, ptx=skipped)
    assert torch.equal(out, x)


# ---------------------------------------------------------------------- counts


def test_bytes_of_a_product():
    x, weight, out = operands(tokens=16, columns=512, rows=128)
    with execute(90) as executions:
        multiply(x, weight, out)
    counted = executions[0].statistics
    assert counted.loads["weight"].bytes == counted.loads["weight"].sectors * SECTOR == weight.nbytes
    assert counted.loads["x"].bytes == 4 * x.nbytes  # each of four programs reads it
    assert counted.loads["x"].unique * SECTOR == x.nbytes
    assert counted.stores["out"].unique * SECTOR == out.nbytes
    assert counted.moved(("weight",)) == weight.nbytes + x.nbytes + out.nbytes
    products = counted.instructions["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]
    assert products in (512, 1024)  # 128 x 16 x 512 in tiles of 16 x 8 x 16; Triton 3.6 lets both warps do all of them


def test_a_sample_is_scaled_by_what_it_stands_for():
    x, weight, out = operands(tokens=16, columns=512, rows=256)
    compiled, launch = captured(multiply, x, weight, out)
    whole = run(compiled, launch)
    part = run(compiled, launch, {(1, 0, 0): 4.0, (6, 0, 0): 4.0})
    assert (whole.executed, part.executed, whole.busy_ctas, part.busy_ctas) == (8, 2, 8, 8)
    assert part.loads["weight"].sectors == whole.loads["weight"].sectors
    assert part.moved(("weight",)) == whole.moved(("weight",))


def test_uncoalesced_access_shows_in_the_sectors():
    x, out = torch.zeros(64 * 16), torch.zeros(64)
    counted = {}
    for stride in (1, 3, 8):
        with execute(90) as executions:
            lab_kernels.gather[(1,)](x, out, stride, BLOCK=64, num_warps=2)
        counted[stride] = executions[0].statistics.loads["x"].efficiency
    assert counted[1] == 1.0 and counted[8] == 1 / 8
    assert 0.3 < counted[3] < 0.4


def test_bytes_in_flight():
    """Three stages of copies: two tiles are on their way when the first is waited for."""
    stage = 64 * (32 + 16) * 2  # bytes: BLOCK_K of weights and of tokens
    for stages, expected in ((2, 1), (3, 2), (4, 3)):
        with execute(90) as executions:
            multiply(*operands(columns=512), num_stages=stages)
        assert expected * stage <= executions[0].statistics.bytes_in_flight <= (expected + 1) * stage


def test_bytes_in_flight_of_plain_loads():
    x, out = torch.zeros(4096), torch.zeros(4096)
    with execute(90) as executions:
        lab_kernels.scale[(1,)](x, out, 4096, 1.0, BLOCK=4096, num_warps=4)
    assert executions[0].statistics.bytes_in_flight == 4096 * 4
