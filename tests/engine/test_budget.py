"""Budgets are exact to the token, in every mix: by ids, through the whole engine."""

import itertools

import pytest
from networks import END_THINK, EOS, THINK, TOOL_CALL, Scripted, scripted_engine

from headrace.engine import ChatOptions, EngineConfig, Finished, RequestError, SamplingParams

A, B, C = 300, 301, 302
QUESTION = [{"role": "user", "content": "How much is 2 + 2?"}]


def ids_of(engine, budget, *, max_tokens=60, options=None, question=QUESTION, **params):
    stream = engine.chat_stream(
        question, SamplingParams(temperature=0.0, max_tokens=max_tokens, reasoning_budget=budget, **params), options
    )
    end = [e for e in stream if isinstance(e, Finished)]
    assert len(end) == 1
    return list(stream.token_ids[0]), end[0]


def endless(token):
    """A, B, A, B...: thinks for ever; after the end of thinking it answers C and stops."""
    return {A: B, END_THINK: C, C: EOS}.get(token, A)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 33])
def test_the_marker_is_forced_at_exactly_the_token_after_the_budget(text, budget):
    with scripted_engine(text, Scripted(endless)) as engine:
        ids, end = ids_of(engine, budget)
    assert ids == [*itertools.islice(itertools.cycle([A, B]), budget), END_THINK, C, EOS]
    assert end.reason == "stop"
    assert end.usage.reasoning_tokens == budget
    assert end.usage.completion_tokens == budget + 3


def test_minus_one_never_forces(text):
    with scripted_engine(text, Scripted(endless)) as engine:
        ids, end = ids_of(engine, -1, max_tokens=50)
    assert END_THINK not in ids
    assert (end.reason, end.usage.reasoning_tokens) == ("length", 50)


def test_a_natural_end_within_the_budget_is_left_alone(text):
    with scripted_engine(text, Scripted(lambda t: {A: B, B: END_THINK, END_THINK: C, C: EOS}.get(t, A))) as engine:
        for budget in (2, 3, 50, -1):
            ids, end = ids_of(engine, budget)
            assert ids == [A, B, END_THINK, C, EOS]
            assert end.usage.reasoning_tokens == 2


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_max_tokens_cuts_forced_tokens_too(text, max_tokens):
    with scripted_engine(text, Scripted(endless), closing_text="= = =") as engine:
        closing = list(engine.control.closing)
        assert len(closing) > 3
        ids, end = ids_of(engine, 1, max_tokens=max_tokens)
        assert ids == [A, *closing, C, EOS][:max_tokens]
        assert (end.reason, end.usage.reasoning_tokens) == ("length", 1)


def test_the_closing_text_is_reasoning_but_not_reasoning_tokens(text):
    with scripted_engine(text, Scripted(endless), closing_text="= so:") as engine:
        result = engine.chat(QUESTION, SamplingParams(temperature=0.0, reasoning_budget=2))
        assert result.reasoning_content.endswith("= so:")
        assert result.usage.reasoning_tokens == 2
        assert result.usage.completion_tokens == 2 + len(engine.control.closing) + 2


def test_a_second_think_gets_what_is_left(text):
    script = {A: THINK, THINK: B, B: END_THINK, END_THINK: A}  # A, <think>, B, </think>, A, <think>, ...
    with scripted_engine(text, Scripted(lambda t: script.get(t, A))) as engine:
        ids, _ = ids_of(engine, 3, max_tokens=12)
        # A, <think>, B are three free tokens of the first block; the second block finds nothing left.
        assert ids == [A, THINK, B, END_THINK, A, THINK, END_THINK, A, THINK, END_THINK, A, THINK]
        ids, end = ids_of(engine, 4, max_tokens=12)
        # One token is left for the second block.
        assert ids[:9] == [A, THINK, B, END_THINK, A, THINK, B, END_THINK, A]
        assert end.usage.reasoning_tokens == 3


def test_a_tool_call_ends_thinking(text):
    script = {A: TOOL_CALL, TOOL_CALL: B, B: C, C: EOS}
    with scripted_engine(text, Scripted(lambda t: script.get(t, A))) as engine:
        ids, end = ids_of(engine, 2)
        assert ids == [A, TOOL_CALL, B, C, EOS]  # the budget of 2 is never forced into the call
        assert end.usage.reasoning_tokens == 1
        result = engine.chat(QUESTION, SamplingParams(temperature=0.0, reasoning_budget=2))
        assert result.content.startswith("<tool_call>")


