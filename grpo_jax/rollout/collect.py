"""One rollout: prompts of a step, a group of completions for each, their rewards.

A rollout is on the host and holds this process's share of the global batch.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import TrainConfig
from grpo_jax.models.limits import longest_prompt
from grpo_jax.models.protocol import LanguageModelConfig
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout._carry_over import CarryOver, open_stream
from grpo_jax.rollout._early import EarlyRewards
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.rollout.encoding import bucket, encode_rows, pad, prompts_sha256, unpad
from grpo_jax.rollout.episodes import Episodes, Playing
from grpo_jax.rollout.rollout import Rollout
from grpo_jax.rollout.sampler import Completions, Sampler
from grpo_jax.rollout.scoring import score_episodes, score_rows, with_scores
from grpo_jax.tasks.base import Row, Task
from grpo_jax.tasks.order import rows_at
from grpo_jax.weights.tokenizer import Tokenizer


class Collector:
    """Samples groups of completions for a task's prompts and has them rewarded."""

    def __init__(
        self,
        sampler: Sampler,
        model: LanguageModelConfig,
        tokenizer: Tokenizer,
        task: Task,
        runner: RewardRunner,
        config: TrainConfig,
        *,
        episodes: Episodes | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """A collector; `episodes` play with tools and environments, if any."""
        self._sampler = sampler
        self._episodes = episodes
        self._tokenizer = tokenizer
        self._task = task
        self._runner = runner
        self._early = EarlyRewards(runner, tokenizer.decode)
        self._config = config
        self._agreement = agreement or Agreement()
        self._sampling = policy_sampling(model, tokenizer, config.sampling)
        self._limit = longest_prompt(
            config.max_prompt_tokens,
            new_tokens=config.max_new_tokens,
            context=model.max_position_embeddings,
        )
        self._prompts = encode_rows(
            tokenizer,
            task.train,
            limit=self._limit,
            vocab_size=model.vocab_size,
            encode=None if episodes is None else episodes.encode,
        )
        self._carry: CarryOver | None = None
        if config.rollout.carry_over:
            self._carry = open_stream(
                sampler,
                lambda position: self._prompts[self._rows(position, 1)[0]],
                config,
                longest=max(map(len, self._prompts)),
                sampling=self._sampling,
            )

    @property
    def carry_over(self) -> CarryOver | None:
        """What continues from step to step; None without `rollout.carry_over`."""
        return self._carry

    def _rows(self, position: int, count: int) -> list[int]:
        size = len(self._prompts)
        return rows_at(position, count, size=size, seed=self._config.seed)

    def prompts_sha256(self) -> str:
        """The digest of all prompts as the model sees them."""
        return prompts_sha256(self._prompts)

    def sample(self, *, step: int, position: int) -> Rollout:
        """The completions of the prompts from `position` on, without rewards yet.

        Every random number follows from (seed, step, position, sample, token).
        """
        start = time.perf_counter()
        staleness = began_before = playing = None
        if self._carry is not None:
            carried = self._carry.sample()
            chosen = [self._rows(position, 1)[0] for position in carried.positions]
            rows = [self._task.train[row] for row in chosen]
            prompts = [self._prompts[row] for row in chosen]
            sampled, staleness = carried.completions, carried.staleness
            began_before = carried.began_before
        else:
            numbers = range(position, position + self._config.prompts_per_step)
            rows, prompts = self._of_step(position)
            if self._episodes is not None:
                playing = self._play(rows, numbers, step=step)
                rows, prompts = playing.rows, playing.prompts
            sampled = self._sample_step(rows, prompts, numbers, playing, step=step)
        seconds = time.perf_counter() - start
        sampled = jax.tree.map(np.asarray, sampled)
        tokens, lengths = sampled.tokens, sampled.lengths
        with self._agreement.phase("rollout"):
            if playing is not None:
                completions = playing.completions()
            else:
                decode, groups = self._tokenizer.decode, unpad(tokens, lengths)
                completions = [[decode(ids) for ids in group] for group in groups]
        # All processes pad alike, for together their rows make one array.
        longest = meshes.gather_rows(np.array([max(map(len, prompts))])).max()
        padded, prompt_lengths = pad(
            prompts,
            length=bucket(int(longest), limit=self._limit),
            pad_id=self._tokenizer.pad_id,
        )
        finished = np.asarray(sampled.finished)
        return Rollout(
            rows=rows,
            prompts=padded,
            prompt_lengths=prompt_lengths,
            tokens=tokens,
            logp=sampled.logp,
            lengths=lengths,
            finished=finished if playing is None else finished & ~playing.is_cut(),
            mask=np.asarray(sampled.mask),
            staleness=staleness,
            began_before=began_before,
            completions=completions,
            keep=np.ones(len(lengths), bool),
            rewards=np.full(lengths.shape, np.nan),
            playing=playing,
            seconds={"time/rollout": seconds},
        )

    def _of_step(self, position: int) -> tuple[Sequence[Row], list[list[int]]]:
        """This process's rows of a step, and their prompts."""
        count = self._config.prompts_per_step
        own = self._rows(position, count)[meshes.own_share(count)]
        return [self._task.train[n] for n in own], [self._prompts[n] for n in own]

    def _play(self, rows: Sequence[Row], numbers: range, *, step: int) -> Playing:
        assert self._episodes is not None
        with self._agreement.phase("environments"):
            return self._episodes.begin(
                rows,
                step=step,
                numbers=numbers[meshes.own_share(len(numbers))],
                members=self._config.group_size,
            )

    def _sample_step(
        self,
        rows: Sequence[Row],
        prompts: list[list[int]],
        numbers: range,
        playing: Playing | None,
        *,
        step: int,
    ) -> Completions:
        config = self._config
        options: dict[str, Any] = {"turns": playing}
        if playing is None:
            options = {"ended": self._early.begin(rows, step=step)}
        return self._sampler.sample(
            meshes.gather_lists(prompts),  # each process knows its own alone
            numbers=numbers,
            key=jax.random.fold_in(jax.random.key(config.seed), step),
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            sampling=self._sampling,
            batch_size=config.rollout.slots,
            **options,
        )

    def reward(self, rollout: Rollout, *, step: int) -> Rollout:
        """The rollout with its rewards.

        ``time/reward`` is the time that passes here, after sampling.
        """
        start = time.perf_counter()
        ids = unpad(rollout.tokens, rollout.lengths)
        rows = [row for row in rollout.rows for _ in ids[0]]
        flat = rows, [*itertools.chain(*rollout.completions)], [*itertools.chain(*ids)]
        playing, played = rollout.playing, None
        if playing is not None:
            played = playing.finish()
            scores = score_episodes(self._runner, *flat, played, step=step)
            playing.close()
        else:
            scores = self._early.scores(
                rollout.rows, rollout.completions, ids, step=step
            )
            if scores is None:
                scores = score_rows(self._runner, *flat, step=step)
        seconds = rollout.seconds | {"time/reward": time.perf_counter() - start}
        scored = dataclasses.replace(rollout, playing=None, seconds=seconds)
        return with_scores(scored, scores, played)

    def close(self) -> None:
        """Stop rewarding groups of a step that was abandoned."""
        self._early.close()
