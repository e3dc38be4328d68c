"""Times of each phase of a step beside the least that the hardware allows.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py --devices 2

The floor of a phase is the larger of its operations over the rate of a large matrix
product and its bytes over the rate of a large copy, both measured here; see
docs/scaling.md. Meshes of virtual CPU devices share the cores: they show what
splitting costs, not what it gains. The last line is JSON.
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grpo_jax.config import MeshConfig, SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, init_params, param_axes
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout.generate import generate
from grpo_jax.rollout.groups import Rollout
from grpo_jax.training.learner import Learner

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
)
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 8, 4, 64, 64
REPEATS = 3


def main() -> None:
    """Measure the hardware, then each phase on one mesh."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=-1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sampler", choices=("gathered", "split"), default="gathered")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", asked.devices)
    rates = product_rate(), copy_rate()
    config = TrainConfig(
        model="benchmark",
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        mesh=MeshConfig(
            data=asked.data,
            fsdp=asked.fsdp,
            tensor=asked.tensor,
            sampler=asked.sampler,
        ),
    )
    measured, params = phases(config)
    needed = floors(params, *rates)
    print(f"{rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s")
    for name, seconds in measured.items():
        ratio = seconds / needed[name]
        print(
            f"{name:10} {seconds:8.3f} s   floor {needed[name]:8.3f} s   x {ratio:.2f}"
        )
    facts = {"jax": jax.__version__, "devices": asked.devices, "rates": rates}
    facts["mesh"] = dataclasses.asdict(config.mesh)
    print(json.dumps(facts | {"seconds": measured, "floors": needed}))


def floors(params: int, products: float, copies: float) -> dict[str, float]:
    """Least seconds of each phase; `params` are those in products, head included."""
    layers, wide = MODEL.num_layers, MODEL.num_heads * MODEL.head_dim
    sequences, numbers = PROMPTS * GROUP, 4
    rows = PROMPTS * PROMPT_TOKENS + sequences * NEW_TOKENS
    body = params - MODEL.vocab_size * MODEL.hidden_size
    pairs = PROMPTS * PROMPT_TOKENS * PROMPT_TOKENS / 2
    pairs_own = sequences * NEW_TOKENS * (PROMPT_TOKENS + NEW_TOKENS / 2)
    # Two products of two operations each, for every pair of tokens.
    attention = 4 * wide * layers * (pairs + pairs_own)
    head = MODEL.vocab_size * MODEL.hidden_size * sequences * NEW_TOKENS
    forward = 2 * (body * rows + head) + attention
    prefill = 2 * body * PROMPTS * PROMPT_TOKENS + 4 * wide * layers * pairs
    cache = 2 * layers * MODEL.num_kv_heads * MODEL.head_dim * numbers
    read = params * numbers + cache * (
        PROMPTS * PROMPT_TOKENS + sequences * NEW_TOKENS / 2
    )
    token = max(read / copies, 2 * params * sequences / products)
    return {
        "rollout": prefill / products + NEW_TOKENS * token,
        "score": forward / products,
        "update": 3 * forward / products,
    }


def phases(config: TrainConfig) -> tuple[dict[str, float], int]:
    """Best seconds of each phase, and the number of parameters in products."""
    mesh, model = meshes.make_mesh(config.mesh), Decoder(MODEL)
    with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.RULES):
        init = functools.partial(init_params, model)
        shapes = jax.eval_shape(init, jax.random.key(0))
        places = meshes.parameter_shardings(param_axes(model), shapes, mesh)
        params = jax.jit(init, out_shardings=places)(jax.random.key(0))
        learner = Learner(model, params, config, mesh)
        rollout = random_rollout()
        sent = meshes.to_mesh(mesh, (rollout.prompts, rollout.prompt_lengths))

        def sample():
            return generate(
                model,
                learner.sampler_variables()["params"],
                *sent,
                jax.random.key(1),
                group_size=GROUP,
                max_new_tokens=NEW_TOKENS,
                sampling=SamplingConfig(stop_ids=(MODEL.vocab_size,)),
            )

        batch = learner.score(rollout)
        rewarded = learner.with_advantages(batch, rollout)
        seconds = {
            "rollout": best(sample),
            "score": best(lambda: learner.score(rollout)),
            "update": best(lambda: learner.update(rewarded)),
        }
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1)
    return seconds, count


def random_rollout() -> Rollout:
    """Full-length prompts and completions of random tokens."""
    rng, shape = np.random.default_rng(0), (PROMPTS, GROUP, NEW_TOKENS)
    draw = functools.partial(rng.integers, 2, MODEL.vocab_size, dtype=np.int32)
    return Rollout(
        rows=[{}] * PROMPTS,
        prompts=draw((PROMPTS, PROMPT_TOKENS)),
        prompt_lengths=np.full(PROMPTS, PROMPT_TOKENS, np.int32),
        tokens=draw(shape),
        logp=np.full(shape, -9.0, np.float32),
        lengths=np.full(shape[:2], NEW_TOKENS, np.int32),
        finished=np.ones(shape[:2], bool),
        completions=[""] * PROMPTS * GROUP,
        counts=np.ones(PROMPTS, bool),
        rewards=rng.normal(size=shape[:2]),
        metrics={},
    )


def best(call) -> float:
    """Least seconds of a few calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate() -> float:
    """Operations per second of a large float32 matrix product on one device."""
    size = 2048
    x = jnp.ones((size, size))
    return 2 * size**3 / best(lambda: jax.jit(jnp.matmul)(x, x))


def copy_rate() -> float:
    """Bytes read per second, from memory larger than caches."""
    x = jnp.ones(2**26)
    return x.nbytes / best(lambda: jax.jit(jnp.sum)(x))


if __name__ == "__main__":
    main()
