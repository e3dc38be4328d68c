"""Whole runs of a tiny model: what they leave, how they resume, what they refuse."""

import contextlib
import dataclasses
import datetime
import functools
import gc
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import yaml

from grpo_jax import per_completion, restore, train
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.checkpointing.checksum import params_sha256
from grpo_jax.config import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReportConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from grpo_jax.parallel import mesh as meshes
from grpo_jax.planning import resolve
from grpo_jax.reporting._run_files import completion_steps, read_completions
from grpo_jax.reporting.metrics import CALLS, read_metrics
from grpo_jax.reporting.trackers import _JsonlTracker
from grpo_jax.rewards._convention import RECORD_FIELDS, is_reserved_metric
from grpo_jax.rollout.collect import Collector
from grpo_jax.training._run import _checks
from grpo_jax.training._run_dir import claim, read_config
from grpo_jax.training.learner import Learner
from grpo_jax.weights.pretrained import load_pretrained, save_pretrained
from grpo_jax.weights.tokenizer import Tokenizer

PROMPT = [{"role": "user", "content": "hi"}]
ROWS = [{"prompt": f"say {i}", "wanted": "aeiou"[i % 5]} for i in range(20)]
STEPS = 4


class Interrupted(Exception):
    """Stands for a crash."""


def share(completions, wanted, **_):
    """The share of the wanted letter and of what sorts below it."""
    return [
        sum(c <= w for c in text) / max(len(text), 1)
        for text, w in zip(completions, wanted, strict=True)
    ]


def at_step(number, action):
    """The reward `share`, which does something at a step."""

    def share_(completions, wanted, trainer_state, **_):
        if trainer_state.global_step == number:
            action()
        return share(completions, wanted)

    share_.__name__ = "share"
    return share_


@contextlib.contextmanager
def disk_full_in(*steps, stop_at=None):
    """The reward `share`, in whose steps files cannot grow as on a full disk."""
    # Too large a file is then an error and no signal.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def share_(completions, wanted, trainer_state, **_):
        # Below the largest array, which no file then holds, however writes are batched.
        limit = 1 << 14 if trainer_state.global_step in steps else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if trainer_state.global_step == stop_at:
            stop()
        return share(completions, wanted)

    share_.__name__ = "share"
    try:
        yield share_
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture
def config(tiny_policy, tmp_path):
    return TrainConfig(
        model=str(tiny_policy.folder),
        run_dir=str(tmp_path / "run"),
        steps=STEPS,
        prompts_per_step=8,
        group_size=2,
        max_prompt_tokens=16,
        max_new_tokens=6,
        eval_every=2,
        eval_prompts=8,
        sampling=SamplingConfig(stop_ids=tuple(range(0, 264, 5))),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=1, keep=2),
        report=ReportConfig(completions_every=2),
    )


def run(config, reward=share, **options):
    options = {"dataset": ROWS, "eval_dataset": ROWS[:5]} | options
    return train(config, rewards=[reward], **options)


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, tmp_path_factory):
    """A run that nothing disturbs, and its result."""
    path = tmp_path_factory.mktemp("undisturbed")
    made = config.__wrapped__(tiny_policy, path)
    kept = dataclasses.replace(
        made.checkpoint, keep_best="eval/reward", best_mode="min"
    )
    made = dataclasses.replace(made, checkpoint=kept)
    return made, run(made)


def without_evaluation(config):
    plain = CheckpointConfig(every=1, keep=2)
    return dataclasses.replace(config, eval_every=0, eval_prompts=0, checkpoint=plain)


def comparable(history):
    """Metrics without times and the count of compilations."""
    free = ("time/", "tokens_per_second/", "mfu/", "compile/")
    return [
        {name: value for name, value in line.items() if not name.startswith(free)}
        for line in history
    ]


def elsewhere(config, path, **changes):
    return dataclasses.replace(config, run_dir=str(path / "other"), **changes)


def saved_steps(path):
    return sorted(int(folder.name) for folder in (path / "checkpoints").iterdir())


def manifest(result_or_path):
    return json.loads((result_or_path / "manifest.json").read_text())