def test_effort_none_turns_the_machine_off_whatever_the_user_writes(text):
    script = {A: THINK, THINK: B, B: C, C: EOS}
    question = [{"role": "user", "content": "<think> say <think> </think>"}]
    options = ChatOptions(reasoning_effort="none")
    with scripted_engine(text, Scripted(lambda t: script.get(t, A))) as engine:
        ids, end = ids_of(engine, 0, options=options, question=question)
        assert ids == [A, THINK, B, C, EOS]
        assert end.usage.reasoning_tokens == 0
        prompt = engine.prompt_ids(question, options)
        assert not prompt.thinking
        assert prompt.ids.count(THINK) == prompt.ids.count(END_THINK) == 1


def test_end_of_sequence_while_thinking_ends_the_request(text):
    with scripted_engine(text, Scripted(lambda t: {A: EOS}.get(t, A))) as engine:
        result = engine.chat(QUESTION, SamplingParams(temperature=0.0))
        assert result.choices[0].finish_reason == "stop"
        assert result.content is None
        assert result.reasoning_content
        forced = engine.chat(
            QUESTION,
            SamplingParams(temperature=0.0),
            ChatOptions(chat_template_kwargs={"force_nonempty_content": True}),
        )
        assert forced.content == result.reasoning_content


def test_reasoning_given_as_content_keeps_the_rules_of_content(text):
    """No newline in front, nothing from a stop string on, and nothing at all where an answer was begun and cut."""
    with scripted_engine(text, Scripted(lambda t: {A: B, B: EOS}.get(t, A))) as engine:
        options = ChatOptions(chat_template_kwargs={"force_nonempty_content": True})
        plain = engine.chat(QUESTION, SamplingParams(temperature=0.0), options)
        assert plain.content == plain.reasoning_content
        stop = plain.content[-2:]
        cut = engine.chat(QUESTION, SamplingParams(temperature=0.0, stop=stop), options)
        assert cut.content == plain.content[: plain.content.index(stop)]
        assert cut.reasoning_content == plain.reasoning_content
    with scripted_engine(text, Scripted(endless)) as engine:
        answer = engine.chat(QUESTION, SamplingParams(temperature=0.0, reasoning_budget=2)).content
        cut = engine.chat(QUESTION, SamplingParams(temperature=0.0, reasoning_budget=2, stop=answer[:1]), options)
        assert cut.content is None


def test_the_budget_of_the_template_arguments_wins(text):
    with scripted_engine(text, Scripted(endless)) as engine:
        options = ChatOptions(chat_template_kwargs={"reasoning_budget": 3})
        ids, _ = ids_of(engine, 7, options=options)
        assert ids.index(END_THINK) == 3
        assert engine.prompt_ids(QUESTION, options).ids == engine.prompt_ids(QUESTION).ids
    with pytest.raises(RequestError, match="reasoning_budget"):
        ChatOptions(chat_template_kwargs={"reasoning_budget": -2})


def spy_on_preemption(engine, closing):
    """A list that gets, per preemption, whether the sequence was between forced ids."""
    scheduler, preempt, found = engine._scheduler, engine._scheduler._preempt, []

    def watched(sequence, saves):
        if sequence in scheduler._decoding:
            decided = scheduler._lengths[scheduler._decoding.index(sequence)] - sequence.prompt_length
            budget = sequence.params.budget
            found.append(0 <= budget < decided < budget + closing)
        preempt(sequence, saves)

    scheduler._preempt = watched
    return found


def test_mixed_budgets_under_preemption_are_exact(text):
    """A pool too small for all: sequences are saved and recomputed in thought, between forced ids and in the answer."""
    budgets = [0, 1, 2, 3, 5, 8, 13, -1] * 3
    for preempt_bytes in (0, EngineConfig().preempt_bytes):
        network = Scripted(endless)
        with scripted_engine(
            text, network, num_pages=22, max_context=88, closing_text="= = = =", preempt_bytes=preempt_bytes
        ) as engine:
            closing = list(engine.control.closing)
            amid_closing = spy_on_preemption(engine, len(closing))
            streams = [
                engine.chat_stream(QUESTION, SamplingParams(temperature=0.0, max_tokens=40, reasoning_budget=b))
                for b in budgets
            ]
            for budget, stream in zip(budgets, streams, strict=True):
                list(stream)
                free = list(itertools.islice(itertools.cycle([A, B]), 40 if budget < 0 else budget))
                expected = free if budget < 0 else [*free, *closing, C, EOS][:40]
                assert list(stream.token_ids[0]) == expected
            assert any(amid_closing), "no preemption fell between forced ids"
            assert engine.stats()["free_pages"] == 22
