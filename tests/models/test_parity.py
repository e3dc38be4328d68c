"""The decoder against transformers, on committed references of tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder


def logits_of(config, params, tokens, lengths):
    model = Decoder(config)

    def logits(params, tokens, lengths):
        variables = {"params": params}
        hidden = model.apply(variables, tokens, lengths, method=model.forward)
        out = hidden @ model.apply(variables, method=model.head)
        cap = config.logit_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)

    return np.asarray(jax.jit(logits)(params, tokens, lengths))


def test_logits_equal_those_of_transformers(reference):
    config = ModelConfig.from_hf(reference.hf)
    params = reference.params(config)
    ours = logits_of(config, params, reference.tokens, reference.lengths)
    for row, length in enumerate(reference.lengths):
        theirs = reference.logits[row, :length]
        error = np.abs(ours[row, :length] - theirs).max()
        assert error < 1e-5 * theirs.std(), f"row {row} differs by {error}"
