"""What a run measures of its policy on held-out rows, between its steps."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.planning.memory import evaluation_batch, is_evaluated
from grpo_jax.reporting import metrics as names
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import encode_rows, unpad
from grpo_jax.rollout.episodes import Episodes, Playing
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.scoring import score_episodes, score_rows
from grpo_jax.tasks.base import Row, Task, first_rows
from grpo_jax.training._judge import Completed, has_ground_truth, judge
from grpo_jax.training._policy import Policy
from grpo_jax.training.scores import Evaluation
from grpo_jax.weights.tokenizer import Tokenizer

# Completions sampled at once where nothing else is said.
BATCH = 128


def held_out_rows(task: Task, config: TrainConfig) -> Sequence[Row]:
    """The rows on which a run measures its policy; none if it is not evaluated."""
    return first_rows(task.test, config.eval_prompts if is_evaluated(config) else 0)


def encode_held_out(
    policy: Policy, rows: Sequence[Row], episodes: Episodes | None = None
) -> list[list[int]]:
    """The token ids of held-out prompts, with the tools of `episodes`.

    Raises:
      ValueError: naming a row whose prompt the run has no room for, as `encode_rows`.
    """
    config, model = policy.config, policy.model.config
    limit = longest_prompt(
        config.max_prompt_tokens,
        new_tokens=config.max_new_tokens,
        context=model.max_position_embeddings,
    )
    return encode_rows(
        policy.tokenizer,
        rows,
        limit=limit,
        vocab_size=model.vocab_size,
        encode=None if episodes is None else episodes.encode,
    )


def make_evaluation(
    policy: Policy,
    task: Task,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    runner: RewardRunner,
    mesh: Mesh,
    *,
    sampler: Sampler,
    agreement: Agreement,
    announce: Callable[[str], None],
    episodes: Episodes | None = None,
) -> Callable[[], dict[str, float]]:
    """A function that measures a run's policy, as the sampler has it, on held-out rows.

    It returns the greedy accuracy where the task can tell right from wrong, else the
    mean reward, and with episodes what tools and environments did. Nothing if there are
    no rows. All processes must call it.

    Args:
      prompts: the token ids of those rows.
      episodes: play with tools and environments. The seed of a row's episode is the
        same in all evaluations.
      announce: receives a line when an evaluation begins.
    """
    if not rows:
        return dict
    config, model = policy.config, policy.model.config
    batch = evaluation_batch(model, config, mesh)
    sampling = policy_sampling(
        model, policy.tokenizer, config.sampling, temperature=0.0
    )

    def evaluate() -> dict[str, float]:
        start = time.perf_counter()
        announce(f"compiling, then evaluating {len(rows):,} held-out prompts")
        share = meshes.own_share(len(rows))
        own_rows, asked, playing = rows[share], prompts, None
        if episodes is not None:
            with agreement.phase("environments"):
                playing = episodes.begin(
                    own_rows, step=0, numbers=range(len(rows))[share], members=1
                )
            own_rows, asked = playing.rows, meshes.gather_lists(playing.prompts)
        own = complete_share(
            sampler,
            policy.tokenizer,
            asked,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            batch_size=batch,
            playing=playing,
        )
        with agreement.phase("evaluation"):
            values = held_out_values(own, own_rows, task, runner, batch)
            if playing is not None:
                playing.close()
        values = np.array(meshes.gather_lists(values), np.float64)
        if has_ground_truth(task):
            result = Evaluation(correct=values[:, None] == 1.0, completions=())
            metrics = {
                names.ACCURACY: result.accuracy,
                "eval/standard_error": result.standard_error,
            }
        else:
            given = values[~np.isnan(values)]
            mean = float(given.mean()) if given.size else math.nan
            metrics = {names.EVAL_REWARD: mean}
        if own.played is not None:
            counts = names.episode_metrics(meshes.gather_rows(own.played.counts))
            metrics |= {f"eval/{name}": value for name, value in counts.items()}
        return metrics | {"time/eval": time.perf_counter() - start}

    return evaluate


def held_out_values(
    completed: Completed,
    rows: Sequence[Row],
    task: Task,
    runner: RewardRunner,
    batch: int,
) -> list[float]:
    """1 for right and 0 for wrong, or the reward, of one completion per row.

    Reward functions see up to `batch` of them at once, to which their time limit
    applies.
    """
    if not rows:
        return []
    if has_ground_truth(task):
        judged = judge(completed, rows, task, lenient=False)
        assert judged.correct is not None
        return judged.correct[:, 0].astype(float).tolist()
    seen = [group[0] for group in completed.completions or completed.texts]
    ids = [group[0] for group in completed.ids]
    played = completed.played
    totals: list[float] = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        asked = runner, rows[part], seen[part], ids[part]
        if played is None:
            scores = score_rows(*asked, step=0)
        else:
            scores = score_episodes(*asked, played, step=0, first=start)
        totals += scores.total.tolist()
    return totals


def complete_share(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = BATCH,
    playing: Playing | None = None,
) -> Completed:
    """The completions of this process's share of the prompts; all processes call it.

    Args:
      playing: the episodes of this process's prompts, if there are any.
    """
    options: dict[str, Any] = {} if playing is None else {"turns": playing}
    sampled = sampler.sample(
        prompts,
        numbers=range(len(prompts)),
        key=jax.random.key(seed),
        group_size=samples,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size,
        **options,
    )
    ids = unpad(np.asarray(sampled.tokens), np.asarray(sampled.lengths))
    cut = ~np.asarray(sampled.finished)
    if playing is None:
        texts = [[tokenizer.decode(one) for one in group] for group in ids]
        return Completed(texts=texts, ids=ids, cut=cut)
    cut |= playing.is_cut().reshape(cut.shape)
    return Completed(
        texts=playing.last_turns(),
        ids=ids,
        completions=playing.completions(),
        played=playing.finish(),
        cut=cut,
    )
