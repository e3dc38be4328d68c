"""What a run remembers of itself, and what its summary makes of that."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.training.progress import Progress

numbers = st.none() | st.floats(allow_nan=False)


@given(
    step=st.integers(0, 9),
    seconds=st.floats(0, 9),
    accuracy=numbers,
    unknown=st.dictionaries(st.just("of another version"), numbers),
)
def test_what_is_saved_is_read_again_and_the_unknown_is_left_out(
    step, seconds, accuracy, unknown
):
    progress = Progress(step=step, seconds=seconds, accuracy=accuracy)
    saved = json.loads(json.dumps(dataclasses.asdict(progress) | unknown))
    assert Progress.read(saved) == progress


def test_the_evaluation_before_any_step_and_the_newest_are_kept():
    progress = Progress().evaluated({"eval/accuracy": 0.25})
    for step in (5, 10):
        progress = dataclasses.replace(progress, step=step)
        progress = progress.evaluated({"eval/accuracy": step / 20})
    told = progress.summary(finished=True)
    assert (told["accuracy_before"], told["accuracy_after"]) == (0.25, 0.5)
    assert told["eval_reward_before"] is None is told["eval_reward_after"]
    assert (told["steps"], progress.measured_at) == (10, 10)
    assert progress.summary(finished=False)["accuracy_after"] is None
    assert progress.summary(finished=False)["accuracy_before"] == 0.25
