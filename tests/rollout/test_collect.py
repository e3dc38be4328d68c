"""A rollout: which prompts it takes, what it is rewarded for, what is drawn again."""

import numpy as np
import pytest

from grpo_jax.config import MeshConfig, RewardsConfig, SamplingConfig, TrainConfig
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.collect import Collector
from grpo_jax.rollout.dynamic_sampling import resample
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.rollout.scoring import score_rows
from grpo_jax.tasks import task_from_rows
from grpo_jax.tasks.order import rows_at

ROWS = [{"prompt": f"{i}" * (1 + i % 3), "number": i} for i in range(6)]


def make_config(**changes):
    values = {
        "model": "tiny",
        "prompts_per_step": 4,
        "group_size": 2,
        "max_new_tokens": 5,
        "seed": 3,
        "mesh": MeshConfig(fsdp=1),
        "sampling": SamplingConfig(stop_ids=tuple(range(0, 264, 3))),
    }
    return TrainConfig(**(values | changes))


@pytest.fixture
def make_collector(tiny_policy, meshes_of):
    def make(reward, *, rows=ROWS, **changes):
        task = task_from_rows(rows, reward)
        config = make_config(**changes)
        sampler = GroupSampler(
            tiny_policy.model,
            meshes_of(1, 1, 1),
            max_prompt_tokens=config.max_prompt_tokens,
        )
        sampler.update(tiny_policy.variables, version=0)
        return Collector(
            sampler,
            tiny_policy.model.config,
            tiny_policy.tokenizer,
            task,
            RewardRunner(task.rewards, RewardsConfig()),
            config,
        )

    return make


@pytest.fixture
def make_scripted(tiny_policy, fake_sampler):
    """A collector without a model: completions are the number of prompt and sample."""

    def make(reward, *, rows=ROWS, **changes):
        task = task_from_rows(rows, reward)
        return Collector(
            fake_sampler(lambda number, sample: f"{number}{sample}"),
            tiny_policy.model.config,
            tiny_policy.tokenizer,
            task,
            RewardRunner(task.rewards, RewardsConfig()),
            make_config(**changes),
        )

    return make


def by_number(completions, number, **_):
    """Groups of even numbers differ in reward, those of odd ones do not."""
    return [float(i % 2) if n % 2 == 0 else 1.0 for i, n in enumerate(number)]


def constant(completions, **_):
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def order():
    return rows_at(0, 24, size=6, seed=3)


def test_a_rollout_takes_the_rows_at_its_position(make_scripted, tiny_policy, order):
    collector = make_scripted(by_number)
    rollout = collector.sample(step=1, position=4)
    assert [row["number"] for row in rollout.rows] == order[4:8]
    for row, ids, length in zip(
        rollout.rows, rollout.prompts, rollout.prompt_lengths, strict=True
    ):
        assert tiny_policy.tokenizer.decode(ids[:length]) == row["prompt"]
    assert np.isnan(rollout.rewards).all() and rollout.keep.all()
    # Prompts are numbered by their position, whatever their row.
    assert rollout.completions == [[f"{n}0", f"{n}1"] for n in range(4, 8)]


def test_the_mask_ends_with_the_completion(make_scripted):
    rollout = make_scripted(by_number).sample(step=1, position=8)
    # Prompts 8 and 9 have completions of two digits, 10 and 11 of three.
    assert rollout.lengths.tolist() == [[2, 2], [2, 2], [3, 3], [3, 3]]
    assert rollout.mask[1, 0].tolist() == [True, True, False, False, False]
    assert rollout.mask[2, 1].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_shares_of_a_rollout_in_one_shape(
    make_scripted, on_processes, count
):
    whole = make_scripted(by_number).sample(step=1, position=0)

    def sample(_):
        return make_scripted(by_number).sample(step=1, position=0)

    parts = on_processes(sample, count)
    assert [row for part in parts for row in part.rows] == whole.rows
    assert sum((part.completions for part in parts), []) == whole.completions
    for name in ("prompts", "prompt_lengths", "tokens", "lengths", "mask"):
        joined = np.concatenate([vars(part)[name] for part in parts])
        np.testing.assert_array_equal(joined, vars(whole)[name])


def test_what_is_drawn_follows_from_seed_step_and_position(make_collector):
    collector = make_collector(by_number)

    def tokens(collector, **at):
        return collector.sample(**at).tokens.tolist()

    first = tokens(collector, step=1, position=0)
    assert tokens(collector, step=1, position=0) == first
    assert tokens(collector, step=2, position=0) != first
    # Six rows make one pass: position 24 has row `order[24]`, and draws of its own.
    one_row = make_collector(by_number, rows=ROWS[:1])
    assert tokens(one_row, step=1, position=0) != tokens(one_row, step=1, position=4)
    other_seed = make_collector(by_number, rows=ROWS[:1], seed=4)
    assert tokens(other_seed, step=1, position=0) != tokens(one_row, step=1, position=0)


