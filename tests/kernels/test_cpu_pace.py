"""How many threads take part in a step when others use the machine: decided by the steps' times alone."""

import itertools

from flatout import _cpu


def play(pace, steps, seconds, tokens=1):
    """Teams of `steps` steps, each of which takes seconds(team)."""
    teams = []
    for _ in range(steps):
        teams.append(pace.team(tokens))
        pace.took(seconds(teams[-1]))
    return teams


def quiet(team):
    return {2: 0.002, 1: 0.004}[team]


def contended(team):
    """Two threads wait for each other's turn, one has a core of its own."""
    return {2: 0.009, 1: 0.004}[team]


def test_a_quiet_machine_always_takes_all_threads():
    assert set(play(_cpu.Pace(2), 1000, quiet)) == {2}


def test_a_growing_context_is_no_reason_to_take_fewer():
    times = itertools.count()
    assert set(play(_cpu.Pace(2), 2000, lambda team: 0.002 + 2e-6 * next(times))) == {2}


def test_beside_a_busy_process_one_thread_fewer_is_taken_until_it_ends():
    pace = _cpu.Pace(2)
    play(pace, 100, quiet)
    assert sum(team == 1 for team in play(pace, 100, contended)) > 80
    assert sum(team == 1 for team in play(pace, 2000, contended)) > 1950
    after = play(pace, 300, quiet)
    assert set(after[270:]) == {2}


def test_where_fewer_threads_are_no_faster_all_stay():
    pace = _cpu.Pace(2)
    play(pace, 100, quiet)
    slow = play(pace, 400, lambda team: 3 * quiet(team))
    assert sum(team == 1 for team in slow) < 60


def test_one_slow_step_changes_nothing():
    pace = _cpu.Pace(2)
    play(pace, 50, quiet)
    assert play(pace, 1, lambda team: 0.0035) + play(pace, 200, quiet) == [2] * 201


def test_what_was_learnt_outlives_a_change_of_the_batch():
    pace = _cpu.Pace(2)
    play(pace, 100, quiet)
    play(pace, 300, contended)
    later = play(pace, 100, lambda team: 1.3 * contended(team), tokens=2)
    assert sum(team == 1 for team in later) > 80


def test_one_thread_and_many():
    assert set(play(_cpu.Pace(1), 50, lambda team: 0.001)) == {1}
    pace = _cpu.Pace(8)
    play(pace, 50, lambda team: 0.001)
    assert set(play(pace, 100, lambda team: 0.009 if team == 8 else 0.0012)) == {7, 8}
