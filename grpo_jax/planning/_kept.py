"""How much a gradient keeps, found by tracing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxtyping import PyTree

from grpo_jax.config import MeshConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.models.protocol import in_compute_dtype
from grpo_jax.parallel.mesh import abstract_mesh


@functools.lru_cache(maxsize=64)
def kept_bytes(
    model: ModelConfig,
    prompts: int,
    group: int,
    prompt_tokens: int,
    new_tokens: int,
    device: AbstractDevice | None,
) -> int:
    """Bytes that the gradient of `Decoder.score` keeps beside its inputs on a device.

    Kernels keep no scores of attention, so it counts for which device it is traced.
    """
    decoder = Decoder(model)
    params = jax.eval_shape(
        lambda tree: in_compute_dtype(tree, model.dtype), abstract_params(decoder)
    )

    def residuals(params: PyTree, *rows: Any) -> Any:
        score = lambda p: decoder.apply({"params": p}, *rows, method=decoder.score)  # noqa: E731
        return jax.vjp(score, params)[1]

    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = [(prompts, prompt_tokens), (prompts,), (prompts, group, new_tokens)]
    own = abstract_mesh(MeshConfig(), 1, device)
    # From the mesh of a run JAX gets to one of another size by way of an empty one.
    with use_abstract_mesh(AbstractMesh((), ())), use_abstract_mesh(own):
        jaxpr = jax.make_jaxpr(residuals)(params, *map(int32, shapes)).jaxpr
    inputs = set(jaxpr.invars)
    made = {v for v in jaxpr.outvars if isinstance(v, Var) and v not in inputs}
    arrays: list[Any] = [v.aval for v in made]
    return sum(array.size * array.dtype.itemsize for array in arrays)
