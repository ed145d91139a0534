"""What the comparison with one process says, and when it must not say that all is well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.comparison import EARLY, evenly, table, verdict

SINGLE = {step: 5.0 - 0.01 * step for step in range(100)}


def shifted(amount: float, first: int = 0) -> dict[int, float]:
    return {step: loss + (amount if step >= first else 0.0) for step, loss in SINGLE.items()}


def test_rounding_that_grows_late_is_explained() -> None:
    assert verdict(shifted(0.02, EARLY), SINGLE, 0).endswith("nothing else differs.")
    assert "0.00000 in the first 20 steps, 0.02000 in all 100" in verdict(shifted(0.02, EARLY), SINGLE, 0)


def test_a_difference_in_an_early_step_is_a_fault_and_is_called_one() -> None:
    assert "please report" in verdict(shifted(0.02, EARLY - 1), SINGLE, 0)


def test_with_dropped_items_no_equality_is_claimed() -> None:
    assert verdict(SINGLE, SINGLE, 3).endswith("3 work items were dropped, so the two did not compute the same.")


def test_a_process_that_took_no_step_proves_nothing() -> None:
    assert "nothing can be compared" in verdict(SINGLE, {}, 0)


def test_the_table_shows_only_what_both_have() -> None:
    assert table(SINGLE, {0: 5.0, 1: 5.0, 200: 1.0}).row_count == 2


@given(st.lists(st.integers(0, 1000), unique=True).map(sorted), st.integers(2, 12))
def test_chosen_steps_reach_from_the_first_to_the_last(steps: list[int], count: int) -> None:
    chosen = evenly(steps, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(len(steps), count)
    assert not steps or (chosen[0], chosen[-1]) == (steps[0], steps[-1])
