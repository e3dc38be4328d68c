"""The loss that balances experts: by hand, as transformers has it, and in a step."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from grpo_jax.config import ObjectiveConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.packing import completion_states, pack
from grpo_jax.training._balance import balance_loss, token_weights
from grpo_jax.training.state import Batch
from grpo_jax.training.step import _loss_totals, make_train_step
from grpo_jax.weights._names import parameter_table, read_parameter

REFERENCES = pathlib.Path(__file__).parents[1] / "models" / "references"


class ArrayTensor:
    def __init__(self, values):
        self.values = values

    def read(self, index):
        return self.values[index]


@functools.cache
def reference(name):
    """A model of transformers, its parameters and its rows of tokens."""
    with np.load(REFERENCES / f"{name}.npz") as data:
        config = ModelConfig.from_hf(json.loads(str(data["config"])))
        tensors = {k.removeprefix("weights/"): ArrayTensor(data[k]) for k in data.files}
        rows, lengths = data["tokens"], data["lengths"]
    read = functools.partial(read_parameter, dtype=np.dtype("float32"))
    table = parameter_table(config)
    params = {row.path: jnp.asarray(read(row, tensors)) for row in table}
    return Decoder(config), traverse_util.unflatten_dict(params, sep="/"), rows, lengths


def test_experts_that_are_taken_too_often_cost_more():
    even = jnp.log(jnp.array([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]]))
    weights = jnp.ones((1, 2))
    # Each expert has half a choice of each token, and a probability of 1/4.
    loss = balance_loss(even[None, None], weights, per_token=2)
    np.testing.assert_allclose(loss, 2.0, rtol=1e-6)
    # Of the first token alone: 4 (1 x 0.4 + 1 x 0.4). The other is padding.
    first = functools.partial(balance_loss, weights=jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(first(even[None, None], per_token=2), 3.2, rtol=1e-6)
    # Both layers together are even, though neither is.
    layers = jnp.stack([even[:1, None], even[1:, None]])
    loss = balance_loss(layers, jnp.ones((1, 1)), per_token=2)
    np.testing.assert_allclose(loss, 2.0, rtol=1e-6)
    assert balance_loss(even[None, None], 0.0 * weights, per_token=2) == 0.0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_it_is_that_of_transformers_over_rows_without_their_padding(name):
    """Where a prompt is computed once, it counts once for each completion."""
    model, params, rows, lengths = reference(name)
    prompts = np.minimum(lengths, 6)
    own = np.zeros((3, 2, 9), np.int32)
    for row, length, start in zip(range(3), lengths, prompts, strict=True):
        own[row, :, : length - start] = rows[row, start:length]
    # The last token that counts is predicted, and never read.
    mask = np.arange(9) < (lengths - prompts + 1)[:, None, None]
    batch = Batch(
        prompts=jnp.asarray(rows[:, :6]),
        prompt_lengths=jnp.asarray(prompts),
        completions=jnp.asarray(own),
        mask=jnp.asarray(np.broadcast_to(mask, own.shape)),
        advantages=jnp.zeros((3, 2)),
        sampler_logp=jnp.zeros(own.shape),
    )

    @jax.jit
    def balance(batch):
        given = batch.prompts, batch.prompt_lengths, batch.completions
        variables = {"params": params}
        *_, routers = completion_states(
            model, variables, *given, packing=batch.packing, with_routers=True
        )
        per_token = model.config.experts.per_token
        return balance_loss(routers, token_weights(batch), per_token=per_token)

    expected = json.loads((REFERENCES / "balance.json").read_text())[name]
    np.testing.assert_allclose(balance(batch), expected, rtol=1e-5)


def test_it_is_added_to_the_loss_and_the_same_in_shared_rows(tools):
    model, params, *_ = reference("mixtral")
    coefficient = 0.5
    objective = ObjectiveConfig(router_aux_loss_coef=coefficient, kl_coef=0.0)
    config = tools.make_config(objective=objective, max_new_tokens=33)
    batch = tools.make_batch(length=33, vocab=48)
    most = np.where(np.arange(4) == 1, 33, 5)[None, :, None]
    batch = batch.replace(mask=batch.mask & (np.arange(33) < most))
    packing = pack(np.asarray(batch.mask), batch.prompts.shape[1])
    shared = batch.replace(packing=jax.tree.map(jnp.asarray, packing))
    sums = jax.jit(lambda batch: _loss_totals(model, config, None, params, batch)[1][0])
    found = [
        {name: float(mean.value()) for name, mean in sums(one).items()}
        for one in (batch, shared)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    policy, balance = found[0]["policy_loss"], found[0]["router_aux_loss"]
    assert balance > 1.0  # two experts per token
    assert found[0]["loss"] == pytest.approx(policy + coefficient * balance, rel=1e-4)


def test_a_model_without_experts_is_refused(bigram, tools):
    objective = ObjectiveConfig(router_aux_loss_coef=0.1)
    config = tools.make_config(objective=objective)
    with pytest.raises(ValueError, match="needs a model with experts"):
        make_train_step(bigram[0], None, config)
