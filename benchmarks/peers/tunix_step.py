"""The steps of a workload with Tunix's GRPOLearner: one JSON line, as step.py prints.

    benchmarks/peers/tunix/bin/python benchmarks/peers/tunix_step.py tiny

Held equal to step.py: model and prompts, float32, exactly T new tokens (a stop id that
no token has), temperature 1, beta 0.04 with a reference model and the k3 estimate, one
update per rollout, a gradient norm of at most 1, no weight decay. The cache has no
unused slots. Tunix puts its BOS before a prompt, which is one token shorter for it.

Tunix 0.1.7 ignores `rope_theta` of a Llama (`apply_rope` is called without it); it is
given here, at the same cost. Geometric lengths come from random weights and many stop
tokens. `--micro` prompts are updated at once: a whole batch of
`smol` needs 22 GiB.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from workloads import (
    WORKLOADS,
    exact_prompts,
    publish,
    record,
    reward,
    versions,
)

WARMUP = 1


def main():
    """Run the steps and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--models", type=Path, default=Path("benchmarks/models"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--micro", type=int, help="prompts updated at once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = WORKLOADS[args.workload]
    folder = work.folder(args.models)
    steps = args.steps or work.steps
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = 1 if tokenizer.bos_token_id else 0
    texts = exact_prompts(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        work.prompts * steps,
        work.prompt_tokens - added,
    )
    cluster = make_cluster(work, folder, tokenizer, steps=steps, micro=args.micro)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=work.group,
            num_iterations=1,
            beta=work.kl_coef,
            epsilon=0.2,
            kl_loss_mode="low_var_kl",
        ),
        reward_fns=lambda prompts, completions, **_: reward(completions),
    )
    rows = watch(learner, cluster, work)
    starts = range(0, len(texts), work.prompts)
    learner.train([{"prompts": np.array(texts[i : i + work.prompts])} for i in starts])
    line = record(
        "tunix-float32",
        work,
        rows[WARMUP:],
        steps=len(rows) - WARMUP,
        micro=args.micro,
        versions=versions("google-tunix", "jax", "jaxlib", "flax", "optax"),
    )
    publish(line, args.out)


def make_cluster(work, folder, tokenizer, *, steps, micro):
    """Actor, reference and sampler on one device."""
    hf = json.loads((folder / "config.json").read_text())
    theta = hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    heads = hf["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
    load = functools.partial(
        llama_params.create_model_from_safe_tensors,
        str(folder),
        config,
        mesh,
        dtype=jnp.float32,
    )
    role = rl_cluster.Role
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)
    )
    return rl_cluster.RLCluster(
        actor=load(),
        reference=load(),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh
            ),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=10**9,
                max_steps=steps,
                mini_batch_size=work.prompts if micro else None,
                train_micro_batch_size=micro,
                rollout_micro_batch_size=work.prompts,
                compute_logps_micro_batch_size=micro or work.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.new_tokens,
                max_prompt_length=work.prompt_tokens,
                kv_cache_size=work.prompt_tokens + work.new_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=list(work.stop_ids(config.vocab_size)) or [-1],
                data_type=jnp.float32,
            ),
        ),
    )


def watch(learner, cluster, work):
    """Clocks around the phases, each waited for; the rows they fill, one per step."""
    rows, row = [], {}

    def timed(function, name, wait=lambda result: None):
        def call(*args, **options):
            start = time.perf_counter()
            result = function(*args, **options)
            jax.block_until_ready(wait(result))
            row[name] = row.get(name, 0.0) + time.perf_counter() - start
            return result

        return call

    generate = cluster.generate

    def checked(*args, **options):
        result = generate(*args, **options)
        lengths = [len(ids) for ids in result.tokens]
        work.check(lengths)
        row["tokens"] = sum(lengths)
        return result

    step = learner._run_global_step

    def whole_step(*args, **options):
        start = time.perf_counter()
        step(*args, **options)
        rows.append({**row, "step": time.perf_counter() - start})
        row.clear()
        print({name: round(value, 2) for name, value in rows[-1].items()})

    trained = lambda _: nnx.state(cluster.actor_trainer.model)  # noqa: E731
    reference = cluster.get_ref_per_token_logps
    cluster.generate = timed(checked, "rollout")
    cluster.get_ref_per_token_logps = timed(reference, "reference", lambda logp: logp)
    cluster.update_actor = timed(cluster.update_actor, "update", trained)
    learner._run_global_step = whole_step
    return rows


if __name__ == "__main__":
    main()
