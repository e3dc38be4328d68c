"""Completions that are answered turn by turn, while others are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import SamplingConfig
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.rollout.turns import Answer
from grpo_jax.training.step import policy_logprobs

NEW, GROUP = 40, 3
SAMPLING = SamplingConfig(temperature=0.9, stop_ids=tuple(range(0, 264, 8)))
PROMPTS = [[5, 17, 200, 31, 8, 90], [3, 1, 4], [77], [20, 21, 22, 23, 24]]


class Scripted:
    """Gives `words(number, sample, turn)` after each turn, as soon as `beside` allows.

    Attributes:
      seen: all tokens of a completion, after each of its turns.
    """

    def __init__(self, words, *, beside=0):
        self.words, self.beside = words, beside
        self.seen, self.waiting, self.turn = {}, [], 0

    def ended(self, number, sample, ids):
        self.seen.setdefault((number, sample), []).append(list(ids))
        self.waiting.append((self.turn, number, sample))

    def answers(self, *, wait):
        self.turn += 1
        due = [a for a in self.waiting if wait or self.turn - a[0] > self.beside]
        self.waiting = [a for a in self.waiting if a not in due]
        return [Answer(n, g, self.answer(n, g)) for _, n, g in due]

    def answer(self, number, sample):
        ids = self.seen[number, sample]
        words = self.words(number, sample, len(ids))
        if words is None or len(ids[-1]) + len(words) >= NEW or ids[-1][-1] % 8:
            return None
        return words


def words(number, sample, turn):
    """Up to three answers, short and long; none for one group."""
    if number == 2 or turn > 3:
        return None
    return [(7 * number + sample + i) % 264 | 1 for i in range([3, 20, 1][turn - 1])]


@pytest.fixture(scope="module")
def sample(tiny_policy, meshes_of):
    def run(turns, *, slots=None, mesh=(1, 1, 1)):
        sampler = GroupSampler(
            tiny_policy.model, meshes_of(*mesh), max_prompt_tokens=16
        )
        sampler.update(tiny_policy.variables, version=0)
        return sampler.sample(
            PROMPTS,
            numbers=range(len(PROMPTS)),
            key=jax.random.key(3),
            group_size=GROUP,
            max_new_tokens=NEW,
            sampling=SAMPLING,
            batch_size=slots,
            turns=turns,
        )

    return run


@pytest.fixture(scope="module")
def played(sample):
    """What was drawn, and the turns that were asked."""
    turns = Scripted(words)
    return sample(turns), turns


def test_answers_stand_behind_their_turns_and_are_masked(played):
    drawn, turns = played
    answered = 0
    for n, g in np.ndindex(len(PROMPTS), GROUP):
        row, mask = drawn.tokens[n, g].tolist(), drawn.mask[n, g]
        expected = np.zeros(len(row), bool)
        start = 0
        for turn, ids in enumerate(turns.seen[n, g], 1):
            assert row[: len(ids)] == ids
            expected[start : len(ids)] = True
            start = len(ids)
            given = words(n, g, turn)
            if given is not None and turn < len(turns.seen[n, g]):
                assert row[start : start + len(given)] == given
                start += len(given)
                answered += 1
        assert mask.tolist() == expected.tolist()
        assert drawn.lengths[n, g] == len(turns.seen[n, g][-1])
        assert not drawn.logp[n, g][~expected].any()
    assert answered > 8


def test_log_probs_over_turns_equal_those_of_the_learner(played, tiny_policy):
    drawn, _ = played
    width = max(map(len, PROMPTS))
    scored = policy_logprobs(
        tiny_policy.model,
        tiny_policy.variables,
        jnp.array([row + [0] * (width - len(row)) for row in PROMPTS]),
        jnp.array(list(map(len, PROMPTS))),
        jnp.asarray(drawn.tokens),
        temperature=SAMPLING.temperature,
    )
    mask = np.asarray(drawn.mask)
    np.testing.assert_allclose(
        np.asarray(scored.logp)[mask], drawn.logp[mask], atol=1e-4
    )


@pytest.mark.parametrize(
    ("slots", "beside", "mesh"), [(None, 3, (1, 1, 1)), (6, 1, (2, 1, 1))]
)
def test_tokens_depend_neither_on_slots_nor_on_when_answers_come(
    played, sample, slots, beside, mesh
):
    plain, _ = played
    other = sample(Scripted(words, beside=beside), slots=slots, mesh=mesh)
    np.testing.assert_array_equal(other.tokens, plain.tokens)
    np.testing.assert_array_equal(other.mask, plain.mask)
    np.testing.assert_allclose(other.logp, plain.logp, atol=1e-5)


def test_without_answers_it_is_the_plain_rollout(sample):
    plain, played = sample(None), sample(Scripted(lambda *_: None))
    np.testing.assert_array_equal(played.tokens, plain.tokens)
    np.testing.assert_array_equal(played.mask, plain.mask)
