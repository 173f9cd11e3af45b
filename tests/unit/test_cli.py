"""The command line: what it prints, what it refuses, and that it starts fast."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, answer, delta, finished
from typer.testing import CliRunner

from headrace.engine import ContextExceeded, QueueFull, Usage
from headrace.engine.cli import app, common, main

SUPER = {
    "model_type": "nemotron_h", "hidden_size": 4096, "num_hidden_layers": 88, "vocab_size": 131072,
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*" + 4 * "EMEMEMEMEM*" + "EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 512,
    "num_experts_per_tok": 22, "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024, "routed_scaling_factor": 5.0, "max_position_embeddings": 262144,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """What the commands get instead of a loaded model."""
    engine = ScriptedEngine()
    monkeypatch.setattr(common, "load_engine", lambda model, config=None: engine)
    return engine


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("headrace: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    return captured.out


def test_generate_shows_reasoning_apart(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "2 + 2?") == "[reasoning]\nTwo and two.\n[answer]\nIt is 4.\n"
    assert engine.calls[0].prompt == [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize(("script", "argv", "text"), [
    (answer(), ["--answer-only"], "It is 4.\n"), (answer(reasoning=()), [], "It is 4.\n"),
    (answer(content=(), reason="length"), [],
     "[reasoning]\nTwo and two.\n(cut: max_tokens or the context is used up)\n"),
    (answer(content=("\x1b[31mred\x07\x9b", "\ttab\n")), ["--answer-only"], "␛[31mred␇\ufffd\ttab\n\n"),
    ([finished()], [], ""),
])  # fmt: skip
def test_generate_output(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], script: Any, argv: list[str], text: str
) -> None:
    engine.play(script)
    assert run(capsys, "generate", "x", *argv) == text


def test_every_sampling_option_reaches_the_engine(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.play([finished(index=0), finished(index=1)])
    argv = (
        "--temperature 0.5 --top-p 0.25 --max-tokens 9 --seed 18446744073709551615 --stop a --stop b --n 2 --ignore-eos"
        " --budget -1 --effort low --logprobs --top-logprobs 3 --json --system Be"
    )
    run(capsys, "generate", "x", *argv.split())
    call = engine.calls[0]
    expected = {
        "temperature": 0.5, "top_p": 0.25, "max_tokens": 9, "seed": 2**64 - 1, "stop": ("a", "b"), "n": 2,
        "ignore_eos": True, "reasoning_budget": -1, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    assert {name: getattr(call.params, name) for name in expected} == expected
    assert call.options is not None
    assert call.options.reasoning_effort == "low"
    assert call.prompt[0] == {"role": "system", "content": "Be"}


def test_generate_raw_and_from_stdin(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("<think> once\n"))
    run(capsys, "generate", "-", "--raw")
    assert engine.calls[0].prompt == "<think> once\n"
    assert engine.calls[0].options is None


def test_generate_json(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.play([
        delta("reasoning", "a", logprobs=True), delta("content", "é", logprobs=True),
        finished(usage=Usage(9, 3, 1, 0), token_ids=(2,)),
    ])  # fmt: skip
    document = json.loads(run(capsys, "generate", "x", "--json", "--top-logprobs", "1"))
    top = [{"token_id": 233, "logprob": -0.233}, {"token_id": 234, "logprob": -9999.0}]
    [choice] = document["choices"]
    assert choice.pop("content_logprobs") == [{"token_id": 233, "token": "é", "logprob": -0.233, "top_logprobs": top}]
    assert choice.pop("reasoning_logprobs")[0]["token"] == "a"
    assert document == {
        "model": "scripted/model",
        "choices": [
            {"index": 0, "reasoning_content": "a", "content": "é", "token_ids": [97, 233, 2], "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "reasoning_tokens": 1, "cached_tokens": 0},
    }


def test_several_answers_come_one_after_the_other(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.play([
        delta("content", "b", index=1), delta("content", "a"), delta("content", "a"), finished(), finished(index=1),
    ])  # fmt: skip
    assert run(capsys, "generate", "x", "--n", "2") == "[choice 0]\naa\n[choice 1]\nb\n"


def test_a_failing_answer_is_status_1(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.play([delta("content", "It"), finished("error", error="the logits are not finite")])
    assert main(["generate", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "It\n"
    assert captured.err == "headrace: the logits are not finite\n"


@pytest.mark.parametrize(("argv", "words"), [
    (["generate"], "PROMPT"), (["generate", "x", "--fast"], "--fast"), (["nothing"], "nothing"),
    (["generate", "x", "--temperature", "3"], "temperature must be a number from 0 to 2"),
    (["generate", "x", "--temperature", "hot"], "--temperature"), (["generate", "x", "--n", "9"], "n must be"),
    (["generate", "x", "--seed", "-1"], "seed must be"), (["generate", "x", "--effort", "huge"], "huge"),
    (["generate", "x", "--stop", ""], "stop"), (["generate", "x", "--logprobs"], "--json"),
    (["generate", "x", "--raw", "--system", "s"], "--system"), (["chat", "--budget", "-2"], "reasoning_budget must be"),
    (["serve", "--port", "70000"], "65535"), (["serve", "--host", "0.0.0.0"], "without API keys"),
    (["serve", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    (["serve", "--api-key-file", "/no/such/file"], "/no/such/file"), (["serve", "--profile", "vllm"], "vllm"),
    (["serve", "--max-sequences", "0"], "max_sequences"),
])  # fmt: skip
def test_a_user_error_is_one_line(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert words in fails(capsys, *argv)


@pytest.mark.parametrize("error", [ContextExceeded(9000, 4096), QueueFull(5, 5)])
def test_what_the_engine_refuses_is_one_line(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    engine.play(error)
    assert str(error) in fails(capsys, "generate", "x")


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "serve"])
def test_a_model_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "nothing"
    argv = {"generate": ["x", "--model"], "chat": ["--model"], "inspect": [], "serve": ["--port", "0", "--model"]}
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert "nothing" in fails(capsys, command, *argv[command], str(where))


def test_inspect_counts_the_published_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SUPER))
    document = json.loads(run(capsys, "inspect", str(tmp_path), "--json"))
    assert document["parameters"] == 123_611_033_088  # the released files' headers add up to this
    assert document["active_parameters"] == 12_233_366_528
    assert document["kv_bytes_per_token"] == 8 * 2 * 2 * 128 * 2
    states = 40 * 128 * 64 * 128 * 4
    assert document["state_bytes_per_sequence"] == states + 40 * 10240 * 4 * 2
    text = run(capsys, "inspect", str(tmp_path))
    assert "123,611,033,088" in text
    assert "22 of 512 per token" in text


def test_inspect_names_a_wrong_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SUPER | {"vocab_size": -3}))
    assert "vocab_size" in fails(capsys, "inspect", str(tmp_path))


def test_inspect_reads_damaged_files_as_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SUPER))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "model.safetensors" in fails(capsys, "inspect", str(tmp_path))


@pytest.mark.parametrize("command", ["", "chat", "generate", "serve", "inspect"])
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from headrace.engine.cli import main; main(['--help'])\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'starlette', 'uvicorn', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    program = f"{sys.executable} {Path(__file__).with_name('scripted_cli.py')} generate x | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
