"""Every transition of the budget machine, by hand; random streams against the kernel are in test_sampling."""

import pytest

from headrace.engine.reasoning import BudgetMachine, reasoning_markers
from headrace.kernels.control import ControlIds, Phase

EOS, THINK, END, CALL, X, Y = 2, 12, 13, 14, 50, 51
CONTROL = ControlIds(eos=(EOS,), think=THINK, end_think=END, tool_call=CALL, closing=(END,))
LONG = ControlIds(eos=(EOS,), think=THINK, end_think=END, tool_call=CALL, closing=(X, Y, END))


def after(machine, *tokens):
    for token in tokens:
        machine.advance(token)
    return machine


def test_off_forces_nothing_and_stays_off():
    machine = after(BudgetMachine.start(CONTROL, thinking=False, budget=0), THINK, X, END, CALL, THINK)
    assert (machine.phase, machine.forced()) == (Phase.OFF, None)


def test_a_model_without_markers_is_off():
    assert BudgetMachine.start(ControlIds(eos=()), thinking=True, budget=3).phase is Phase.OFF


@pytest.mark.parametrize("budget", [0, 1, 2, 7])
def test_thinking_counts_down_and_closes(budget):
    machine = BudgetMachine.start(CONTROL, True, budget)
    for left in range(budget, 0, -1):
        assert (machine.phase, machine.remaining, machine.forced()) == (Phase.THINKING, left, None)
        machine.advance(X)
    assert machine.forced() == END
    assert after(machine, END).phase is Phase.ANSWERING
    assert machine.forced() is None


def test_no_limit_never_closes():
    machine = after(BudgetMachine.start(CONTROL, True, -1), *[X] * 1000)
    assert (machine.phase, machine.remaining, machine.forced()) == (Phase.THINKING, -1, None)


def test_the_closing_ids_come_in_order():
    machine = BudgetMachine.start(LONG, True, 0)
    seen = []
    while (forced := machine.forced()) is not None:
        seen.append(forced)
        machine.advance(forced)
    assert seen == [X, Y, END]
    assert machine.phase is Phase.ANSWERING


def test_an_id_that_was_not_the_forced_one_is_a_fault():
    with pytest.raises(ValueError, match="token 51 was decided where 50 is forced"):
        BudgetMachine.start(LONG, True, 0).advance(Y)


@pytest.mark.parametrize("end", [END, CALL])
def test_natural_ends(end):
    machine = after(BudgetMachine.start(CONTROL, True, 5), X, end)
    assert (machine.phase, machine.remaining) == (Phase.ANSWERING, 4)


def test_reentry_gets_what_is_left():
    machine = after(BudgetMachine.start(CONTROL, True, 3), X, END, X, THINK)
    assert (machine.phase, machine.remaining) == (Phase.THINKING, 2)
    machine = after(machine, X, X)
    assert machine.forced() == END
    assert after(machine, END, THINK).forced() == END  # nothing is left for a third block


def test_a_stray_think_inside_thinking_costs_budget_and_a_stray_end_changes_nothing():
    machine = after(BudgetMachine.start(CONTROL, True, 2), THINK)
    assert machine.remaining == 1
    machine = after(machine, END, END)
    assert machine.phase is Phase.ANSWERING


def test_markers_are_not_counted():
    assert reasoning_markers(CONTROL) == {EOS, THINK, END, CALL}
