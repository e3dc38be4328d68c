"""The sampler equals a slow loop over whole passes, and the learner's log-probs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grpo_jax.config import SamplingConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout import _engine as engines
from grpo_jax.rollout import _loop as loops
from grpo_jax.rollout import generate as generating
from grpo_jax.rollout.draw import sample_token
from grpo_jax.rollout.generate import generate
from grpo_jax.training.step import policy_logprobs

NEW = 8
GROUP = 3
# A third of the vocabulary stops, so that completions have all lengths.
STOPS = tuple(range(0, 264, 3))
SAMPLED = SamplingConfig(temperature=0.8, stop_ids=STOPS)
GREEDY = SamplingConfig(temperature=0.0, stop_ids=tuple(range(0, 264, 5)))


def prompts_and_lengths(count=4, width=6):
    rng = np.random.default_rng(5)
    prompts = rng.integers(0, 256, (count, width)).astype(np.int32)
    lengths = np.array([6, 3, 1, 5])[np.arange(count) % 4].astype(np.int32)
    return jnp.asarray(prompts), jnp.asarray(lengths)


def sample(policy, prompts, lengths, *, sampling=SAMPLED, key=0, **options):
    options = {"group_size": GROUP, "max_new_tokens": NEW} | options
    return generate(
        policy.model,
        options.pop("params", policy.params),
        prompts,
        lengths,
        jax.random.key(key),
        sampling=sampling,
        **options,
    )


@pytest.fixture(scope="module")
def sampled(tiny_policy):
    return sample(tiny_policy, *prompts_and_lengths())


@pytest.fixture(scope="module")
def greedy(tiny_policy):
    return sample(tiny_policy, *prompts_and_lengths(), sampling=GREEDY)


@pytest.fixture(scope="module")
def logits_at(tiny_policy):
    """Logits after the token at `last` of each row, from a pass over whole rows."""
    model, variables = tiny_policy.model, tiny_policy.variables

    @jax.jit
    def logits(rows, last):
        hidden = model.apply(variables, rows, last, method=model.forward)
        at = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return at @ model.apply(variables, method=model.head)

    return logits


def reference(logits_at, next_token):
    """Tokens of every completion by whole passes, one token at a time."""
    prompts, lengths = map(np.asarray, prompts_and_lengths())
    rows = np.zeros((len(prompts) * GROUP, prompts.shape[1] + NEW), np.int32)
    rows[:, : prompts.shape[1]] = np.repeat(prompts, GROUP, axis=0)
    sizes = np.repeat(lengths, GROUP)
    for step in range(NEW):
        logits = logits_at(rows, sizes + step - 1)
        rows[np.arange(len(rows)), sizes + step] = next_token(logits, step)
    own = [row[size : size + NEW] for row, size in zip(rows, sizes, strict=True)]
    return np.stack(own).reshape(len(prompts), GROUP, NEW)


def with_uniforms(logits, step):
    """The next tokens with the random numbers of key 0, row by row."""
    fold = jax.random.fold_in
    keys = [fold(fold(jax.random.key(0), n), g) for n in range(4) for g in range(GROUP)]
    uniform = jnp.stack([jax.random.uniform(fold(key, step)) for key in keys])
    return sample_token(logits, uniform, temperature=SAMPLED.temperature)[0]


@pytest.mark.parametrize(
    ("kind", "next_token"),
    [("greedy", lambda logits, _: logits.argmax(-1)), ("sampled", with_uniforms)],
    ids=["greedy", "sampled"],
)
def test_tokens_equal_those_of_a_loop_over_whole_passes(
    kind, next_token, logits_at, request
):
    given = request.getfixturevalue(kind)
    expected = reference(logits_at, next_token)
    mask = np.asarray(given.mask)
    np.testing.assert_array_equal(np.asarray(given.tokens)[mask], expected[mask])


def test_logp_is_that_of_the_learner(tiny_policy, sampled):
    temperature = SAMPLED.temperature
    learner = jax.jit(
        functools.partial(policy_logprobs, tiny_policy.model, temperature=temperature)
    )
    scored = learner(tiny_policy.variables, *prompts_and_lengths(), sampled.tokens)
    expected = np.where(sampled.mask, scored.logp, 0.0)
    np.testing.assert_allclose(sampled.logp, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_completion_ends_with_its_first_stop_token(kind, request):
    given = request.getfixturevalue(kind)
    stops = {"greedy": GREEDY, "sampled": SAMPLED}[kind].stop_ids
    tokens, lengths = np.asarray(given.tokens), np.asarray(given.lengths)
    for n, g in np.ndindex(*lengths.shape):
        own = tokens[n, g, : lengths[n, g]]
        assert not np.isin(own[:-1], stops).any()
        assert given.finished[n, g] == np.isin(own[-1], stops)
        assert given.finished[n, g] or lengths[n, g] == NEW


def test_completions_have_all_kinds_of_lengths(sampled):
    lengths = np.asarray(sampled.lengths)
    assert lengths.min() == 1 and len(np.unique(lengths)) > 2


def test_padding_holds_the_pad_token_and_no_probability(tiny_policy, sampled):
    beyond = ~np.asarray(sampled.mask)
    assert beyond.any()
    assert (np.asarray(sampled.tokens)[beyond] == tiny_policy.tokenizer.pad_id).all()
    assert (np.asarray(sampled.logp)[beyond] == 0.0).all()
    assert (np.asarray(sampled.logp)[~beyond] < 0.0).all()


def test_completions_do_not_depend_on_the_prompts_beside_them(tiny_policy, sampled):
    prompts, lengths = prompts_and_lengths(8)
    chosen = jnp.array([2, 7, 0, 6])
    again = sample(tiny_policy, prompts[chosen], lengths[chosen], prompt_ids=chosen)
    for row, number in ((0, 2), (2, 0)):
        np.testing.assert_array_equal(again.tokens[row], sampled.tokens[number])
        np.testing.assert_allclose(again.logp[row], sampled.logp[number], atol=1e-5)


def test_completions_do_not_depend_on_how_far_prompts_are_padded(tiny_policy, sampled):
    prompts, lengths = prompts_and_lengths()
    wider = jnp.pad(prompts, ((0, 0), (0, 4)), constant_values=77)
    again = sample(tiny_policy, wider, lengths)
    np.testing.assert_array_equal(again.tokens, sampled.tokens)


def test_members_of_a_group_and_equal_prompts_differ(tiny_policy):
    prompts, lengths = prompts_and_lengths()
    same = jnp.tile(prompts[:1], (4, 1)), jnp.tile(lengths[:1], 4)
    drawn = sample(tiny_policy, *same, sampling=SamplingConfig(stop_ids=()))
    rows = {tuple(row) for row in np.asarray(drawn.tokens).reshape(-1, NEW).tolist()}
    assert len(rows) == 4 * GROUP


def test_another_key_draws_something_else(tiny_policy, sampled):
    given = prompts_and_lengths()
    again = sample(tiny_policy, *given)
    np.testing.assert_array_equal(again.tokens, sampled.tokens)
    other = sample(tiny_policy, *given, key=1)
    assert (np.asarray(other.tokens[..., 0]) != sampled.tokens[..., 0]).mean() > 0.8


def test_without_stop_ids_completions_fill_the_limit(tiny_policy):
    drawn = sample(
        tiny_policy, *prompts_and_lengths(), sampling=SamplingConfig(stop_ids=())
    )
    assert (np.asarray(drawn.lengths) == NEW).all()
    assert not np.asarray(drawn.finished).any()


def test_the_model_s_own_stop_tokens_are_the_default(tiny_policy, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        generating, "complete", lambda *given, **_: chosen.append(given[3])
    )
    for sampling in (None, SamplingConfig(), SamplingConfig(stop_ids=(7,))):
        sample(tiny_policy, *prompts_and_lengths(), sampling=sampling)
    assert tiny_policy.model.config.eos_token_ids == (257,)
    assert [one.stop_ids for one in chosen] == [(257,), (257,), (7,)]


def test_the_loop_stops_when_every_completion_has_ended(tiny_policy, monkeypatch):
    columns, advance = [], loops.advance

    def noted(*args, **options):
        loop, cache = advance(*args, **options)
        columns.extend(loop.column.tolist())
        return loop, cache

    monkeypatch.setattr(loops, "advance", noted)
    everything = SamplingConfig(stop_ids=tuple(range(264)))
    drawn = sample(
        tiny_policy, *prompts_and_lengths(), sampling=everything, max_new_tokens=50
    )
    # The first token follows from the prompt: no column of the cache was written.
    assert columns == [0]
    assert (np.asarray(drawn.lengths) == 1).all()


@pytest.fixture
def small_steps(monkeypatch):
    """A ring of two columns that grows, and visits of the host at every third token."""

    def columns(limit, longest):
        return next(min(2**k, limit) for k in range(1, 9) if 2**k >= longest)

    monkeypatch.setattr(engines, "cache_columns", columns)
    monkeypatch.setattr(engines, "MOST_TURNS", 3)
    monkeypatch.setattr(engines, "_SHORT", 0)


def test_a_ring_that_grows_and_fewer_slots_change_nothing(
    tiny_policy, sampled, small_steps, monkeypatch
):
    used, advance = [], loops.advance

    def noted(*args, **options):
        used.append((args[5].fed.shape[1], args[4][0][0].shape[-1]))
        return advance(*args, **options)

    monkeypatch.setattr(loops, "advance", noted)
    again = sample(tiny_policy, *prompts_and_lengths())
    assert_same(again, sampled)
    slots, columns = zip(*used, strict=True)
    assert slots[0] == 12 and slots[-1] < 12 and columns[0] == 2 and columns[-1] > 4
    assert sorted(slots, reverse=True) == list(slots)
    assert sorted(columns) == list(columns)


@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_the_number_of_slots_changes_nothing(
    slots, tiny_policy, sampled, small_steps, meshes_of
):
    # Fewer than a group, one, and some that are refilled within a prompt's group.
    sampler = generating.GroupSampler(
        tiny_policy.model, meshes_of(1, 1, 1), max_prompt_tokens=6
    )
    sampler.update(tiny_policy.variables, version=0)
    prompts, lengths = map(np.asarray, prompts_and_lengths())
    rows = [
        row[:n].tolist() for row, n in zip(np.asarray(prompts), lengths, strict=True)
    ]
    again = sampler.sample(
        rows,
        numbers=range(4),
        key=jax.random.key(0),
        group_size=GROUP,
        max_new_tokens=NEW,
        sampling=SAMPLED,
        batch_size=slots,
    )
    assert_same(again, sampled)


def test_a_call_within_jit_draws_the_same(tiny_policy, sampled):
    traced = jax.jit(lambda prompts, lengths: sample(tiny_policy, prompts, lengths))
    assert_same(traced(*prompts_and_lengths()), sampled)


def assert_same(given, expected):
    np.testing.assert_array_equal(given.tokens, expected.tokens)
    np.testing.assert_array_equal(given.lengths, expected.lengths)
    np.testing.assert_array_equal(given.finished, expected.finished)
    np.testing.assert_allclose(given.logp, expected.logp, atol=1e-5)


def test_a_mesh_draws_what_one_device_draws(tiny_policy, sampled, meshes_of):
    prompts, lengths = prompts_and_lengths(8)
    mesh = meshes_of(2, 2, 2)
    axes, shapes = param_axes(tiny_policy.model), abstract_params(tiny_policy.model)
    shardings = meshes.parameter_shardings(axes, shapes, mesh)
    sharded = jax.device_put(tiny_policy.params, shardings)
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        given = meshes.to_mesh(mesh, (np.asarray(prompts), np.asarray(lengths)))
        spread = sample(tiny_policy, *given, params=sharded)
    # The first four of the eight prompts are those of `sampled`.
    np.testing.assert_array_equal(spread.tokens[:4], sampled.tokens)
    np.testing.assert_allclose(spread.logp[:4], sampled.logp, atol=1e-5)


def test_casting_ahead_changes_nothing_that_the_model_computes(tiny_policy):
    # Norms multiply in float32: their scales rounded to bfloat16 would part the sampler
    # from the learner.
    config = dataclasses.replace(tiny_policy.model.config, dtype="bfloat16")
    model = Decoder(config)
    prompts, lengths = prompts_and_lengths()
    cast = in_compute_dtype(tiny_policy.variables, "bfloat16")
    assert cast["params"]["embed"]["embedding"].dtype == jnp.bfloat16
    forward = jax.jit(functools.partial(model.apply, method=model.forward))
    hidden = [forward(v, prompts, lengths) for v in (tiny_policy.variables, cast)]
    np.testing.assert_array_equal(*(np.asarray(h, np.float32) for h in hidden))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 123}, "6 prompt tokens and 123 new tokens exceed"),
        ({"lengths": jnp.ones(3, jnp.int32)}, r"got \(4, 6\) and \(3,\)"),
        ({"prompts": jnp.ones(4, jnp.int32)}, r"must be \[N, P\]"),
    ],
)
def test_wrong_arguments_are_refused(change, message, tiny_policy):
    prompts, lengths = prompts_and_lengths()
    prompts = change.pop("prompts", prompts)
    lengths = change.pop("lengths", lengths)
    with pytest.raises(ValueError, match=message):
        sample(tiny_policy, prompts, lengths, **change)
