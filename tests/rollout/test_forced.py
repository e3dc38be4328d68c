"""A completion that is given tokens equals one that drew them, and the learner's."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from grpo_jax.config import SamplingConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.lora import init_lora
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _engine as engines
from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout import _programs as programs
from grpo_jax.rollout._engine import Ended, Engine
from grpo_jax.rollout._settings import group_settings
from grpo_jax.rollout._slots import NONE, SlotPlan
from grpo_jax.training.step import policy_logprobs

NEW = 60
GROUP = 3
# Few stop tokens, so that most completions are long and some are short.
SAMPLING = SamplingConfig(temperature=0.8, stop_ids=tuple(range(0, 264, 40)))
PROMPTS = [[5, 17, 200, 31, 8, 90], [3, 1, 4], [77], [20, 21, 22, 23, 24]]
# None, some that the loop takes, and some that are run at once.
LENGTHS = [0, 1, 7, 16, 17, 30, 0, 40, 3, 25, 0, 59]


def make_engine(policy, *, slots, mesh=None, variables=None, new=NEW):
    engine = Engine(
        policy.model,
        group_settings(
            policy.model.config, SAMPLING, group_size=GROUP, max_new_tokens=new
        ),
        mesh=mesh,
        slots=slots,
        prompt_tokens=6,
    )
    engine.update(policy.variables if variables is None else variables)
    return engine


def draw_all(engine, *, between=lambda turn, ended: None):
    """Turns until all have ended; `between` may feed after each one."""
    missing, turn = len(engine.drawn.ended), 0
    while (ended := engine.turn(missing)) is not None:
        missing -= len(ended)
        missing += between(turn, ended) or 0
        turn += 1
        assert turn < 500
    assert engine.drawn.ended.all()
    return engine.drawn


def draw(policy, begun, *, slots, between=lambda turn, ended: None, **options):
    engine = make_engine(policy, slots=slots, **options)
    engine.add(PROMPTS, range(len(PROMPTS)), jax.random.key(4), begun)
    return draw_all(engine, between=between)


def scored(policy, drawn, variables=None):
    """Log-probs of the learner, which reads each sequence as a whole."""
    width = max(map(len, PROMPTS))
    prompts = np.array([row + [0] * (width - len(row)) for row in PROMPTS])
    learner = jax.jit(
        functools.partial(
            policy_logprobs, policy.model, temperature=SAMPLING.temperature
        )
    )
    tokens = drawn.tokens.reshape(len(PROMPTS), GROUP, -1)
    lengths = np.array(list(map(len, PROMPTS)))
    variables = policy.variables if variables is None else variables
    logp = np.asarray(learner(variables, prompts, lengths, tokens).logp)
    return logp.reshape(drawn.logp.shape)


def assert_scored(policy, drawn, variables=None):
    mask = np.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    expected = scored(policy, drawn, variables)
    np.testing.assert_allclose(drawn.logp[mask], expected[mask], atol=1e-4, rtol=1e-5)
    assert not drawn.sampled[~mask].any()


def assert_ends(drawn):
    """A drawn stop token is the last one, or an answer follows it."""
    for tokens, sampled, length in zip(
        drawn.tokens, drawn.sampled, drawn.lengths, strict=True
    ):
        stops = np.isin(tokens[:length], SAMPLING.stop_ids) & sampled[:length]
        assert not (stops[:-1] & sampled[1:length]).any() and sampled[length - 1]
        assert stops[-1] or length == NEW


def beginnings(drawn, lengths=LENGTHS):
    """The first tokens of completions, fewer than all of them."""
    own = [
        tokens[: min(count, length - 1)].tolist()
        for tokens, count, length in zip(
            drawn.tokens, lengths, drawn.lengths, strict=True
        )
    ]
    return [own[n : n + GROUP] for n in range(0, len(own), GROUP)]


def others(lengths=LENGTHS):
    """Tokens that no policy drew, stop tokens among them."""
    rng = np.random.default_rng(2)
    own = [rng.integers(0, 256, count).tolist() for count in lengths]
    for tokens in own:
        tokens[1::5] = [SAMPLING.stop_ids[1]] * len(tokens[1::5])
    return [own[n : n + GROUP] for n in range(0, len(own), GROUP)]


@pytest.fixture
def small_steps(monkeypatch):
    """A ring that grows from 4 columns, short visits, and calls of few tokens."""

    def columns(limit, longest):
        return next(min(2**k, limit) for k in range(2, 9) if 2**k >= longest)

    monkeypatch.setattr(engines, "cache_columns", columns)
    monkeypatch.setattr(engines, "MOST_TURNS", 20)


@pytest.fixture(scope="module")
def plain(tiny_policy):
    return draw(tiny_policy, None, slots=12)


def assert_same(drawn, plain, begun):
    np.testing.assert_array_equal(drawn.lengths, plain.lengths)
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    np.testing.assert_allclose(drawn.logp, plain.logp, atol=1e-4, rtol=1e-5)
    given = np.array([len(own) for group in begun for own in group])
    at = np.arange(plain.tokens.shape[1])
    expected = (at >= given[:, None]) & (at < plain.lengths[:, None])
    np.testing.assert_array_equal(drawn.sampled, expected)


def test_completions_are_long_and_short(plain):
    assert plain.lengths.max() > 40 and plain.lengths.min() < 20
    assert plain.sampled.sum() == plain.lengths.sum()


@pytest.mark.parametrize("slots", [1, 2, 5, 12])
def test_a_beginning_that_was_drawn_goes_on_as_it_did(slots, tiny_policy, plain):
    begun = beginnings(plain)
    assert_same(draw(tiny_policy, begun, slots=slots), plain, begun)


def test_a_ring_that_grows_and_wraps_changes_nothing(tiny_policy, plain, small_steps):
    begun = beginnings(plain)
    assert_same(draw(tiny_policy, begun, slots=5), plain, begun)


@pytest.fixture
def stacked_ring(monkeypatch):
    """The ring has all layers in one array, as on a TPU."""
    monkeypatch.setattr(programs, "ring_apart", lambda *_: False)


def test_a_ring_that_is_stacked_changes_nothing(
    tiny_policy, plain, small_steps, stacked_ring, monkeypatch
):
    rings, advance = [], loops.advance

    def noted(*args, **options):
        rings.append(args[4][0])
        assert isinstance(args[3][0], tuple)  # of the prompts
        return advance(*args, **options)

    monkeypatch.setattr(loops, "advance", noted)
    begun = beginnings(plain)
    assert_same(draw(tiny_policy, begun, slots=5), plain, begun)
    assert {ring.ndim for ring in rings} == {5}


@pytest.mark.parametrize("slots", [2, 12])
def test_other_beginnings_have_the_log_probs_of_the_learner(slots, tiny_policy):
    drawn = draw(tiny_policy, others(), slots=slots)
    assert_scored(tiny_policy, drawn)
    assert_ends(drawn)
    given = np.array(LENGTHS)
    assert (drawn.sampled.argmax(axis=1) == given).all()
    assert (drawn.sampled.sum(axis=1) == drawn.lengths - given).all()
    for number, own in enumerate(sum(others(), [])):
        assert drawn.tokens[number, : len(own)].tolist() == own


def test_nothing_is_forced_where_nothing_is_given(tiny_policy, plain, monkeypatch):
    seen, advance = [], loops.advance

    def noted(*args, **options):
        start = args[5]
        queue = None if start.queue is None else start.queue.forced
        seen.append((start.held.forced, queue))
        return advance(*args, **options)

    monkeypatch.setattr(loops, "advance", noted)
    monkeypatch.delattr(engines, "extend")
    begun = [[[]] * GROUP] * len(PROMPTS)
    assert_same(draw(tiny_policy, begun, slots=5), plain, begun)
    assert set(seen) == {(None, None)}


def test_fed_in_the_middle_and_the_others_go_on(tiny_policy, plain, small_steps):
    """To those in slots and to those that wait, few tokens and many."""
    engine, fed = make_engine(tiny_policy, slots=4), {}
    engine.add(PROMPTS, range(4), jax.random.key(4))

    def between(turn, ended):
        if turn:
            return
        going = np.flatnonzero(~engine.drawn.ended)
        begun = engine.drawn.lengths[going] > 0
        given = zip((*going[begun], *going[~begun]), (3, 20, 1, 2, 18), strict=False)
        for number, count in given:
            known = int(engine.drawn.known[number])
            tokens = others([count, 0, 0])[0][0]
            engine.feed(Ended(*divmod(int(number), GROUP)), tokens)
            fed[int(number)] = known, tokens

    drawn = draw_all(engine, between=between)
    places = [known for known, _ in fed.values()]
    assert len(fed) == 5 and min(places) == 0 and max(places) > 0
    assert_scored(tiny_policy, drawn)
    assert_ends(drawn)
    for number, length in enumerate(drawn.lengths):
        known, tokens = fed.get(number, (plain.lengths[number], []))
        own = slice(known, known + len(tokens))
        assert drawn.tokens[number, own].tolist() == tokens
        expected = np.ones(length, bool)
        expected[own] = False
        np.testing.assert_array_equal(drawn.sampled[number, :length], expected)
        np.testing.assert_array_equal(
            drawn.tokens[number, :known], plain.tokens[number, :known]
        )


def converse(policy, slots):
    """Whoever ends a turn is answered, shortly or at length, and goes on.

    Each turn has weights of a version of its own.
    """
    engine, answers = make_engine(policy, slots=slots), np.zeros(12, int)
    engine.add(PROMPTS, range(4), jax.random.key(4))
    drawn, before = engine.drawn, [np.zeros(12, int), np.zeros((12, NEW), int)]

    def between(turn, ended):
        # What was there already keeps its version.
        own = np.arange(NEW) < before[0][:, None]
        np.testing.assert_array_equal(drawn.versions[own], before[1][own])
        before[:] = drawn.lengths.copy(), drawn.versions.copy()
        engine.update(policy.variables, version=turn + 1)
        again = 0
        for one in ended:
            number = one.group * GROUP + one.sample
            tokens = others([[2, 20][number % 2], 0, 0])[0][0]
            if drawn.lengths[number] + len(tokens) < NEW:
                engine.feed(one, tokens)
                answers[number] += len(tokens)
                again += 1
        return again

    draw_all(engine, between=between)
    assert (answers > 0).sum() > 6 and answers.max() >= 20
    assert_ends(drawn)
    np.testing.assert_array_equal(drawn.lengths - drawn.sampled.sum(axis=1), answers)
    return drawn


@pytest.fixture(scope="module")
def conversation(tiny_policy):
    return converse(tiny_policy, 12)


def test_a_conversation_has_the_log_probs_of_the_learner(tiny_policy, conversation):
    assert_scored(tiny_policy, conversation)


@pytest.mark.parametrize("slots", [1, 5])
def test_a_conversation_does_not_depend_on_slots(
    slots, tiny_policy, conversation, small_steps
):
    drawn = converse(tiny_policy, slots)
    np.testing.assert_array_equal(drawn.tokens, conversation.tokens)
    np.testing.assert_array_equal(drawn.sampled, conversation.sampled)
    np.testing.assert_allclose(drawn.logp, conversation.logp, atol=1e-4, rtol=1e-5)


def test_windows_and_adapters(tiny_policy, small_steps):
    config = tiny_policy.model.config
    config = dataclasses.replace(config, layer_window=(5, None), lora_scale=2.0)
    model = Decoder(config)
    adapters = init_lora(model, jax.random.key(1), rank=2, targets=("q", "v", "up"))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    variables = {"params": tiny_policy.params, "lora": adapters}
    policy = dataclasses.replace(tiny_policy, model=model)
    drawn = draw(policy, others(), slots=5, variables=variables)
    assert_scored(policy, drawn, variables)


def draw_on(policy, begun, mesh):
    """What slots on a mesh draw, with parameters that are split over it."""
    axes, shapes = param_axes(policy.model), abstract_params(policy.model)
    shardings = meshes.parameter_shardings(axes, shapes, mesh)
    variables = {"params": jax.device_put(policy.params, shardings)}
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        return draw(policy, begun, slots=4, mesh=mesh, variables=variables)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2)], ids=["data", "fsdp"])
def test_a_mesh_goes_on_as_one_device(sizes, tiny_policy, plain, meshes_of):
    begun = beginnings(plain)
    assert_same(draw_on(tiny_policy, begun, meshes_of(*sizes)), plain, begun)


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        ([[[]] * GROUP], r"3 beginnings for each of 4 prompts, got \[3\]"),
        ([[[]] * 2] * 4, r"got \[2, 2, 2, 2\]"),
        ([[[], [], [1] * NEW]] * 4, "60 given tokens behind 0 leave no room"),
    ],
)
def test_wrong_beginnings_are_refused(begun, message, tiny_policy):
    engine = make_engine(tiny_policy, slots=4)
    with pytest.raises(ValueError, match=message):
        engine.add(PROMPTS, range(4), jax.random.key(4), begun)
    # Nothing of them is left.
    assert not any(engine.drawn.prompts) and engine.turn(12) is None


def test_an_answer_without_room_for_a_token_behind_it_is_refused(tiny_policy):
    engine = make_engine(tiny_policy, slots=4)
    engine.add(PROMPTS, range(4), jax.random.key(4), others())
    with pytest.raises(ValueError, match="20 given tokens behind 40 leave no room"):
        engine.feed(Ended(2, 1), [1] * 20)
    engine.feed(Ended(2, 1), [1] * 19)
    assert engine.drawn.known[7] == 59


def test_one_that_goes_on_reads_its_prompt():
    plan = SlotPlan(1, group_size=2, slots=3)
    plan.add([0])
    assert plan.admit(0) == [[(0, 0)]]
    # Both have ended: the row is free, but still has their prompt.
    plan.record(np.full((1, 3), NONE), plan.index, [0])
    plan.add([1])
    plan.again(1)
    assert plan.admit(0) == [[(1, 1)]]
    assert plan.held.tolist() == [[1, 2, 3]]
    assert plan.rows_of(0, plan.held[0]).tolist() == [0, 1, 1]
    # Another group has the row: the prompt is computed once more, for both.
    plan.record(np.full((1, 3), NONE), plan.index, [0])
    plan.add([2])
    assert plan.admit(0) == [[(0, 2)]]
    plan.record(np.full((1, 3), NONE), plan.index, [0])
    plan.again(0)
    plan.again(1)
    assert plan.admit(0) == [[(0, 0)]]
    assert plan.rows_of(0, plan.held[0]).tolist()[:2] == [0, 0]


def test_one_that_goes_on_and_waits_is_not_lost_where_the_plan_is_saved():
    plan = SlotPlan(1, group_size=2, slots=2)
    plan.add([0, 1])
    plan.admit(0)
    plan.record(np.array([[0, NONE]]), plan.index, [0])
    plan.again(1)
    other = SlotPlan(1, group_size=2, slots=2)
    other.restore(plan.state(), going=[0, 1])
    assert other.admit(0) == [[]]
    assert other.held.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", ["hybrid_policy", "conv_policy"])
def test_states_follow_their_slots(kind, request):
    """Slots that are refilled, a ring that grows, fewer slots, tokens run at once."""
    policy = request.getfixturevalue(kind)
    drawn = draw(policy, others(), slots=5)
    assert_ends(drawn)
    assert_scored(policy, drawn)


def test_states_on_a_mesh_are_those_of_one_device(conv_policy, meshes_of):
    begun = others()
    alone = draw(conv_policy, begun, slots=4)
    assert_same(draw_on(conv_policy, begun, meshes_of(1, 2, 2)), alone, begun)


def test_states_go_on_behind_answers(conv_policy, small_steps):
    assert_scored(conv_policy, converse(conv_policy, 5))