def test_functions_are_given_columns_texts_and_ids_in_the_order_of_groups(
    make_scripted, tiny_policy
):
    seen = {}

    def reward(prompts, completions, completion_ids, number, trainer_state, **_):
        seen.update(
            prompts=prompts, completions=completions, ids=completion_ids, number=number
        )
        seen["step"] = trainer_state.global_step
        return [float(i) for i in range(len(prompts))]

    collector = make_scripted(reward)
    rollout = collector.sample(step=7, position=0)
    rollout = collector.reward(rollout, step=7)
    assert seen["step"] == 7
    assert seen["number"] == [row["number"] for row in rollout.rows for _ in range(2)]
    assert seen["prompts"] == [row["prompt"] for row in rollout.rows for _ in range(2)]
    assert seen["completions"] == sum(rollout.completions, [])
    np.testing.assert_array_equal(rollout.rewards, np.arange(8.0).reshape(4, 2))
    for n, g in np.ndindex(4, 2):
        own = rollout.tokens[n, g, : rollout.lengths[n, g]].tolist()
        assert seen["ids"][2 * n + g] == own
        assert tiny_policy.tokenizer.decode(own) == rollout.completions[n][g]


def test_groups_of_equal_rewards_are_replaced_from_further_rollouts(
    make_scripted, order
):
    collector = make_scripted(by_number)
    rollout, sampled = resample(collector, Agreement(), step=1, position=0, limit=4)
    even = [number for number in order if number % 2 == 0]
    assert [row["number"] for row in rollout.rows] == even[:4]
    # As many rollouts of four as it takes to meet four even numbers.
    needed = [n % 2 for n in order].index(0)
    while sum(n % 2 == 0 for n in order[:needed]) < 4:
        needed += 1
    assert len(sampled.rows) == 4 * -(-needed // 4)
    assert rollout.keep.all()


def test_replacing_is_bounded_and_left_overs_do_not_count(make_scripted):
    calls = []

    def reward(completions, **_):
        calls.append(1)
        return constant(completions)

    collector = make_scripted(reward)
    rollout, sampled = resample(collector, Agreement(), step=1, position=0, limit=2)
    assert len(sampled.rows) == 12 and len(calls) == 3
    assert len(rollout.rows) == 4
    assert not rollout.keep.any()


def test_a_rollout_that_needs_no_replacing_is_taken_as_it_is(make_scripted):
    def reward(completions, **_):
        return [float(i) for i in range(len(completions))]

    collector = make_scripted(reward)
    rollout, sampled = resample(collector, Agreement(), step=1, position=0, limit=2)
    assert len(sampled.rows) == 4
    plain = collector.sample(step=1, position=0)
    np.testing.assert_array_equal(rollout.tokens, plain.tokens)


def test_completions_are_cut_to_the_bucket_of_the_longest(make_collector):
    everything = SamplingConfig(stop_ids=tuple(range(264)))
    collector = make_collector(constant, sampling=everything, max_new_tokens=40)
    rollout = collector.sample(step=1, position=0)
    assert rollout.tokens.shape == (4, 2, 16) == rollout.logp.shape
    assert (rollout.lengths == 1).all() and rollout.finished.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"prompt": "abcd"}], "max_prompt_tokens": 3}, "row 0 has 4 tokens"),
        # A context of 128 holds no prompt of 30 tokens before 100 new ones.
        ({"rows": [{"prompt": "a" * 30}], "max_new_tokens": 100}, "more than the 28"),
        ({"max_new_tokens": 128}, "leaves no room for a prompt"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(
    make_collector, changes, message
):
    with pytest.raises(ValueError, match=message):
        make_collector(constant, **changes)


def test_columns_reach_rewards_without_the_prompt():
    def reward(prompts, completions, **columns):
        assert set(columns) == {"answer", "completion_ids", "trainer_state"} | {
            "log_extra",
            "log_metric",
        }
        return [
            float(a == c) for a, c in zip(columns["answer"], completions, strict=True)
        ]

    runner = RewardRunner([reward], RewardsConfig())
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    scores = score_rows(runner, rows, ["1", "x"], [[1], [2]], step=1)
    assert scores.total.tolist() == [1.0, 0.0]