def test_a_run_leaves_what_its_directory_promises(undisturbed):
    config, result = undisturbed
    path = result.run_dir
    names = {entry.name for entry in path.iterdir()}
    assert names >= {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "completions",
        "checkpoints",
        "plots",
        "export",
        "log.txt",
        "summary.json",
    }
    assert yaml.safe_load((path / "config.yaml").read_text())["steps"] == STEPS
    assert manifest(path)["status"] == "finished"
    assert manifest(path)["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert json.loads((path / "summary.json").read_text()) == result.summary
    assert (path / "plots" / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert saved_steps(path) == [2, STEPS - 1, STEPS]
    rewards = {line["step"]: line.get("eval/reward") for line in result.history}
    assert rewards[2] < rewards[4]
    told = [result.summary[f"eval_reward_{when}"] for when in ("before", "after")]
    assert told == [rewards[0], rewards[STEPS]]
    assert result.summary["accuracy_before"] is None is result.summary["accuracy_after"]


def test_a_line_tells_of_each_phase_before_the_first_step(undisturbed):
    config, result = undisturbed
    log = (result.run_dir / "log.txt").read_text()
    told = [
        f"INFO loading {config.model}\n",
        "INFO compiling, then evaluating 5 held-out prompts\n",
        "INFO step 0/",
        "INFO compiling, then sampling\n",
        "INFO compiling, then scoring and rewards\n",
        "INFO compiling, then updating\n",
        "INFO step 1/",
        "INFO step 2/",
    ]
    places = [log.index(text) for text in told]
    assert places == sorted(places)
    # Later steps take no time that would have to be explained.
    assert log.count("compiling, then updating") == 1


def test_a_line_says_what_runs_where(undisturbed):
    config, result = undisturbed
    first = (result.run_dir / "log.txt").read_text().splitlines()[1]
    assert f"{config.model}, 0.024M parameters, on 8 x cpu; dataset, 20 rows" in first
    assert "8 prompts x 2 completions of up to 6 tokens; in " in first


def test_metrics_have_one_line_per_step(undisturbed):
    _, result = undisturbed
    history = read_metrics(result.run_dir)
    assert [line["step"] for line in history] == list(range(STEPS + 1))
    assert "eval/reward" in history[0] and "loss" not in history[0]
    for line in history[1:]:
        assert line["update_skipped"] == 0.0 and line["grad_norm"] > 0.0
        assert line["sampler_logp_diff/max"] < 1e-4
        assert line["learning_rate"] == pytest.approx(1e-2)
        assert line["reward"] == pytest.approx(line["rewards/share/mean"])
        assert ("eval/reward" in line) == (line["step"] % 2 == 0)
        for phase in ("rollout", "score", "update", "step"):
            assert line[f"mfu/{phase}"] > 0.0
    assert history == result.history
    # The reference is the policy at first, and no more after an update.
    assert history[1]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert history[2]["kl"] > 1e-6


def test_reward_functions_can_log_under_no_name_of_the_run(undisturbed):
    _, result = undisturbed
    names = {name for line in result.history for name in line}
    assert [name for name in names if not is_reserved_metric(name)] == []
    assert read_completions(result.run_dir, 2)[0].keys() < RECORD_FIELDS


def test_completions_are_written_with_their_rewards_and_advantages(undisturbed):
    _, result = undisturbed
    folder = result.run_dir / "completions"
    assert len(list(folder.iterdir())) == 3  # step 1, and every second
    rows = read_completions(result.run_dir, 2)
    assert len(rows) == 16
    advantages = np.array([row["advantage"] for row in rows]).reshape(8, 2)
    np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-5)
    for row in rows:
        assert row["step"] == 2 and row["prompt"] in [r["prompt"] for r in ROWS]
        assert row["rewards"] == {"share": row["reward"]}
        assert 1 <= row["length"] <= 6 and isinstance(row["finished"], bool)


def test_the_export_is_the_trained_model(undisturbed):
    _, result = undisturbed
    exported = load_pretrained(result.run_dir / "export")
    told = json.loads((result.run_dir / "export/generation_config.json").read_text())
    assert told["eos_token_id"] == list(range(0, 264, 5)) and told["do_sample"]
    assert params_sha256(exported.params) == result.summary["params_sha256"]
    assert params_sha256(result.params) == result.summary["params_sha256"]


def test_training_moved_every_parameter(undisturbed, tiny_policy):
    _, result = undisturbed
    for old, new in zip(
        jax.tree.leaves(tiny_policy.params), jax.tree.leaves(result.params), strict=True
    ):
        assert (np.asarray(old) != np.asarray(new)).any()


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise Interrupted


@pytest.mark.parametrize(("how", "step"), [("stopped", 1), ("crashed", 3)])
def test_an_interrupted_run_ends_in_the_same_bits(how, step, undisturbed, tmp_path):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)
    path = tmp_path / "other"
    if how == "stopped":
        halted = run(config, at_step(step, stop))
        assert halted.summary["status"] == "preempted"
        assert halted.summary["steps"] == step - 1
        assert manifest(path)["status"] == "preempted"
        assert not (path / "summary.json").exists()
    else:
        with pytest.raises(RuntimeError, match="reward function 'share' failed"):
            run(config, at_step(step, crash))
        assert manifest(path)["status"] == "failed"
    resumed = run(config)
    assert manifest(path)["status"] == "finished"
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]
    assert comparable(resumed.history) == comparable(result.history)
    # The stop saved step 0, which no reward has spoiled yet.
    best = 0 if how == "stopped" else 2
    assert saved_steps(path) == [best, STEPS - 1, STEPS]


