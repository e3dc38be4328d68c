"""A run that is open: its model, its files, its sampler and learner."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from grpo_jax.checkpointing.bucket import bucket_address
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import TrainConfig
from grpo_jax.environments.host import Host
from grpo_jax.models.decoder import Decoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.planning.resolve import for_updates
from grpo_jax.reporting.console import Console
from grpo_jax.reporting.equal_groups import EqualGroups
from grpo_jax.reporting.metrics import CompileCounter
from grpo_jax.reporting.tool_calls import ToolCalls
from grpo_jax.reporting.trackers import Tracker, make_tracker
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.collect import Collector
from grpo_jax.rollout.encoding import prompts_sha256
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.tasks.base import RewardFunction, Row, Task
from grpo_jax.training._announce import describe_run, warnings
from grpo_jax.training._environments import (
    EnvironmentFactory,
    Tools,
    choose_played_task,
    make_episodes,
    make_host,
)
from grpo_jax.training._fingerprint import describe_data
from grpo_jax.training._held_out import encode_held_out, held_out_rows, make_evaluation
from grpo_jax.training._manifest import Origin, Record
from grpo_jax.training._measures import Measures
from grpo_jax.training._policy import Policy, load_policy
from grpo_jax.training._preemption import GraceCheck
from grpo_jax.training._reference import References
from grpo_jax.training._repeats import Repeats
from grpo_jax.training._rewarding import make_runner
from grpo_jax.training._run_dir import open_run_dir, run_path
from grpo_jax.training.learner import Learner
from grpo_jax.weights.pretrained import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is open while a run goes on. Where the run stands is in `Progress` alone.

    Attributes:
      path: the local directory.
      place: the same, or the address in a bucket of which it is a copy.
    """

    config: TrainConfig
    task: Task
    path: Path
    place: Path | str
    agreement: Agreement
    policy: Policy
    sampler: Sampler
    collector: Collector
    evaluate: Callable[[], dict[str, float]]
    learner: Learner
    checkpoints: Checkpoints
    references: References
    record: Record
    repeats: Repeats
    tracker: Tracker
    console: Console
    measures: Measures
    # Each looks at the metrics of a step, and warns.
    checks: tuple[Callable[[int, Mapping[str, Any]], None], ...]


def open_run(
    config: TrainConfig,
    agreement: Agreement,
    stack: contextlib.ExitStack,
    *,
    dataset: Sequence[Row] | None = None,
    rewards: RewardFunction | Sequence[RewardFunction] | None = None,
    eval_dataset: Sequence[Row] | None = None,
    tools: Tools | None = None,
    environment_factory: EnvironmentFactory | None = None,
) -> Run:
    """Check all that can be checked, load the model, open what a run needs.

    Args:
      stack: closes everything again.
      dataset: this and the others as for `train`.

    Raises:
      ValueError: for bad input, and for a directory that holds another run.
    """
    with agreement.phase("start"):
        host = make_host(config, tools, environment_factory)
        if host is not None:
            stack.callback(host.close)
        task = choose_played_task(
            config,
            host,
            dataset=dataset,
            rewards=rewards,
            eval_dataset=eval_dataset,
        )
        check_name(config.model)
        mesh = meshes.make_mesh(config.mesh)
        meshes.check_processes(mesh, config.mesh.mode)
        meshes.check_batch(
            mesh,
            config.prompts_per_update,
            group_size=config.group_size,
            microbatch_size=config.microbatch_size,
            mode=config.mesh.mode,
        )
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(meshes.RULES))
        path = run_path(config.run_dir, task.name)
        held_out = held_out_rows(task, config)
        data = describe_data(task, held_out)
        origin, send = Origin(), None
        if jax.process_index() == 0:
            origin, send = stack.enter_context(open_run_dir(path, config, data))
    # Dates and commits are those of the first process.
    origin = Origin.read(meshes.gather_lists([origin.plain()])[0])
    with agreement.phase("load"):
        run, checksums = _load(
            config,
            task,
            held_out,
            mesh,
            path,
            origin,
            host=host,
            agreement=agreement,
            before_save=send,
            stack=stack,
        )
    data |= checksums | run.policy.description()
    with agreement.phase("data"):
        run.record.check(data)
    return run


