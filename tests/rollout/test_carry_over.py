"""Groups that continue in the next step: each is taken once, in time, and as drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import RolloutConfig, SamplingConfig
from grpo_jax.rollout import _engine as engines
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout import generate as generating
from grpo_jax.rollout._carry_over import CarryOver
from grpo_jax.rollout._drawn import Drawn
from grpo_jax.rollout._engine import Ended
from grpo_jax.rollout.generate import generate

NEW, GROUP, STEP = 8, 3, 4
SAMPLED = SamplingConfig(temperature=0.8, stop_ids=tuple(range(0, 264, 3)))


def prompt_of(position):
    rng = np.random.default_rng(position)
    return rng.integers(0, 256, rng.integers(1, 7)).tolist()


@pytest.fixture
def stream_of(tiny_policy, meshes_of):
    """A stream of a policy, and how it moves to another version."""

    def make(mesh=(1, 1, 1), policy=tiny_policy, **rollout):
        sampler = generating.GroupSampler(
            policy.model, meshes_of(*mesh), max_prompt_tokens=6
        )
        stream = sampler.stream(
            prompt_of,
            jax.random.key(7),
            longest=6,
            prompts_per_step=STEP,
            group_size=GROUP,
            max_new_tokens=NEW,
            sampling=SAMPLED,
            rollout=RolloutConfig(carry_over=True, **rollout),
        )

        def at(version):
            sampler.update(policy.variables, version=version)
            return stream.sample()

        return stream, at

    return make


def assert_same(one, other):
    assert one.positions == other.positions
    jax.tree.map(np.testing.assert_array_equal, one[1:], other[1:])


@pytest.fixture(scope="module")
def drawn_at_once(tiny_policy):
    return at_once(tiny_policy)


def at_once(policy):
    """The first groups of the stream, as `generate` draws them in one call."""
    prompts = [prompt_of(position) for position in range(8 * STEP)]
    padded = np.zeros((len(prompts), 6), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return generate(
        policy.model,
        policy.params,
        padded,
        np.array([len(prompt) for prompt in prompts]),
        jax.random.key(7),
        group_size=GROUP,
        max_new_tokens=NEW,
        sampling=SAMPLED,
        prompt_ids=np.arange(len(prompts)),
    )


@pytest.mark.parametrize("slots", [None, 1, 5])
def test_a_policy_that_stays_draws_what_it_draws_step_by_step(
    slots, stream_of, drawn_at_once
):
    _, at = stream_of(slots=slots)
    assert_drawn(at, drawn_at_once)


def test_states_are_carried_over_and_restored(stream_of, conv_policy):
    stream, at = stream_of(slots=5, policy=conv_policy)
    assert_drawn(at, at_once(conv_policy))
    _, again = restored(stream_of, stream, 4, policy=conv_policy)
    assert_same(at(4), again(4))


def assert_drawn(at, drawn):
    """Four steps of a stream are groups that were drawn at once, each of them once."""
    seen = []
    for version in range(4):
        taken = at(version)
        seen += taken.positions
        own = taken.completions
        kept = own.tokens.shape[-1]
        alone = jax.tree.map(lambda x, at=taken.positions: x[np.array(at)], drawn)
        np.testing.assert_array_equal(own.tokens, alone.tokens[..., :kept])
        np.testing.assert_array_equal(own.lengths, alone.lengths)
        np.testing.assert_array_equal(own.finished, alone.finished)
        np.testing.assert_allclose(own.logp, alone.logp[..., :kept], atol=1e-5)
    assert len(set(seen)) == len(seen) == 4 * STEP


def test_a_token_keeps_the_version_that_drew_it(stream_of):
    _, at = stream_of(slots=3, max_staleness=3)
    stale = []
    for version in range(6):
        taken = at(version)
        mask = np.asarray(taken.completions.mask)
        ages = [row[own] for row, own in zip(taken.staleness, mask, strict=True)]
        # Later tokens are never older than earlier ones of the same completion.
        for row, own in itertools.product(range(STEP), range(GROUP)):
            of_one = taken.staleness[row, own][mask[row, own]]
            assert np.all(np.diff(of_one) <= 0)
        assert all(age.max() <= 3 for age in ages)
        assert not taken.staleness[~mask].any()
        fresh = ~taken.began_before
        assert not taken.staleness[fresh].any()
        stale.append(np.concatenate(ages).max())
    assert max(stale) >= 1


def restored(stream_of, stream, version, **options):
    # As a checkpoint does: the stream goes on and gives its own arrays away.
    state = jax.tree.map(jnp.copy, stream.state(version=version))
    flat = {f"{i}/{name}": x for i, own in state.items() for name, x in own.items()}
    other, at = stream_of(slots=5, **options)
    again = other.restore({i: state[i] for i in other.like(flat)})
    return again, at


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_stream_continues_with_the_same_bits(steps, stream_of):
    stream, at = stream_of(slots=5)
    for version in range(steps):
        at(version)
    again, other_at = restored(stream_of, stream, steps)
    assert again == 0
    for version in range(steps, steps + 3):
        assert_same(at(version), other_at(version))


def test_a_stream_with_a_stacked_ring_is_restored_as_well(stream_of, monkeypatch):
    _, at = stream_of(slots=5)
    plain = [at(version).positions for version in range(2)]
    monkeypatch.setattr(programs, "ring_apart", lambda *_: False)
    stream, at = stream_of(slots=5)
    assert [at(version).positions for version in range(2)] == plain
    assert stream.state(version=2)["carried_cache"]["keys_0"].ndim == 5
    _, other_at = restored(stream_of, stream, 2)
    for version in range(2, 4):
        assert_same(at(version), other_at(version))


def test_a_step_that_was_not_made_is_repeated(stream_of):
    # A run that is asked to stop after it sampled saves the state before the update.
    stream, at = stream_of(slots=5)
    at(0)
    sampled = at(1)
    assert_same(at(1), sampled)
    _, other_at = restored(stream_of, stream, 1)
    assert_same(other_at(1), sampled)
    assert_same(other_at(2), at(2))


def test_other_devices_draw_anew_what_had_begun(stream_of):
    stream, at = stream_of(slots=5)
    taken = at(0).positions
    state = stream.state(version=1)
    flat = {f"{i}/{name}": x for i, own in state.items() for name, x in own.items()}
    other, other_at = stream_of(mesh=(2, 1, 1), slots=5)
    assert set(other.like(flat)) == {"carried"}
    again = other.restore({"carried": state["carried"]})
    assert again > 0
    seen = [*taken, *other_at(1).positions, *other_at(2).positions]
    assert sorted(seen) == list(range(3 * STEP))


def test_a_stream_keeps_its_slots_and_waits_for_no_more_than_a_step(
    stream_of, monkeypatch
):
    # A step of few groups, of which no more may begin: an engine that is not a stream
    # would draw all of them to their ends, in fewer and fewer slots.
    monkeypatch.setattr(engines, "_SHORT", 0)
    stream, at = stream_of(slots=24, max_staleness=1)
    under_way = []
    for version in range(4):
        at(version)
        assert stream._engine._plan.slots == 24
        under_way.append(int(stream._engine._plan.alive.sum()))
    assert max(under_way) > 0


def test_a_model_without_slots_is_refused(meshes_of, tiny_policy):
    class Plain:
        config = tiny_policy.model.config

    sampler = generating.GroupSampler(Plain(), meshes_of(1, 1, 1), max_prompt_tokens=6)
    with pytest.raises(ValueError, match="Plain, which has no `decode_slots`"):
        sampler.stream(
            prompt_of,
            jax.random.key(0),
            longest=6,
            prompts_per_step=1,
            group_size=GROUP,
            max_new_tokens=NEW,
            sampling=SAMPLED,
            rollout=RolloutConfig(carry_over=True),
        )


class Clockwork:
    """An engine of groups that take a given number of turns, some at a time."""

    def __init__(self, turns, slots):
        self.drawn = Drawn(1, 1)
        self._turns, self._slots = turns, slots
        self._waiting, self._left, self._version = [], {}, -1

    def update(self, variables, *, version):
        del variables
        self._version = version

    def release(self):
        pass

    def add(self, prompts, numbers, key):
        groups = self.drawn.add(prompts, key, numbers)
        self._waiting += zip(groups, numbers, strict=True)
        return groups

    def turn(self, wanted):
        while self._waiting and len(self._left) < self._slots:
            group, number = self._waiting.pop(0)
            self.drawn.begun[group] = self._version
            self._left[group] = self._turns[number % len(self._turns)]
        if not wanted:
            return None
        assert self._left, "waits, and nothing is drawn"
        self._left = {group: left - 1 for group, left in self._left.items()}
        ended = [group for group, left in self._left.items() if left == 0]
        for group in ended:
            del self._left[group]
            self.drawn.ended[group] = True
            self.drawn.lengths[group] = 1
            self.drawn.versions[group] = self._version
        return [Ended(group, 0) for group in ended]

    def completions(self, groups):
        return self.drawn.completions(groups, stop_ids=(), pad_id=0)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    slots=st.integers(1, 12),
    wanted=st.integers(1, 4),
    bound=st.integers(1, 5),
)
def test_every_group_is_taken_once_and_in_time(turns, slots, wanted, bound):
    version = 0
    engine = Clockwork(turns, slots)
    stream = CarryOver(
        engine,
        lambda: (None, version),
        lambda position: [position],
        jax.random.key(0),
        prompts_per_step=wanted,
        max_staleness=bound,
    )
    seen = []
    for version in range(12):
        taken = stream.sample()
        assert len(taken.positions) == wanted
        groups = [
            group
            for group, number in stream._numbers.items()
            if number in taken.positions
        ]
        assert (version - engine.drawn.begun[groups] <= bound).all()
        seen += taken.positions
    assert len(set(seen)) == len(seen)
    # None is left behind for ever.
    assert max(seen) - len(seen) < wanted * (bound + 1)