@pytest.fixture(scope="module")
def carried(tiny_policy, tmp_path_factory):
    """An undisturbed run whose completions continue in the next step."""
    path = tmp_path_factory.mktemp("carried")
    made = without_evaluation(config.__wrapped__(tiny_policy, path))
    made = dataclasses.replace(
        made,
        rollout=RolloutConfig(carry_over=True, slots=16, max_staleness=2),
        updates_per_rollout=2,
    )
    return made, run(made)


@pytest.mark.parametrize(
    ("how", "step"), [("stopped", 1), ("stopped", 3), ("crashed", 3)]
)
def test_a_run_with_carry_over_ends_in_the_same_bits(how, step, carried, tmp_path):
    config, result = carried
    config = elsewhere(config, tmp_path)
    if how == "stopped":
        assert run(config, at_step(step, stop)).summary["steps"] == step - 1
    else:
        with pytest.raises(RuntimeError, match="reward function 'share' failed"):
            run(config, at_step(step, crash))
    resumed = run(config)
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]
    assert comparable(resumed.history) == comparable(result.history)


def test_carry_over_learns_from_stale_tokens_by_their_ratio(carried):
    _, result = carried
    assert result.history[0]["rollout/staleness"] == 0.0
    assert 0.0 < result.history[-1]["rollout/staleness"] <= 2.0
    assert result.history[-1]["rollout/staleness/max"] in (1.0, 2.0)
    assert 0.0 < result.history[-1]["rollout/carried"] <= 1.0
    for line in result.history:
        # Of tokens of which all that counts is of the present policy.
        assert line["sampler_logp_diff/max"] < 1e-4
    assert result.history[-1]["importance_ratio/mean"] != 1.0


def test_more_steps_with_carry_over_end_in_the_bits_of_a_longer_run(carried, tmp_path):
    config, result = carried
    config = elsewhere(config, tmp_path)
    run(dataclasses.replace(config, steps=2))
    longer = run(config)
    assert longer.summary["params_sha256"] == result.summary["params_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"max_staleness": 0}}, "max_staleness must be at least 1"),
        ({"objective": {"resample_limit": 2}}, "resample_limit must be 0 with"),
        ({"objective": {"sampler_correction_cap": 2.0}}, "must be null with rollout"),
    ],
)
def test_carry_over_is_refused_beside_what_it_cannot_serve(changes, message, config):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            config,
            rollout=RolloutConfig(carry_over=True, **changes.get("rollout", {})),
            objective=ObjectiveConfig(**changes.get("objective", {})),
        )


def test_a_finished_run_that_is_started_again_changes_nothing(undisturbed):
    config, result = undisturbed
    kept = [result.run_dir / name for name in ("metrics.jsonl", "summary.json")]
    before = [file.read_bytes() for file in kept]
    again = run(config)
    assert [file.read_bytes() for file in kept] == before
    assert again.summary == result.summary
    assert "nothing is left to train" in (result.run_dir / "log.txt").read_text()


