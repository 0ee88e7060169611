"""The table of ratios, and whose calls are timed. Nothing here asserts a speed."""

from engram_megatron.benchmarks.measure import Comparison, duration, interleaved, table


def test_ratio_says_how_many_times_as_fast_and_meets_its_target_from_there() -> None:
    fast = Comparison("gather", 0.5, "index_select", 1.0, target=2.0)
    assert fast.ratio == 2.0
    assert fast.verdict == "ok"
    assert Comparison("gather", 0.5, "index_select", 0.99, target=2.0).verdict == "short"
    assert Comparison("gather", 0.5, "index_select", 0.99).verdict == "-"


def test_table_is_aligned_and_holds_every_comparison() -> None:
    text = table([Comparison("a", 1e-3, "b", 2e-3, 1.5), Comparison("a longer name", 3.0, "c", 1e-7)])
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["a", "1", "ms", "b", "2", "ms", "2.00", "1.50", "ok"]
    assert len({line.index(word) for line, word in zip(lines, ("compared", "b ", "c "), strict=True)}) == 1


def test_every_candidate_runs_once_a_round_and_once_to_warm_up() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in ("x", "y", "z")}
    medians = interleaved(candidates, repeats=4, prepare={"y": lambda: calls.append("prepare y")})
    assert {name: calls.count(name) for name in candidates} == {"x": 5, "y": 5, "z": 5}
    assert all(calls[i - 1] == "prepare y" for i, name in enumerate(calls) if name == "y")
    assert set(medians) == {"x", "y", "z"}
    assert all(seconds >= 0 for seconds in medians.values())


def test_durations_have_a_readable_unit() -> None:
    assert [duration(s) for s in (2.5, 0.25, 1.234e-3, 5e-6, 3e-8)] == ["2.5 s", "250 ms", "1.23 ms", "5 us", "30 ns"]
