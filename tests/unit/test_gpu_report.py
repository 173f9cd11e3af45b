"""The GPU report on a CPU: it must not call a broken kernel right, nor lose what it knows."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare, engine_runs, gpu_report, rows, show, timing
from benchmarks.cases import CASES, backends
from benchmarks.ops import EIGHTH, FULL, Sizes
from headrace.kernels import BACKENDS, select

CPU = torch.device("cpu")
REFERENCE = select("reference")
SMALL = replace(
    EIGHTH.super, hidden=64, experts=64, top_k=5, latent=32, expert_inner=48, shared_inner=80, heads=4, head_dim=32,
    mamba_heads=4, mamba_head_dim=16, groups=2, state=16, chunk=16, vocab=500, page=16,
)  # fmt: skip
TINY = Sizes("tiny", SMALL, replace(SMALL, latent=64), 64, 192, decode=(1, 5), prompt=(40,))
BY_NAME = {(case.group, case.name): case for case in CASES}


def test_a_nan_or_another_id_is_not_a_small_error():
    good = [torch.ones(3)]
    assert compare.error(good, good) == 0
    assert compare.error([good[0] * 1.5], good) == pytest.approx(0.5)
    assert math.isnan(compare.error([good[0], good[0] * torch.nan], good * 2))
    assert math.isnan(compare.error([good[0] * torch.nan, good[0] * 2], good * 2))
    ids = torch.tensor([1000, 2000])
    assert compare.error([ids], [ids]) == 0
    assert compare.error([ids + torch.tensor([0, 1])], [ids]) == math.inf
    with pytest.raises(ValueError, match="shape"):
        compare.error([torch.ones(1)], good)
    with pytest.raises(ValueError, match="1 results, expected 2"):
        compare.error(good, good * 2)


def test_an_error_is_found_wherever_it_is(monkeypatch):
    monkeypatch.setattr(compare, "PIECE", 7)
    expected = torch.linspace(-1, 1, 60).view(3, 20)
    for place in ((0, 0), (1, 7), (2, 19)):
        actual = expected.clone()
        actual[place] += 0.25
        assert compare.error([actual], [expected]) == pytest.approx(
            0.25 / max(0.5872, abs(float(expected[place]))), rel=1e-3
        )
        actual[place] = torch.nan
        assert math.isnan(compare.error([actual], [expected]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.name}")
def test_a_right_backend_is_right(case):
    """And the inputs of a decode row do not follow the number of rows, else its bits could not be compared."""
    for one in (case, case.in_fp32):
        if one is not None:
            found = compare.verdict(REFERENCE, REFERENCE, one, CPU, TINY)
            assert (found.word, found.error, found.failure) == ("ok", 0.0, "")
            assert found.same_rows is (True if case.group == "decode" else None)


def one_element(op):
    def broken(*args, **kwargs):
        y = op(*args, **kwargs)
        y.flatten()[-1] += 0.1 * y.square().mean().sqrt()
        return y

    return broken


def last_row_not_written(op):
    def broken(*args, **kwargs):
        y = op(*args, **kwargs)
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out

    return broken


def rounded_result(op):
    return lambda *args, **kwargs: op(*args, **kwargs).bfloat16().float()


def follows_the_batch(op):
    return lambda x, *args, **kwargs: op(x, *args, **kwargs) * (1 + 2e-7 * (len(x) == 1))


def one_expert_too_few(op):
    def broken(x, packed, routes, **kwargs):
        return op(x, packed, replace(routes, weights=routes.weights * (torch.arange(5) < 4)), **kwargs)

    return broken


def no_residual(op):
    return lambda x, packed, routes, residual=None: op(x, packed, routes)


def ties_to_the_highest(op):
    def broken(logits, bias, routing):
        routes = op(logits.flip(1), bias.flip(0), routing)
        return replace(routes, experts=logits.shape[1] - 1 - routes.experts)

    return broken


def state_not_advanced(op):
    return lambda projected, conv, ssm, *args: op(projected, conv, ssm.clone(), *args)


def one_token_too_few(op):
    """Writes the new token and does not look at it."""

    def broken(q, k, v, pages, table, slots, positions, scale, rows=1):
        op(q, k, v, pages, table, slots, positions, scale, rows)
        before = positions - 1
        at = table[slots, before // 16].long() * 16 + before % 16
        keys, values = (memory.view(-1, *memory.shape[2:])[at].float() for memory in (pages.keys, pages.values))
        return op(q, keys * pages.k_scale, values * pages.v_scale, pages, table, slots, before, scale)

    return broken


def page_not_written(op):
    return lambda last, length, slots, prompt, table, writes: op(last, length, slots, prompt, table.clone(), writes)


def another_token(op):
    def broken(*args, **kwargs):
        out = op(*args, **kwargs)
        return replace(out, tokens=out.tokens ^ 1)

    return broken


def counter_stands_still(op):
    def broken(logits, slots, state, *args, **kwargs):
        return op(logits, slots, replace(state, length=state.length.clone()), *args, **kwargs)

    return broken


def raises(op):
    def broken(*args, **kwargs):
        raise RuntimeError("out of\nresources")

    return broken


PLANTED = [
    ("in_proj", "linear", one_element),
    ("lm_head", "linear", last_row_not_written),
    ("rms_norm", "rms_norm", rounded_result),
    ("o_proj", "linear", follows_the_batch),
    ("experts", "experts", one_expert_too_few),
    ("nano_experts", "experts", no_residual),
    ("route", "route", ties_to_the_highest),
    ("mamba_update", "mamba_update", state_not_advanced),
    ("mamba_verify", "mamba_update", last_row_not_written),
    ("decode_attention", "decode_attention", one_token_too_few),
    ("attention_fp8", "decode_attention", one_token_too_few),
    ("step_inputs", "step_inputs", page_not_written),
    ("sample", "sample", another_token),
    ("sample_greedy", "sample", counter_stands_still),
    ("embed", "embed", raises),
]


@pytest.mark.parametrize(("name", "op", "plant"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_error_is_found(name, op, plant):
    kernels = replace(REFERENCE, **{op: plant(getattr(REFERENCE, op))})
    found = compare.verdict(kernels, REFERENCE, BY_NAME["decode", name], CPU, TINY)
    assert found.word == ("FAILED" if plant is raises else "WRONG")
    if plant is raises:
        assert found.failure == "RuntimeError: out of resources"
    elif plant is last_row_not_written:
        assert math.isnan(found.error)
    elif plant is follows_the_batch:
        assert (found.error < found.limit, found.same_rows) == (True, False)
    else:
        assert found.error > found.limit


def test_fp32_hides_no_rounding():
    """Operands rounded to bf16 are right where the weights are bf16, and wrong where nothing may be rounded."""

    def linear(x, packed, *, norm=None, relu2=False, residual=None):
        return REFERENCE.linear(x.bfloat16().float(), packed, norm=norm, relu2=relu2, residual=residual)

    kernels = replace(REFERENCE, linear=linear)
    case = BY_NAME["decode", "o_proj"]
    words = [found.word for found in compare.compare(kernels, REFERENCE, [case], CPU, TINY)]
    assert words == ["ok", "WRONG"]


def test_the_router_is_asked_for_no_close_call():
    """Two experts score the same or further apart than any rounding, or a right backend could pick another."""
    for shape in (FULL.super, FULL.nano, EIGHTH.super):
        assert shape.top_k < shape.experts
    logits = torch.arange(-7, 7, 1 / 32, dtype=torch.float64)
    choices = torch.cat([torch.sigmoid(logits), torch.sigmoid(logits) + 1 / 8]).sort().values.diff()
    assert choices[choices > 0].min() > 8e-6


@pytest.mark.parametrize("rows", [1, 5])
def test_bytes_and_flops_are_counted(rows):
    def work(name, group="decode"):
        return BY_NAME[group, name].build(REFERENCE, CPU, TINY, rows)

    head = work("lm_head")
    assert head.minimum_bytes == 2 * 500 * 64 + 4 * rows * (64 + 500)
    assert head.flops == 2 * rows * 500 * 64
    lengths = [64 - (1 + 37 * i) % 8 for i in range(rows)]  # with the new token
    attention, fp8 = work("decode_attention"), work("attention_fp8")
    assert attention.minimum_bytes == sum(lengths) * 2 * 2 * 32 * 2 + 4 * rows * (2 * 4 + 2 * 2) * 32
    assert attention.minimum_bytes - fp8.minimum_bytes == sum(lengths) * 2 * 2 * 32
    assert attention.flops == 4 * sum(lengths) * 4 * 32
    if rows == 1:
        assert work("experts").minimum_bytes == 5 * 2 * 48 * 32 * 2 + 2 * 4 * 32 + 5 * 12
    assert work("experts").flops == rows * 5 * 4 * 48 * 32
    assert work("step_inputs").flops == work("sample").flops == 0


def test_backends_that_work_here():
    assert "reference" in backends(CPU)
    assert set(backends(CPU)) <= set(BACKENDS)
    assert "triton" not in backends(CPU), "it needs a GPU, or the interpreter"


@pytest.fixture
def limits(monkeypatch):
    """What the machine can do is not what these tests are about."""
    known = [timing.Limit("cpu", threads, 2e9, "reading", 5e9, "GEMM") for threads in {1, torch.get_num_threads()}]
    monkeypatch.setattr(rows, "measure", lambda device: known)


def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> tuple[int, str, Path]:
    """The report over some ops at tiny sizes, with short answers."""
    monkeypatch.setattr(gpu_report, "CASES", [BY_NAME["decode", name] for name in names])
    monkeypatch.setattr(gpu_report, "EIGHTH", TINY)
    monkeypatch.setattr(gpu_report, "backends", lambda device: ["reference"])
    monkeypatch.setattr(engine_runs, "BATCHES", (1, 4))
    app = gpu_report.typer.Typer()
    app.command()(gpu_report.main)
    file = tmp_path / "report.md"
    result = CliRunner().invoke(app, ["--device", "cpu", "--out", str(file)])
    return result.exit_code, file.read_text(), file.with_suffix(".jsonl")


def test_a_trial_run(tmp_path, monkeypatch, limits):
    status, text, file = report(tmp_path, monkeypatch, ("route", "o_proj"))
    assert status == 0
    assert "| decode | route | - | 0.0e+00 | 0 | 9.5e-05 | same | ok |" in text
    assert "| decode | o_proj | bfloat16 | 0.0e+00 | 0 | 1.6e-02 | same | ok |" in text
    assert text.count("| decode | o_proj |") == 2 + 2, "two dtypes compared, two numbers of rows timed"
    assert text.count("| 1 of 1 |") == text.count("| 3 of 3 |") == 2, "two models"
    assert "| 4 | linear | 11 |" in text, "projections of two Mamba, two MoE, an attention layer, and the head"
    found = show.read(file)
    assert [row["name"] for row in found][:2] == ["decode[reference-route-1]", "decode[reference-route-5]"]
    assert show.share(found[-1]) == pytest.approx(
        max(found[-1]["config"]["minimum_bytes"] / 2e9, found[-1]["config"]["flops"] / 5e9) / found[-1]["median_s"]
    )


def test_wrong_and_failing_kernels_show(tmp_path, monkeypatch, limits):
    """The report says so, goes on, and its exit status is 1."""
    planted = replace(REFERENCE, linear=one_element(REFERENCE.linear), embed=raises(REFERENCE.embed))
    kernels = iter([planted])
    monkeypatch.setattr(gpu_report, "select", lambda name: next(kernels, REFERENCE))
    status, text, _ = report(tmp_path, monkeypatch, ("embed", "o_proj", "rms_norm"))
    assert status == 1
    assert "| decode | embed | bfloat16 | RuntimeError: out of resources | 5 | 9.5e-05 | - | FAILED |" in text
    [line] = [line for line in text.splitlines() if line.startswith("| decode | o_proj | bfloat16 |")]
    assert line.endswith("| WRONG |")
    assert "| decode | rms_norm | - | 0.0e+00 | 0 | 9.5e-05 | same | ok |" in text
    assert "| 4 | sample | 1 |" in text, "the engine ran all the same"


def test_an_engine_whose_tokens_follow_the_batch_is_wrong(tmp_path, monkeypatch, limits):
    together = engine_runs.Load.together

    def broken(load, requests):
        answers = together(load, requests)
        return answers if len(requests) < 4 else [answers[0], answers[1][:-1] + (0,), *answers[2:]]

    monkeypatch.setattr(engine_runs.Load, "together", broken)
    status, text, _ = report(tmp_path, monkeypatch, ("route",))
    assert status == 1
    assert "| 2 of 3 WRONG |" in text
    assert "| 1 of 1 |" in text


def test_an_engine_that_does_not_start_is_told(tmp_path, monkeypatch, limits):
    def broken(shape, config, times):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(engine_runs, "slice_of_super", broken)
    status, text, _ = report(tmp_path, monkeypatch, ("route",))
    assert status == 1
    assert "FAILED: RuntimeError: CUDA out of memory" in text
    assert "| 3 of 3 |" in text


def test_no_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = gpu_report.typer.Typer()
    app.command()(gpu_report.main)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


def test_uninitialised_memory_is_no_answer():
    with compare.uninitialised_is_nan():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_slice_has_the_published_widths():
    config = engine_runs.slice_config(FULL.super)
    assert (config.hidden_size, config.vocab_size, config.pattern) == (4096, 131072, "MEM*E")
    assert config.mamba.projection_size == 18560
    assert (config.moe.num_experts, config.moe.top_k, config.moe.latent_size) == (512, 22, 1024)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (32, 2)