def test_what_is_saved_is_where_the_run_stands(config, tmp_path, monkeypatch):
    seen = []
    save = Checkpoints.save

    def spy(self, step, state, meta, **options):
        seen.append(meta["progress"])
        save(self, step, state, meta, **options)

    monkeypatch.setattr(Checkpoints, "save", spy)
    leftover = tmp_path / "run" / ".export-x.grpo-jax-unfinished"  # of a killed export
    (leftover / "new").mkdir(parents=True)
    halted = run(config, at_step(3, stop))
    assert not leftover.exists()
    assert seen[-1]["step"] == 2
    assert seen[-1]["seconds"] == halted.summary["seconds"]
    ended = run(config)
    assert seen[-1]["seconds"] == ended.summary["seconds"]
    assert [p["step"] for p in seen] == [1, 2, 3, 4]
    # Each step takes its time, on whichever side of a stop.
    seconds = [p["seconds"] for p in seen]
    assert seconds == sorted(set(seconds))
    spent = [line["time/step"] for line in ended.history[1:]]
    assert all(
        after - before >= took
        for before, after, took in zip(seconds, seconds[1:], spent[1:], strict=False)
    )


def test_more_steps_end_in_the_bits_of_a_run_that_had_them_from_the_start(
    undisturbed, tmp_path
):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)
    shorter = run(dataclasses.replace(config, steps=2))
    assert shorter.summary["steps"] == 2
    summaries = []

    def look():
        summaries.append((shorter.run_dir / "summary.json").exists())

    longer = run(config, at_step(3, look))
    assert summaries == [False]  # the page would show it as that of the longer run
    assert longer.summary["params_sha256"] == result.summary["params_sha256"]
    assert comparable(longer.history) == comparable(result.history)
    assert read_config(longer.run_dir).steps == STEPS


def test_fewer_steps_end_a_stopped_run_with_numbers_of_its_end(undisturbed, tmp_path):
    config, result = undisturbed
    config = elsewhere(config, tmp_path, eval_every=3)
    halted = run(config, at_step(3, stop))
    assert halted.summary["steps"] == 2 and read_config(halted.run_dir).steps == STEPS
    ended = run(dataclasses.replace(config, steps=2))
    assert ended.summary["status"] == "finished"
    # No step of this run was evaluated so far: its end is, once it is one.
    expected = result.history[2]["eval/reward"]
    assert ended.summary["eval_reward_after"] == pytest.approx(expected)


def test_a_run_stopped_before_its_first_step_and_evaluation_can_resume(
    undisturbed, tmp_path
):
    config, result = undisturbed
    config = elsewhere(without_evaluation(config), tmp_path)
    rarely = dataclasses.replace(config, report=ReportConfig(completions_every=100))
    halted = run(rarely, at_step(1, stop))
    assert halted.summary["status"] == "preempted" and halted.history == []
    resumed = run(rarely)
    assert completion_steps(resumed.run_dir) == [1, STEPS]
    assert [line["step"] for line in resumed.history] == [1, 2, 3, 4]
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]


def test_a_damaged_checkpoint_costs_steps_but_no_bits(undisturbed, tmp_path):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)
    run(config, at_step(4, stop))
    for file in (tmp_path / "other" / "checkpoints" / "3" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    resumed = run(config)
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]
    assert comparable(resumed.history) == comparable(result.history)
    assert "checkpoint 3 is damaged" in (tmp_path / "other" / "log.txt").read_text()


def test_a_disk_that_is_full_for_a_while_costs_saves_and_no_bits(undisturbed, tmp_path):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)
    with disk_full_in(2, 3) as share_:
        full = run(config, share_)
    assert full.summary["params_sha256"] == result.summary["params_sha256"]
    assert comparable(full.history) == comparable(result.history)
    # Saves run beside the steps: which ones meet the full disk is a matter of speed.
    log = (full.run_dir / "log.txt").read_text()
    lost = set(map(int, re.findall(r"checkpoint (\d) could not be saved", log)))
    assert lost and lost.isdisjoint(saved_steps(full.run_dir))
    assert STEPS in saved_steps(full.run_dir)


def test_a_checkpoint_waits_for_a_reference_that_could_not_be_saved(
    undisturbed, tmp_path
):
    config, _ = undisturbed
    objective = ObjectiveConfig(kl_coef=0.5, reference_every=2)
    config = dataclasses.replace(without_evaluation(config), objective=objective)
    whole = run(elsewhere(config, tmp_path / "whole"))
    config = elsewhere(config, tmp_path / "full")
    with disk_full_in(2, stop_at=4) as share_:  # the reference is made in step 2
        stopped = run(config, share_)
    log = (stopped.run_dir / "log.txt").read_text()
    assert "the reference's checkpoint 2 could not be saved" in log
    assert saved_steps(stopped.run_dir)[-1] == 3
    assert comparable(run(config).history) == comparable(whole.history)


