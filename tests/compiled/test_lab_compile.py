"""The report of compiled code, and the structure that batches must share."""

import lab_kernels
import pytest
import torch

from headrace.kernels.lab.compile import LIMITS, compile_launch, count_opcodes, occupancy
from headrace.kernels.lab.launches import capture
from headrace.kernels.lab.numerics import NumericsError, same_numerics


def multiply(tokens: int, dtype=torch.bfloat16, arch=90, offset=0, **options):
    x = torch.empty(64, 1024, dtype=dtype, device="meta")
    weight = torch.empty(64 * 1024 + 8, dtype=dtype, device="meta")[offset:]
    settings = {"BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 3, "enable_fp_fusion": False} | options
    with capture(arch) as launches:
        lab_kernels.multiply[(1,)](x, weight, x, 1024, 64, TOKENS=tokens, **settings)
    return launches[0]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_report(arch):
    report = compile_launch(multiply(16, arch=arch)).report()
    assert report.spills == 0 and report.local_bytes == 0
    assert 32 <= report.registers <= 128 and report.threads == 128
    assert report.shared_bytes >= 2 * (64 * 64 + 64 * 16) * 2  # two stages of bf16 tiles under way
    assert set(report.async_loads) == {128} and not report.loads
    assert set(report.mma) == {"HMMA.16816.F32.BF16"}
    assert 1 <= report.occupancy <= LIMITS[arch].ctas
    assert report.instructions == sum(report.opcodes.values()) > 100


def test_compiled_once():
    launch = multiply(16)
    assert compile_launch(launch) is compile_launch(multiply(16))
    assert compile_launch(launch) is not compile_launch(launch, 100)
    assert compile_launch(launch) is not compile_launch(multiply(16, num_warps=2))


def test_a_lost_alignment_is_seen_in_the_widths():
    report = compile_launch(multiply(16, offset=1)).report()
    assert min([*report.loads, *report.async_loads]) < 128


def test_a_spilling_kernel_is_seen():
    x = torch.empty(256, 256, device="meta")
    with capture(90) as launches:
        lab_kernels.hungry[(1,)](x, x, 256, ROWS=64, COLUMNS=256, num_warps=4, maxnreg=64)
        lab_kernels.hungry[(1,)](x, x, 256, ROWS=16, COLUMNS=64, num_warps=4)
    spilling, fitting = (compile_launch(launch).report() for launch in launches)
    assert spilling.spill_loads > 0 and spilling.spill_stores > 0 and spilling.registers <= 64
    assert fitting.spills == 0


def test_too_much_shared_memory_is_refused():
    with pytest.raises(ValueError, match="bytes of shared memory, sm_120 allows 101376"):
        compile_launch(multiply(16, BLOCK_K=256, num_stages=4, arch=120))


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "ctas"),
    [
        (90, 32, 0, 128, 16),  # 64 warps
        (90, 128, 0, 128, 4),  # 65536 / (128 * 128)
        (90, 129, 0, 128, 3),  # registers come 256 to a warp
        (90, 32, 100_000, 128, 2),
        (90, 32, 232_448, 128, 1),
        (90, 32, 232_449, 128, 0),
        (80, 32, 80_000, 128, 2),
        (120, 32, 0, 128, 12),
        (90, 16, 0, 32, 32),
    ],
)
def test_occupancy(arch, registers, shared, threads, ctas):
    assert occupancy(arch, registers, shared, threads) == ctas


def test_opcodes_are_counted_from_machine_code():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
                                                             /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP1 UMOV UR4, 0x400 ;
        /*0030*/                   NOP;
    """
    assert count_opcodes(sass) == {"LDC": 1, "LDG.E.128.CONSTANT": 1, "UMOV": 1}


def test_same_numerics_lets_tiles_follow_the_batch():
    same_numerics({1: [multiply(8)], 16: [multiply(16)], 64: [multiply(64, BLOCK_N=32)]}, ("BLOCK_K",))


def test_same_numerics_names_the_changed_step():
    with pytest.raises(NumericsError, match="multiply on sm_90: BLOCK_K is 64 for batch 1 and 32 for batch 16"):
        same_numerics({1: [multiply(8)], 16: [multiply(16, BLOCK_K=32)]}, ("BLOCK_K",))


def test_same_numerics_names_the_changed_instruction():
    with pytest.raises(NumericsError, match="mma is .*BF16.* for batch 1 and"):
        same_numerics({1: [multiply(8)], 16: [multiply(16, torch.float16)]})


def test_same_numerics_names_other_kernels_and_contraction():
    with pytest.raises(NumericsError, match="batch 2 launches"):
        same_numerics({1: [multiply(8)], 2: [multiply(8), multiply(8)]})
    with pytest.raises(NumericsError, match="enable_fp_fusion is False for batch 1 and True for batch 2"):
        same_numerics({1: [multiply(8)], 2: [multiply(8, enable_fp_fusion=True)]})
