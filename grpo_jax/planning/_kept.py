"""How much a gradient keeps, found by tracing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import PyTree

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.models.protocol import in_compute_dtype


@functools.lru_cache(maxsize=64)
def kept_bytes(
    model: ModelConfig, prompts: int, group: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Bytes that the gradient of `Decoder.score` keeps beside its inputs."""
    decoder = Decoder(model)
    params = jax.eval_shape(
        lambda tree: in_compute_dtype(tree, model.dtype), abstract_params(decoder)
    )

    def residuals(params: PyTree, *rows: Any) -> Any:
        score = lambda p: decoder.apply({"params": p}, *rows, method=decoder.score)  # noqa: E731
        return jax.vjp(score, params)[1]

    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = [(prompts, prompt_tokens), (prompts,), (prompts, group, new_tokens)]
    jaxpr = jax.make_jaxpr(residuals)(params, *map(int32, shapes)).jaxpr
    inputs = set(jaxpr.invars)
    made = {v for v in jaxpr.outvars if isinstance(v, Var) and v not in inputs}
    arrays: list[Any] = [v.aval for v in made]
    return sum(array.size * array.dtype.itemsize for array in arrays)