def test_a_resumed_run_holds_no_more_arrays_than_one_that_was_not_stopped(
    undisturbed, tmp_path, tiny_policy
):
    config, _ = undisturbed
    config = elsewhere(without_evaluation(config), tmp_path / "stopped")
    run(config, at_step(2, stop))
    held = []

    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def weigh():
        held.append(live_bytes() - before)

    for each in config, elsewhere(config, tmp_path / "fresh"):
        before = live_bytes()
        run(each, at_step(STEPS, weigh))
    resumed, fresh = held
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_policy.params))
    assert resumed - fresh < parameters / 4


def test_a_renewed_reference_survives_a_stop(undisturbed, tmp_path):
    config, _ = undisturbed
    objective = ObjectiveConfig(kl_coef=0.5, reference_every=2)
    config = dataclasses.replace(without_evaluation(config), objective=objective)
    whole = run(elsewhere(config, tmp_path / "whole"))
    kl = [line["kl"] for line in whole.history]
    # Steps 1 and 3 begin with a reference that is the policy.
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[1] > 1e-6
    assert kl[2] == pytest.approx(0.0, abs=1e-6) and kl[3] > 1e-6
    config = elsewhere(config, tmp_path / "stopped")
    run(config, at_step(3, stop))
    resumed = run(config)
    assert comparable(resumed.history) == comparable(whole.history)


def changed_share(completions, wanted, **_):
    return share(completions, wanted)


@pytest.mark.parametrize(("name", "told"), [("share", "share"), ("x", "share, x")])
def test_other_reward_functions_are_told_and_the_run_goes_on(
    name, told, undisturbed, tmp_path, monkeypatch
):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)
    run(dataclasses.replace(config, steps=2))
    monkeypatch.setattr(changed_share, "__name__", name)
    resumed = run(config, changed_share)
    log = (resumed.run_dir / "log.txt").read_text()
    assert f"other reward functions than before: {told}\n" in log
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]
    assert "than before" not in (result.run_dir / "log.txt").read_text()


def test_another_configuration_is_refused_with_the_differing_fields(undisturbed):
    config, result = undisturbed
    other = dataclasses.replace(
        config, seed=5, optimizer=OptimizerConfig(learning_rate=0.5)
    )
    with pytest.raises(
        ValueError, match=r"optimizer\.learning_rate: 0\.01 and 0\.5\n  seed: 0 and 5"
    ):
        run(other)
    assert manifest(result.run_dir)["status"] == "finished"


def test_other_rows_are_refused_too(undisturbed):
    config, result = undisturbed
    with pytest.raises(ValueError, match=r"rows: 20 and 19\n  rows_sha256: '\w{12}'"):
        run(config, dataset=ROWS[1:])
    edited = [*ROWS[:7], ROWS[7] | {"wanted": "z"}, *ROWS[8:]]
    with pytest.raises(
        ValueError, match=r"configuration .*\n  rows_sha256: .*\n.*in the same order"
    ):
        run(config, dataset=edited)
    assert manifest(result.run_dir)["status"] == "finished"


def test_other_held_out_rows_are_refused(undisturbed):
    config, result = undisturbed
    with pytest.raises(ValueError, match=r"test_rows: 5 and 6\n  test_rows_sha256"):
        run(config, eval_dataset=ROWS[:6])
    assert manifest(result.run_dir)["status"] == "finished"


