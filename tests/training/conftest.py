"""What the tests of training share: a batch of ragged rows, a bigram as a model."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grpo_jax.config import MeshConfig, SamplingConfig, TrainConfig
from grpo_jax.training.state import Batch


class Bigram(nn.Module):
    """A language model that compiles at once: the next token follows from the last.

    It has the part of the decoder's interface that scoring needs.
    """

    vocab_size: int = 32
    width: int = 8

    @property
    def config(self):
        return types.SimpleNamespace(logit_softcap=None, dtype="float32")

    def setup(self):
        init = nn.initializers.normal(1.0)
        self.table = self.param("kernel", init, (self.vocab_size, self.width))
        self.out = self.param("out", init, (self.width, self.vocab_size))

    def score(self, prompts, lengths, completions):
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, :, None]
        last = jnp.broadcast_to(last, (*completions.shape[:2], 1))
        return self.table[jnp.concatenate([last, completions[..., :-1]], axis=-1)]

    def head(self):
        return self.out


def make_batch(prompts=4, group=4, width=6, length=5, vocab=32, seed=0):
    """Completions of all lengths, an empty one too; not with the policy's log-probs."""
    rng = np.random.default_rng(seed)
    shape = (prompts, group, length)
    lengths = rng.integers(1, length + 1, shape[:2])
    lengths[0, 0] = 0
    logp = -np.abs(rng.normal(3.4, 0.2, shape)).astype(np.float32)
    return Batch(
        prompts=jnp.asarray(rng.integers(0, vocab, (prompts, width)), jnp.int32),
        prompt_lengths=jnp.asarray(rng.integers(1, width + 1, prompts), jnp.int32),
        completions=jnp.asarray(rng.integers(0, vocab, shape), jnp.int32),
        mask=jnp.asarray(np.arange(length) < lengths[..., None]),
        advantages=jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
        sampler_logp=jnp.asarray(logp),
        old_logp=jnp.asarray(logp),
        ref_logp=jnp.asarray(logp + 0.1),
    )


def make_config(**changes):
    values = {
        "model": "tiny",
        "steps": 10,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_new_tokens": 7,
        "mesh": MeshConfig(fsdp=1),
        "sampling": SamplingConfig(temperature=0.9),
    }
    return TrainConfig(**(values | changes))


@dataclasses.dataclass(frozen=True)
class Tools:
    """The functions of this file."""

    make_batch = staticmethod(make_batch)
    make_config = staticmethod(make_config)


@pytest.fixture(scope="session")
def tools():
    return Tools()


@pytest.fixture(scope="session")
def bigram():
    """The model and its parameters, a fresh copy of which each call returns."""
    model = Bigram()
    rng = np.random.default_rng(3)
    table = rng.normal(size=(32, 8)).astype(np.float32)
    out = (0.3 * rng.normal(size=(8, 32))).astype(np.float32)
    return model, lambda: {"kernel": jnp.array(table), "out": jnp.array(out)}


@pytest.fixture(scope="session")
def assert_close():
    """Compares trees, to a share of the largest value of each leaf."""

    def compare(given, expected, *, rtol=1e-5):
        for (path, one), other in zip(
            jax.tree.leaves_with_path(given), jax.tree.leaves(expected), strict=True
        ):
            scale = max(np.abs(np.asarray(other)).max(), 1e-8)
            np.testing.assert_allclose(
                one, other, rtol=rtol, atol=rtol * scale, err_msg=str(path)
            )

    return compare


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Runs draw no picture, which takes longer than the training of tiny models.

    The run whose directory is looked at is made before this applies.
    """
    monkeypatch.setattr("grpo_jax.training.loop.plot_runs", lambda runs, out: None)
