"""A whole GRPO step from top to bottom: sample, reward, advantages, update.

    python experiments/minimal_loop.py

It uses the public names alone, and is meant to be copied and changed. The model that
comes with the package learns to add and subtract two-digit numbers: the share of right
answers rises from 0.45 to above 0.9 in 60 steps, half a minute on two CPU cores.

What `grpo_jax.train` adds, and this file leaves out: checkpoints and resume, several
devices, a reference policy and its KL penalty, several updates per rollout, held-out
evaluation, time limits for rewards, logging and export.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grpo_jax import (
    Batch,
    ObjectiveConfig,
    TrainConfig,
    generate,
    load_pretrained,
    load_task,
    make_train_state,
    make_train_step,
    softmax_advantages,
)


def main(
    steps: int = 60,
    prompts_per_step: int = 32,
    group_size: int = 8,
    max_new_tokens: int = 6,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> list[float]:
    """Trains, prints the mean reward of every tenth step, and returns all of them."""
    # 1. Load a model, its tokenizer and a task: rows with a prompt and an answer.
    policy = load_pretrained("embedded")
    task = load_task("arithmetic")
    rows = random.Random(seed)
    key = jax.random.key(seed)

    # 2. Make the state and the step. Without a reference policy there is no KL penalty.
    config = TrainConfig(
        max_new_tokens=max_new_tokens, objective=ObjectiveConfig(kl_coef=0.0)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    state = make_train_state(policy.params, optimizer)
    train_step = jax.jit(make_train_step(policy.model, optimizer, config))

    history = []
    for step in range(steps):
        # 3. Take N prompts and pad them on the right. `generate` wants their lengths.
        batch_rows = rows.sample(task.train, prompts_per_step)
        prompts, prompt_lengths = pad_right(
            [policy.tokenizer.encode_prompt(row["prompt"]) for row in batch_rows],
            length=8,
            pad_id=policy.tokenizer.pad_id,
        )

        # 4. Sample G completions per prompt; each prompt is computed once.
        completions = generate(
            policy.model,
            state.params,
            prompts,
            prompt_lengths,
            jax.random.fold_in(key, step),
            group_size=group_size,
            max_new_tokens=max_new_tokens,
        )

        # 5. Decode the completions and reward them: [N, G] numbers, on the host.
        tokens = np.asarray(completions.tokens)
        lengths = np.asarray(completions.lengths)
        rewards = np.zeros(lengths.shape, np.float32)
        for n, g in np.ndindex(rewards.shape):
            text = policy.tokenizer.decode(tokens[n, g, : lengths[n, g]].tolist())
            rewards[n, g] = float(text.strip() == batch_rows[n]["answer"])

        # 6. Compare each completion with its group: G * softmax(rewards) - 1.
        advantages = softmax_advantages(jnp.asarray(rewards))

        # 7. Update the policy. Gradients reach the tokens of the completions alone.
        batch = Batch(
            prompts=prompts,
            prompt_lengths=prompt_lengths,
            completions=completions.tokens,
            mask=completions.mask,
            advantages=advantages,
            sampler_logp=completions.logp,
        )
        state, metrics = train_step(state, batch)

        history.append(float(rewards.mean()))
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step:3d}  reward {history[-1]:.3f}  "
                f"loss {float(metrics['loss']):+.4f}  "
                f"grad_norm {float(metrics['grad_norm']):.3f}"
            )
    return history


def pad_right(
    sequences: list[list[int]], *, length: int, pad_id: int
) -> tuple[jax.Array, jax.Array]:
    """Returns token ids ``[N, length]`` and the lengths ``[N]`` before padding."""
    padded = np.full((len(sequences), length), pad_id, np.int32)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(padded), jnp.asarray([len(ids) for ids in sequences])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