def copied(tiny_policy, folder):
    """The tiny model with a chat template, which is read from a file of its own."""
    shutil.copytree(tiny_policy.folder, folder)
    (folder / "chat_template.jinja").write_text(
        '{{ strftime_now("%S %f") }}'
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    return str(folder)


def scale_weights(folder):
    loaded = load_pretrained(folder)
    changed = loaded.params | {
        "final_norm": jax.tree.map(lambda w: w * 2, loaded.params["final_norm"])
    }
    save_pretrained(folder, dataclasses.replace(loaded, params=changed))


def change_file(name, old, new):
    def change(folder):
        file = folder / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            scale_weights,
            r"began with another model.*\n  weights.final_norm/scale: '\w{8}'",
        ),
        (
            change_file("config.json", '"rope_theta": 1000.0', '"rope_theta": 999.0'),
            "another model.*\n  model_config.rope: .*1000.0.* and .*999.0",
        ),
        (
            change_file("chat_template.jinja", "{% for", "-{% for"),
            "other prompts .*\n  prompts_sha256: .*\n  test_prompts_sha256: ",
        ),
    ],
)
def test_another_model_and_other_prompts_are_refused(
    change, told, config, tiny_policy, tmp_path
):
    model = copied(tiny_policy, tmp_path / "model")
    config = dataclasses.replace(config, model=model)
    halted = run(config, at_step(1, stop))
    began = manifest(halted.run_dir)["started"]
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=told):
        run(config)
    assert manifest(halted.run_dir)["status"] == "preempted"
    # Another day changes nothing: the date that the template sees is the run's.
    assert began == manifest(halted.run_dir)["started"]


def test_a_template_sees_the_date_of_the_run(config, tiny_policy, tmp_path):
    model = copied(tiny_policy, tmp_path / "model")
    config = dataclasses.replace(config, model=model, steps=2)
    run(config, at_step(2, stop))
    resumed = run(config)
    path = resumed.run_dir
    assert "resumed from step 1" in (path / "log.txt").read_text()
    started = datetime.datetime.fromisoformat(manifest(path)["started"])
    text = resumed.tokenizer.decode(resumed.tokenizer.encode_prompt(PROMPT))
    assert text == f"{started:%S} 000000hi"
    restored = restore(path).tokenizer
    assert restored.decode(restored.encode_prompt(PROMPT)) == text


def test_two_runs_in_one_directory_are_refused(config, tmp_path):
    with claim(tmp_path / "run"), pytest.raises(ValueError, match="in use by another"):
        run(config)


def test_rewards_of_a_wrong_length_are_refused_and_nothing_is_lost(
    undisturbed, tmp_path
):
    config, result = undisturbed
    config = elsewhere(config, tmp_path)

    def share(completions, wanted, trainer_state, **_):
        values = globals()["share"](completions, wanted)
        return values[:-1] if trainer_state.global_step == 3 else values

    with pytest.raises(ValueError, match="'share' .*15.*16"):
        run(config, share)
    assert [int(p.name) for p in (tmp_path / "other" / "checkpoints").iterdir()] != []
    resumed = run(config)
    assert resumed.summary["params_sha256"] == result.summary["params_sha256"]


def test_a_reward_of_each_completion_changes_no_number_of_the_run(
    undisturbed, tmp_path
):
    config, result = undisturbed
    calls = []

    def share_(completions, wanted):
        calls.append(threading.current_thread().name)
        return share(completions, wanted)

    share_.__name__ = "share"
    early = run(elsewhere(config, tmp_path), per_completion(share_))
    # Groups in another thread; held-out rows, two times and before the first step.
    assert calls.count("rewards") == STEPS * config.prompts_per_step
    assert len(calls) > calls.count("rewards")
    assert early.summary["params_sha256"] == result.summary["params_sha256"]
    own = ("time/", "compile/", "tokens_per_second/", "mfu/")
    for one, other in zip(early.history, result.history, strict=True):
        assert one.keys() == other.keys()
        for name in other.keys() - {k for k in other if k.startswith(own)}:
            assert one[name] == other[name], name


def test_a_failing_reward_of_each_completion_ends_the_run(undisturbed, tmp_path):
    config, _ = undisturbed

    def share_(completions, wanted, trainer_state):
        if trainer_state.global_step == 3:
            raise KeyError("no such answer")
        return share(completions, wanted)

    told = []
    for mark in (lambda function: function, per_completion):
        config = elsewhere(config, tmp_path / str(len(told)))
        with pytest.raises(RuntimeError, match="'share_' failed: ") as raised:
            run(config, mark(share_))
        told.append(str(raised.value))
        left = manifest(pathlib.Path(config.run_dir))
        assert (left["status"], left["step"]) == ("failed", 3)
        assert not [t for t in threading.enumerate() if t.name == "rewards"]
    assert told[0] == told[1]


