"""A repeated step whose environments answer otherwise is reported."""

from grpo_jax.training._repeats import Repeats


def test_a_repeated_step_is_compared_with_the_time_before(tmp_path):
    said = []
    first = Repeats(tmp_path, report=said.append, enabled=True)
    for step, digest in enumerate(["a", "b", "c"], start=1):
        first.check(step, digest)
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write('{"step": 4, "sh')  # killed while it wrote
    again = Repeats(tmp_path, report=said.append, enabled=True)
    again.check(2, "b")
    assert not said
    again.check(3, "x")
    assert len(said) == 1 and "step 3" in said[0]
    again.check(2, "x")
    assert len(said) == 1


def test_runs_without_environments_write_nothing(tmp_path):
    Repeats(tmp_path, report=print, enabled=True).check(1, "")
    Repeats(tmp_path, report=print, enabled=False).check(1, "a")
    assert not list(tmp_path.iterdir())
