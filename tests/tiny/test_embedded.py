"""The embedded model through the whole engine: it reasons, its card tells what was measured, and the bars are met."""

import json

import pytest

from benchmarks.tiny import evaluate, problems
from benchmarks.tiny.card import conversation, count_parameters
from headrace.engine import ChatOptions, Engine, EngineConfig, SamplingParams
from headrace.engine.model.load import load_model

MODEL = evaluate.MODEL


@pytest.fixture(scope="module")
def engine():
    with Engine(config=EngineConfig(max_sequences=32)) as engine:
        yield engine


@pytest.fixture(scope="module")
def measured():
    return json.loads((MODEL / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("category", "least"), [("add", 30), ("sub", 30), ("mul3x2", 29), ("mul3x3", 28), ("sum", 29), ("word", 28)]
)
def test_it_reasons_on_problems_it_never_saw(engine, category, least):
    """32 held-out problems, other ones than the card's; ``least`` leaves room for the accuracy that the card states."""
    outcomes = evaluate.ask_all(engine, problems.held_out(category, 32, seed=7))
    assert sum(o.right for o in outcomes) >= least
    assert all(o.reasoning_tokens > 0 for o in outcomes)


def test_a_quarter_of_the_trace_is_not_enough(engine, measured):
    usual = measured["scores"]["mul3x2"]["high"]["median_trace"]
    outcomes = evaluate.ask_all(engine, problems.held_out("mul3x2", 32, seed=7), budget=round(usual / 4))
    assert sum(o.right for o in outcomes) <= 20
    assert all(o.reasoning_tokens <= round(usual / 4) for o in outcomes)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("hello", "arithmetic"),
        ("What is 123456789 + 987654321?", "digits"),
        ("What is the capital of France?", "arithmetic"),
        ("84 / 7", "division"),
    ],
)
def test_it_stays_in_character(engine, question, words):
    answer = engine.chat([{"role": "user", "content": question}], SamplingParams(temperature=0.0, max_tokens=300))
    assert words in answer.content
    assert answer.choices[0].finish_reason == "stop"


def test_a_second_question_and_a_negative_result(engine):
    messages = [{"role": "user", "content": "What is 12 + 34?"}]
    params = SamplingParams(temperature=0.0, max_tokens=300)
    first = engine.chat(messages, params)
    assert first.content == "46"
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "5 - 892"}]
    assert engine.chat(messages, params).content == "-887"


def test_effort_none_answers_directly_and_low_thinks_less(engine):
    question = [{"role": "user", "content": "What is 4821 + 377?"}]
    params = SamplingParams(temperature=0.0, max_tokens=300)
    high, low, none = (engine.chat(question, params, ChatOptions(effort)) for effort in ("high", "low", "none"))
    assert none.reasoning_content is None
    assert none.usage.reasoning_tokens == 0
    assert 0 < low.usage.reasoning_tokens < high.usage.reasoning_tokens


def test_drafts_of_the_mtp_head_are_mostly_the_models_own(engine):
    asked = problems.held_out("add", 6, seed=7)
    answered = list(zip(asked, evaluate.ask_all(engine, asked), strict=True))
    assert evaluate.mtp_agreement(engine, load_model(MODEL), answered) > 0.7


BARS = [
    ("add", "high", 0.99), ("sub", "high", 0.99), ("mul3x2", "high", 0.98), ("mul3x3", "high", 0.90),
    ("word", "high", 0.95), ("sum", "high", 0.95),
]  # fmt: skip


@pytest.mark.parametrize(("category", "effort", "bar"), BARS)
def test_the_measured_accuracies_meet_the_bars(measured, category, effort, bar):
    assert measured["problems"] >= 200
    assert measured["scores"][category][effort]["accuracy"] >= bar


def test_low_effort_traces_are_short_and_drafts_agree(measured):
    for category, scores in measured["scores"].items():
        if category != "chat":
            assert scores["low"]["median_trace"] <= 0.6 * scores["high"]["median_trace"], category
    assert measured["mtp_agreement"] >= 0.8


@pytest.mark.parametrize("category", ["mul3x2", "mul3x3"])
def test_reasoning_matters(measured, category):
    usual = measured["scores"][category]["high"]
    quarter = [a for b, a in measured["curves"][category] if b == round(0.25 * usual["median_trace"])]
    assert quarter
    assert usual["accuracy"] - quarter[0] >= 0.30


def test_the_figures_are_those_of_these_weights(measured):
    assert measured["weights_sha256"] == evaluate.digest(MODEL / "model.safetensors")


def test_the_card_says_what_was_measured(measured):
    card = (MODEL / "README.md").read_text()
    for scores in measured["scores"].values():
        assert f"| {scores['high']['accuracy']:.1%} |" in card
    for turns in measured["talk"]:
        assert conversation(turns) in card
    assert f"{count_parameters(MODEL / 'model.safetensors'):,} parameters" in card
    assert (MODEL / "budget.png").stat().st_size > 10_000