@pytest.mark.parametrize("config", ["embedded", {"steps": 1}, {}, 3, TrainConfig])
def test_a_run_is_described_by_a_configuration(config):
    with pytest.raises(ValueError, match="config must be a TrainConfig, got "):
        train(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": None, "dataset": ROWS}, "a dataset needs rewards"),
        ({"eval_dataset": ROWS}, "eval_dataset needs a dataset"),
        ({"rewards": share, "dataset": []}, "are empty"),
        ({"rewards": share, "dataset": [{"prompt": "x"}]}, "needs wanted"),
        (
            {"rewards": share, "dataset": ROWS, "eval_dataset": [{"prompt": "x"}]},
            "'share' needs wanted, which the held-out rows do not have",
        ),
        (
            {"rewards": share, "dataset": [{"prompt": "x" * 17, "wanted": "a"}]},
            "row 0 has 17 tokens",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(config, options, message):
    with pytest.raises(ValueError, match=message):
        train(config, **options)


def test_prompts_that_the_mesh_does_not_divide_are_refused(config):
    config = dataclasses.replace(config, prompts_per_step=12)
    with pytest.raises(ValueError, match="12 prompts per update.* use 16"):
        run(config)


def test_updates_that_are_not_finite_stop_the_run(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, steps=20, eval_prompts=0)
    with_advantages = Learner.with_advantages
    calls = []

    def poisoned(self, batch, rollout):
        calls.append(1)
        batch = with_advantages(self, batch, rollout)
        if len(calls) <= 2:
            return batch
        return batch.replace(advantages=batch.advantages * np.nan)

    monkeypatch.setattr(Learner, "with_advantages", poisoned)
    with pytest.raises(FloatingPointError, match="step 7: 5 updates in a row.*nan"):
        run(config)
    path = tmp_path / "run"
    history = read_metrics(path)
    # The step that ended the run is logged as well, with what it sampled.
    assert [line["update_skipped"] for line in history] == [0, 0, 1, 1, 1, 1, 1]
    assert completion_steps(path)[-1] == 7
    assert manifest(path)["status"] == "failed"
    log = (path / "log.txt").read_text()
    assert "step 3: loss nan" in log
    # Skipped updates leave the parameters of step 2 as they are.
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
    _, params, meta = checkpoints.restore_params()
    assert meta["progress"]["skipped"] == 4
    monkeypatch.undo()
    two = run(elsewhere(config, tmp_path), at_step(3, stop))
    assert params_sha256(params) == two.summary["params_sha256"]


def test_any_sampler_serves_a_run_with_weights_from_update_to_release(
    config, fake_sampler, monkeypatch
):
    sampler = fake_sampler(lambda number, sample: f"{number}{sample}")
    monkeypatch.setattr(
        "grpo_jax.training._run.GroupSampler", lambda *_, **options: sampler
    )
    update, held = Learner.update, []

    def observed(learner, batch):
        held.append(sampler.variables)
        return update(learner, batch)

    monkeypatch.setattr(Learner, "update", observed)
    result = run(dataclasses.replace(config, steps=2))
    # An evaluation at the start, two steps, an evaluation at the end.
    assert sampler.versions == [0, 0, 1, 2]
    # A copy for sampling does not take memory of the update.
    assert held == [None, None] and sampler.variables is None
    (*_, last) = read_completions(result.run_dir, 2)
    assert last["completion"] == "151" and last["length"] == 3


@pytest.mark.parametrize("failing", ["evaluation", "rollout", "resampling"])
def test_a_failure_while_sampling_leaves_no_weights_in_the_sampler(
    failing, config, fake_sampler, monkeypatch
):
    def script(number, sample):
        assert sampler.variables is not None
        raise Interrupted

    sampler = fake_sampler(script)
    monkeypatch.setattr(
        "grpo_jax.training._run.GroupSampler", lambda *_, **options: sampler
    )
    if failing != "evaluation":
        config = without_evaluation(config)
    if failing == "resampling":
        config = dataclasses.replace(config, objective=ObjectiveConfig.preset("dapo"))
    with pytest.raises(Interrupted):
        run(config)
    assert set(sampler.versions) == {0} and sampler.variables is None


@pytest.mark.parametrize(
    ("failing", "step"), [("sample", 1), ("update", 2), ("log", 2), ("save", 2)]
)
def test_a_failed_run_records_the_step_that_failed(failing, step, config, monkeypatch):
    places = {
        "sample": (Collector, "sample"),
        "update": (Learner, "update"),
        "log": (_JsonlTracker, "log_completions"),
        "save": (Checkpoints, "save"),
    }
    owner, name = places[failing]
    calls, real = [], vars(owner)[name]

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == step:
            raise Interrupted
        return real(*args, **options)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(Interrupted):
        run(without_evaluation(config))
    there = manifest(pathlib.Path(config.run_dir))
    assert (there["status"], there["step"]) == ("failed", step)
    # Its software and hardware are those of the run from its beginning.
    assert [part["step"] for part in there["parts"]] == [0]
    monkeypatch.undo()
    run(without_evaluation(config))
    there = manifest(pathlib.Path(config.run_dir))
    assert (there["status"], there["step"]) == ("finished", STEPS)


def test_held_out_prompts_are_encoded_once(config, monkeypatch):
    encoded = []
    encode = Tokenizer.encode_prompts

    def counted(tokenizer, prompts):
        encoded.extend(prompts)
        return encode(tokenizer, prompts)

    monkeypatch.setattr(Tokenizer, "encode_prompts", counted)
    held_out = [{"prompt": f"held out {i}", "wanted": "a"} for i in range(3)]
    run(dataclasses.replace(config, steps=1), eval_dataset=held_out)
    assert [encoded.count(row["prompt"]) for row in held_out] == [1, 1, 1]


def test_a_run_whose_rewards_never_differ_ends_by_saying_so(config, undisturbed):
    config = dataclasses.replace(without_evaluation(config), steps=1)
    result = run(config, lambda completions, **_: [0.25] * len(completions))
    last = (result.run_dir / "log.txt").read_text().splitlines()[-1]
    assert "in none of the 1 steps did rewards differ" in last and "0.25" in last
    assert "did rewards differ" not in (undisturbed[1].run_dir / "log.txt").read_text()


def test_dynamic_sampling_advances_by_what_it_drew(config, tmp_path):
    def sometimes(completions, wanted, **_):
        """Only prompts of the letters a and e tell completions apart."""
        return [float(i % 2) if w in "ae" else 0.0 for i, w in enumerate(wanted)]

    objective = ObjectiveConfig.preset("dapo")
    config = dataclasses.replace(config, objective=objective, eval_prompts=0, steps=2)
    result = run(config, sometimes)
    # Two letters in five: eight such prompts are found among the next three rollouts.
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config.checkpoint)
    _, _, meta = checkpoints.restore_params()
    position = meta["progress"]["position"]
    assert position % 8 == 0 and 40 <= position <= 48
    for line in result.history:
        assert line["kept/frac_reward_zero_std"] == 0.0
        # Of all that was sampled, a part of which is given up again.
        assert 0.0 < line["frac_reward_zero_std"] < 1.0
        assert line["rewards/sometimes/mean"] == pytest.approx(line["reward"])
        assert line["reward"] < line["kept/reward"] == pytest.approx(0.5)
        assert "kl" not in line
        assert all(map(is_reserved_metric, line))


@pytest.mark.parametrize("none", ["eval_every", "eval_prompts"])
def test_no_evaluation_is_none_at_the_start_and_at_the_end_either(config, none):
    plain = dataclasses.replace(config.checkpoint, keep_best=None)
    given = {"eval_every": 2, "eval_prompts": 8, "steps": 2, none: 0}
    result = run(dataclasses.replace(config, checkpoint=plain, **given))
    assert len(result.history) == 2
    assert not [name for line in result.history for name in line if "eval" in name]
    measured = ("accuracy", "eval_reward")
    for name in (f"{what}_{when}" for what in measured for when in ("before", "after")):
        assert result.summary[name] is None


def test_a_run_looks_whether_its_policy_has_stopped_to_call_tools():
    told = []
    checks = _checks(TrainConfig(), told.append)
    for step, calls in enumerate((0.5, 0.0), start=1):
        for check in checks:
            check(step, {CALLS: calls})
    (text,) = told
    assert text.startswith("step 2: no completion called a tool")


def test_a_cpu_with_fast_bfloat16_learns_in_it_and_samples_in_float32(
    config, monkeypatch
):
    monkeypatch.setattr(resolve, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(resolve, "_LARGE", 0)
    one = functools.partial(meshes.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", one)
    result = run(dataclasses.replace(without_evaluation(config), steps=1))
    # As far apart as bfloat16 rounds.
    assert 1e-4 < result.history[0]["sampler_logp_diff/max"] < 0.1
    log = (result.run_dir / "log.txt").read_text()
    assert "updates compute in bfloat16" in log
