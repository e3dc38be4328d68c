"""Whoever samples hears of each group once, as soon as all its completions ended."""

import jax
import pytest

from grpo_jax.config import SamplingConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _engine
from grpo_jax.rollout.encoding import unpad
from grpo_jax.rollout.generate import GroupSampler

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
# Some completions end early, the longest ones at the limit.
SAMPLING = SamplingConfig(stop_ids=tuple(range(0, 264, 7)))


class OneLoop:
    """A model without slots, which is sampled by the loop for all models."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        if name.endswith("_slots") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def __hash__(self):
        return hash(self._model)

    def __eq__(self, other):
        return self._model == other._model


@pytest.fixture
def sample(tiny_policy, meshes_of):
    def run(*sizes, model=None, count=5, **options):
        sampler = GroupSampler(
            model or tiny_policy.model,
            meshes_of(*(sizes or (1, 1, 1))),
            max_prompt_tokens=64,
        )
        sampler.update(tiny_policy.variables, version=0)
        return sampler.sample(
            PROMPTS[:count],
            numbers=range(count),
            key=jax.random.key(3),
            group_size=4,
            max_new_tokens=20,
            sampling=SAMPLING,
            **options,
        )

    return run


@pytest.mark.parametrize("loop", [False, True], ids=["engine", "loop"])
@pytest.mark.parametrize(
    ("sizes", "batch_size"), [((1, 1, 1), None), ((1, 1, 1), 4), ((3, 1, 1), 12)]
)
def test_every_group_is_told_once_with_its_tokens(
    sample, tiny_policy, loop, sizes, batch_size
):
    told = []
    model = OneLoop(tiny_policy.model) if loop else None
    sampled = sample(
        *sizes,
        model=model,
        batch_size=batch_size,
        ended=lambda number, ids: told.append((number, ids)),
    )
    assert sorted(number for number, _ in told) == list(range(5))
    groups = unpad(sampled.tokens, sampled.lengths)
    assert all(groups[number] == ids for number, ids in told)


def test_groups_that_have_ended_are_told_of_before_the_others(sample, monkeypatch):
    turns, told = [], {}
    turn = _engine.Engine.turn

    def counted(engine, wanted):
        turns.append(wanted)
        return turn(engine, wanted)

    monkeypatch.setattr(_engine.Engine, "turn", counted)
    sampled = sample(
        batch_size=4, ended=lambda number, _: told.update({number: len(turns)})
    )
    assert 1 < len(set(told.values()))
    # With slots for four completions, prompts come one after the other.
    assert min(told, key=told.__getitem__) < max(told, key=told.__getitem__)
    assert len(sampled.lengths) == 5


def test_processes_hear_of_their_own_groups(sample, on_processes):
    whole = sample()

    def act(_):
        told = {}
        sample(ended=told.__setitem__)
        return told, meshes.own_share(len(PROMPTS))

    for told, share in on_processes(act, 2):
        groups = unpad(whole.tokens[share], whole.lengths[share])
        assert told == dict(enumerate(groups))