def _load(
    config: TrainConfig,
    task: Task,
    held_out: Sequence[Row],
    mesh: Mesh,
    path: Path,
    origin: Origin,
    *,
    host: Host | None,
    agreement: Agreement,
    before_save: Callable[[], None] | None,
    stack: contextlib.ExitStack,
) -> tuple[Run, dict[str, str]]:
    """The open run, and the checksums of its prompts as token ids."""
    first, place = jax.process_index() == 0, bucket_address(config.run_dir) or path
    runner = make_runner(config, task, host)
    stack.callback(runner.close)
    tracker = make_tracker(config.report, path, enabled=first)
    stack.callback(tracker.close)
    console = stack.enter_context(Console(config.steps, config.report, enabled=first))
    console.phase(f"loading {config.model}")
    policy = load_policy(config, mesh, origin)
    origin = dataclasses.replace(origin, commit=policy.commit)
    record = Record(path, config.seed, mesh, origin, enabled=first)
    model = policy.model
    sampler = GroupSampler(model, mesh, max_prompt_tokens=config.max_prompt_tokens)
    shared: dict[str, Any] = {
        "sampler": sampler,
        "episodes": make_episodes(host, policy.tokenizer, model.config, config),
        "agreement": agreement,
    }
    collector = _make_collector(policy, task, runner, config, **shared)
    stack.callback(collector.close)
    prompts = encode_held_out(policy, held_out, shared["episodes"])
    asked = policy, task, held_out, prompts, runner, mesh
    evaluate = make_evaluation(*asked, announce=console.phase, **shared)
    console.note(describe_run(policy, task, mesh, place))
    for text in warnings(policy, task, plays=host is not None):
        console.warning(text)
    compiles = stack.enter_context(CompileCounter())
    scorer = Decoder(for_updates(model.config, config, mesh))
    if scorer.config.dtype != model.config.dtype:
        console.note(
            "updates compute in bfloat16, which is faster on this CPU, and the sampler "
            "in float32; sampler_logp_diff/max is their difference"
        )
    learner = Learner(scorer, policy.params, policy.config, mesh, base=policy.base)
    warn = console.warning
    saved = _open_checkpoints(config, place, warn, before_save)
    stack.callback(saved.abandon)
    run = Run(
        config=config,
        task=task,
        path=path,
        place=place,
        agreement=agreement,
        policy=policy,
        sampler=sampler,
        collector=collector,
        evaluate=evaluate,
        learner=learner,
        checkpoints=saved,
        references=References(f"{place}/references", config, report=warn),
        record=record,
        repeats=Repeats(path, report=warn, enabled=first),
        tracker=tracker,
        console=console,
        measures=Measures(model.config, config, mesh, compiles),
        checks=_checks(config, warn),
    )
    return run, {
        "prompts_sha256": collector.prompts_sha256(),
        "test_prompts_sha256": prompts_sha256(prompts),
    }


def _open_checkpoints(
    config: TrainConfig,
    place: Path | str,
    warn: Callable[[str], None],
    before_save: Callable[[], None] | None,
) -> Checkpoints:
    return Checkpoints(
        f"{place}/checkpoints", config.checkpoint, report=warn, before_save=before_save
    )


def _make_collector(
    policy: Policy,
    task: Task,
    runner: RewardRunner,
    config: TrainConfig,
    *,
    sampler: Sampler,
    **options: Any,
) -> Collector:
    model = policy.model.config
    return Collector(sampler, model, policy.tokenizer, task, runner, config, **options)


def _checks(
    config: TrainConfig, warn: Callable[[str], None]
) -> tuple[Callable[[int, Mapping[str, Any]], None], ...]:
    return (
        GraceCheck(config.checkpoint.grace_seconds, report=warn).check,
        EqualGroups(report=warn).check,
        ToolCalls(report=warn).check,
    )
