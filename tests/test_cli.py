"""The command line: what flags mean, what newcomers read, what each command does."""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types
import typing
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import yaml

import grpo_jax
from grpo_jax import cli
from grpo_jax.checkpointing.checkpoints import Checkpoints
from grpo_jax.config import (
    CheckpointConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from grpo_jax.config.files import to_json_line
from grpo_jax.config.validation import to_dict
from grpo_jax.reporting.console import next_commands
from grpo_jax.training import _run_dir as directories
from grpo_jax.training.state import TrainState, state_items
from grpo_jax.weights.pretrained import load_pretrained

COMMANDS = ("train", "plan", "eval", "sample", "chat", "export", "plot", "report")


def run_main(monkeypatch, *arguments):
    """The exit status of the program, run here; 0 if it returns."""
    monkeypatch.setattr("sys.argv", ["grpo-jax", *map(str, arguments)])
    # Chosen by the user, so that the program leaves the environment as it is.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "chosen")
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def run_of(arguments):
    """The run that `train` would start."""
    given = {}
    spy = functools.wraps(cli._train)(lambda **named: given.update(named))
    with mock.patch.object(cli, "_train", spy):
        cli._dispatch(["train", *arguments])
    return given["run"]


def help_of(*arguments):
    """What `--help` prints, one line per panel row, frames taken off."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli._dispatch([*arguments, "--help"])
    assert end.value.code == 0
    return out.getvalue()


def words(text):
    """The text without frames and line breaks."""
    return " ".join(re.sub(r"[─-╿]", " ", text).split())


def helps(text):
    """Flag -> its help text, from one column of `--help`."""
    lines = [re.sub(r"[─-╿]", " ", line).strip() for line in text.splitlines()]
    body = " ".join(lines[next(i for i, x in enumerate(lines) if "--help" in x) :])
    parts = re.split(
        r"(?:^| )(--[a-z][\w.-]*)(?:, --[\w.-]+)? ", " ".join(body.split())
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# --- Flags of `train`


def test_without_flags_the_run_is_the_default():
    assert run_of([]) == TrainConfig()


def test_another_model_brings_its_own_defaults():
    assert run_of(["--model", "a/b"]) == TrainConfig(model="a/b")
    assert run_of(["--model=a/b"]).optimizer.learning_rate == 1e-6


def test_flags_reach_every_kind_of_field():
    config = run_of(
        "--steps 9 --mesh.fsdp -1 --mesh.data 2 --lora.rank 4 --lora.targets q v "
        "--report.tensorboard --rewards.weights 1 0.5 --sampling.stop-ids 3 4 "
        "--objective.kl-coef 0 --optimizer.learning-rate 1e-5 --run-dir runs/x "
        "--objective.dual-clip 3 --max_new_tokens 5 --rewards.no-isolate".split()
    )
    assert (config.steps, config.max_new_tokens, config.run_dir) == (9, 5, "runs/x")
    assert (config.mesh.data, config.mesh.fsdp) == (2, -1)
    assert (config.lora.rank, config.lora.targets) == (4, ("q", "v"))
    assert config.report.tensorboard and not config.rewards.isolate
    assert config.rewards.weights == (1.0, 0.5)
    assert config.sampling.stop_ids == (3, 4)
    assert config.objective == ObjectiveConfig(kl_coef=0, dual_clip=3)
    # One flag of a section leaves the model's other defaults alone.
    assert config.optimizer == OptimizerConfig(learning_rate=1e-5, warmup_steps=10)


def test_flags_override_the_preset_which_overrides_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "group_size: 4\nobjective: {clip_high: 0.5, entropy_coef: 0.1}\nseed: 7\n"
    )
    config = run_of(["--config", str(file)])
    assert config.objective == ObjectiveConfig(clip_high=0.5, entropy_coef=0.1)
    preset = ["--config", str(file), "--objective.preset", "dapo"]
    config = run_of(preset)
    assert config.objective == ObjectiveConfig.preset("dapo")
    assert (config.group_size, config.seed) == (4, 7)
    flags = [*preset, "--objective.clip-high", "0.3", "--group-size", "6"]
    # The order of flags does not matter.
    for arguments in (flags, flags[4:] + flags[:4]):
        config = run_of(arguments)
        dapo = ObjectiveConfig.preset("dapo")
        assert config.objective == dataclasses.replace(dapo, clip_high=0.3)
        assert (config.group_size, config.seed) == (6, 7)


def test_another_model_than_the_file_names_keeps_what_the_file_says(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: a/b\nsteps: 11\n")
    config = run_of(["--config", str(file)])
    assert config == TrainConfig(model="a/b", steps=11)
    config = run_of(["--config", str(file), "--model", "embedded"])
    assert config == TrainConfig(steps=11)
    assert config.max_new_tokens == 8


def test_a_saved_run_is_described_again_by_its_file(tmp_path):
    config = TrainConfig(
        model="a/b",
        objective=ObjectiveConfig.preset("gspo"),
        optimizer=OptimizerConfig(learning_rate=1e-6, max_grad_norm=None),
    )
    directories.check_config(tmp_path, config)
    assert run_of(["--config", str(tmp_path / "config.yaml")]) == config


# --- Bad input


def failing(monkeypatch, capsys, *arguments):
    """The message of a program that must end with status 2."""
    assert run_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train --num-generations 8", "num_generations is --group-size here"),
        ("train --beta=0 --max_steps 3", "beta is --objective.kl-coef here; max_steps"),
        ("train --stepz 3", "Unrecognized options: --stepz|Perhaps you meant: --steps"),
        ("train --objective.klcoef 1", "Perhaps you meant: --objective.kl-coef"),
        ("train --steps ten", "Error parsing --steps: invalid literal|'ten'"),
        ("train --steps 0", "steps must be an integer from 1 on, got 0"),
        ("train --remat full", "--remat"),
        ("train --group-size 1", "group_size must be at least 2, got 1"),
        ("train --optimizer.learning-rate nan", "positive number, got nan"),
        ("trian", "Available subcommands: train, plan, eval"),
        ("", "Expected one of {train, plan, eval, sample, chat, export, plot, report}"),
        ("eval --sampels 3", "Perhaps you meant: --samples"),
        ("sample", "Missing from grpo-jax sample: --prompt STR"),
        ("report", "Missing from grpo-jax report"),
    ],
)
def test_flags_that_do_not_parse_say_what_would(monkeypatch, capsys, arguments, told):
    message = words(failing(monkeypatch, capsys, *arguments.split()))
    assert all(part in message for part in told.split("|")), message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train --config {tmp}/none.yaml", "none.yaml cannot be read as YAML"),
        ("train --objective.preset ppo", "'ppo' is unknown; use one of softmax"),
        ("train --model {tmp}/no.gguf --run-dir {tmp}/run", "no such file or folder"),
        ("train --task gsm9k --run-dir {tmp}/run", "Did you mean 'gsm8k'?"),
        ("train --mesh.data 3 --run-dir {tmp}/run", "does not fit 8 devices"),
        ("eval", "give either --run-dir or --model"),
        ("eval --run-dir {tmp} --model embedded", "give either --run-dir or --model"),
        ("eval --run-dir {tmp}", "holds no run"),
        ("eval --model {tmp}/none", "no such file or folder"),
        ("eval --model embedded --samples 0", "--samples must be at least 1, got 0"),
        ("eval --model embedded --prompts 0", "--prompts must be at least 1"),
        ("eval --model {tiny} --temperature -1", "sampling.temperature"),
        ("sample --prompt 1+1= --max-new-tokens 0", "--max-new-tokens must be at"),
        ("sample --prompt 1+1= --run-dir {tmp}", "holds no run"),
        ("sample --prompt 1 --run-dir {tmp} --model a", "give either --run-dir or"),
        ("train --tools none.py:f", "--tools none.py:f: there is no file"),
        ("train --environment json:x", "--environment json:x: json has no 'x'"),
        ("eval --model {tiny} --tools json", "--tools json: expected package.module"),
        (
            "sample --prompt a --environment json:__doc__",
            "expected a class, a function",
        ),
        ("chat --run-dir {tmp}", "holds no run"),
        ("chat --prompt a", "--prompt and --row are of an episode"),
        ("chat --environment json:loads --row [1]", "--row must be a JSON object"),
        ("chat --environment json:loads --row a", "--row is no JSON (Expecting"),
        ("chat --tools json:dumps --max-new-tokens 0", "--max-new-tokens must be at"),
        ("export --run-dir {tmp}", "holds no run"),
        ("plot", "needs at least one run directory"),
        ("plot {tmp}", "has no metrics.jsonl; give the directory of a run"),
        ("report {tmp}", "has no metrics.jsonl"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(
    monkeypatch, capsys, tmp_path, tiny_policy, arguments, told
):
    filled = arguments.format(tmp=tmp_path, tiny=tiny_policy.folder)
    message = failing(monkeypatch, capsys, *filled.split())
    assert message.startswith("error: ") and message.count("\n") == 1
    assert told in message


@pytest.mark.parametrize(
    "arguments",
    [
        "train --task {rows} --run-dir {tmp}/run --prompts-per-step 8 --group-size 2",
        "eval --task {rows}",
        "sample --prompt hi",
    ],
)
def test_a_template_that_refuses_ends_with_status_2_and_the_row(
    monkeypatch, capsys, tmp_path, tiny_policy, arguments
):
    shutil.copytree(tiny_policy.folder, tmp_path / "model")
    template = "{{ raise_exception('System role not supported') }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"{n}+0=", "answer": n} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    filled = arguments.format(rows=tmp_path / "rows.jsonl", tmp=tmp_path)
    command = [*filled.split(), "--model", tmp_path / "model", "--max-new-tokens", 8]
    assert run_main(monkeypatch, *command) == 2
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert last.startswith("error: the prompt of row 0")
    assert "the chat template refuses the messages: System role not supp" in last


def test_a_run_that_diverged_ends_with_status_1(monkeypatch, capsys):
    def diverge(arguments):
        raise FloatingPointError("step 3: 5 updates in a row were not finite")

    monkeypatch.setattr(cli, "_dispatch", diverge)
    assert run_main(monkeypatch, "train") == 1
    assert capsys.readouterr().err.startswith("error: step 3: 5 updates")


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise KeyError("ours")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(KeyError):
        run_main(monkeypatch, "train")


def test_the_version_is_told(capsys):
    cli._dispatch(["--version"])
    assert capsys.readouterr().out == f"grpo-jax {grpo_jax.__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_completes_commands_and_flags(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli._dispatch(["--tyro-print-completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    asked = """
        source "$0"
        complete=$(complete -p grpo-jax | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        for words in "ev" "train --objective.kl" "train --conf" "eval --compl"; do
            COMP_WORDS=(grpo-jax $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            $complete; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "-c", asked, script], capture_output=True, text=True, check=True
    )
    commands, kl, config, completions = done.stdout.splitlines()
    assert commands == "eval"
    assert {"--objective.kl-coef", "--objective.kl-estimator"} <= set(kl.split())
    assert config == "--config" and completions == "--completions"


# --- Help


def test_the_first_help_names_every_command():
    text = words(help_of())
    assert all(f" {command} " in text for command in COMMANDS)


def flags_of(config, prefix=""):
    """Flag -> field of every section, in the spelling of the command line."""
    for field in dataclasses.fields(config):
        value = vars(config)[field.name]
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, f"{prefix}{field.name}.")
        else:
            yield "--" + f"{prefix}{field.name}".replace("_", "-")


@pytest.fixture(scope="module")
def train_helps():
    return helps(help_of("train"))


def test_every_field_has_a_help_text_of_its_own(train_helps):
    flags = list(flags_of(TrainConfig()))
    assert len(flags) > 50 and set(flags) <= set(train_helps)
    texts = {flag: train_helps[flag].partition("(default:")[0] for flag in flags}
    # Behind the type come words; a comment above one field must not reach the next.
    assert not [flag for flag, text in texts.items() if len(text.split()) < 4]
    bare = {
        flag: re.sub(r"^(\S*[{\[|A-Z\]}]\S*\s)+", "", t) for flag, t in texts.items()
    }
    assert len(set(bare.values())) == len(flags)


def test_the_help_of_train_tells_the_two_flags_that_set_many(train_helps):
    text = words(help_of("train"))
    presets = "{softmax,likelihood,grpo,dr_grpo,dapo,gspo,cispo,rloo}"
    assert "--config FILE" in text and f"--objective.preset {presets}" in text


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_the_help_of_a_flag_breaks_only_at_the_end_of_a_line(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "400")
    lines = [line.strip("│ ") for line in help_of(command).splitlines()]
    box = lines[next(i for i, x in enumerate(lines) if x.startswith("-h")) :]
    texts = [x for x in box if x and not x.startswith(("-", "╭", "╰"))]
    assert all(text.endswith(")") or "show this help" in text for text in texts), texts


def test_the_help_of_train_shows_the_defaults_of_the_model():
    shown = helps(help_of("train", "--model", "a/b"))
    assert "(default: 256)" in shown["--max-new-tokens"]
    assert "(default: 1e-06)" in shown["--optimizer.learning-rate"]


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_every_argument_of_a_command_has_a_help_text(command):
    function = vars(cli)["_evaluate" if command == "eval" else f"_{command}"]
    arguments = [n for n in typing.get_type_hints(function) if n != "return"]
    # Python 3.13 and newer take the indentation off, older ones do not.
    docstring = inspect.getdoc(function) or ""
    text = help_of(command)
    shown = helps(text)
    for name in arguments:
        documented = re.search(rf"^  {name}: (.+)$", docstring, re.MULTILINE)
        assert documented, f"{command} {name}"
        flag = "--" + name.replace("_", "-")
        beginning = " ".join(documented.group(1).split()[:3])
        assert beginning in (shown[flag] if flag in shown else words(text))


# --- Commands, on a run of a tiny model


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    """A run of three steps whose files are all there, without training."""
    path = tmp_path_factory.mktemp("cli") / "run"
    (path / "completions").mkdir(parents=True)
    rows = [{"prompt": f"{n}+{n}=", "answer": 2 * n} for n in range(20)]
    data = path.parent / "doubles.jsonl"
    data.write_text("".join(to_json_line(row) + "\n" for row in rows))
    config = TrainConfig(
        model=str(tiny_policy.folder),
        task=str(data),
        max_new_tokens=4,
        max_prompt_tokens=32,
    )
    directories.check_config(path, config)
    lines = [
        {"step": step, "reward": step / 3, "loss": 1 / (1 + step), "kl": 0.01 * step}
        for step in range(1, 4)
    ]
    text = "".join(to_json_line(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    checkpoints = Checkpoints(path / "checkpoints", CheckpointConfig())
    for step in (2, 3):
        params = jax.tree.map(lambda leaf: leaf * jnp.float32(step), tiny_policy.params)  # noqa: B023
        state = TrainState(step=jnp.int32(step), params=params, opt_state=())
        checkpoints.save(step, state_items(state), {}, wait=True)
    checkpoints.close()
    return path


def out_of(capsys, *arguments):
    cli._dispatch([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_eval_asks_for_the_task_of_a_run_on_rows_from_python(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = dataclasses.replace(directories.read_config(copy), task="arithmetic")
    (copy / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (copy / "manifest.json").write_text(to_json_line({"data": {"task": "dataset"}}))
    with pytest.raises(ValueError, match="rows given from Python.*--task"):
        cli._dispatch(["eval", "--run-dir", str(copy)])


def test_eval_prints_json_and_writes_the_same(capsys, tmp_path, tiny_policy):
    out = tmp_path / "deep" / "result.json"
    text = out_of(
        capsys,
        *("eval", "--model", tiny_policy.folder, "--prompts", 6, "--samples", 2),
        *("--max-new-tokens", 3, "--seed", 5, "--out", out),
    )
    result = json.loads(text)
    assert result == json.loads(out.read_text())
    assert (result["task"], result["step"], result["seed"]) == ("arithmetic", None, 5)
    assert (result["prompts"], result["samples"]) == (6, 2)
    assert result["held_out"] == "1,001 held out"
    assert result["pass@2"] >= result["pass@1"] == result["accuracy"]


def test_eval_of_a_run_takes_its_task_and_step(capsys, run):
    text = out_of(capsys, "eval", "--run-dir", run, "--step", 2)
    result = json.loads(text)
    assert (pathlib.Path(result["task"]).name, result["step"]) == ("doubles.jsonl", 2)
    assert result["prompts"] == 2  # one in ten of its 20 rows is held out
    assert result["held_out"].startswith("2 held out (a fixed tenth of ")
    # One greedy sample has no pass@k.
    assert "pass@1" not in result and result["samples"] == 1


def test_sample_prints_one_line_per_completion(capsys, tiny_policy):
    arguments = ["sample", "--model", tiny_policy.folder, "--prompt", "1+1="]
    drawn = [*arguments, "--samples", 3, "--temperature", 1, "--max-new-tokens", 4]
    text = out_of(capsys, *drawn)
    assert len(text.split("\n")) == 4 and text.endswith("\n")
    # Whatever a model writes, the terminal gets no control characters.
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    # The seed decides.
    assert out_of(capsys, *drawn) == text
    assert out_of(capsys, *drawn, "--seed", 1) != text


@pytest.mark.parametrize(("prompt", "told"), [("37+48=", False), ("Hello", True)])
def test_the_embedded_model_warns_of_a_prompt_that_it_cannot_know(
    monkeypatch, capsys, prompt, told
):
    said = lambda *args, **options: [["85"]]  # noqa: E731
    monkeypatch.setattr("grpo_jax.training.evaluate.complete", said)
    run_main(monkeypatch, "sample", "--prompt", prompt)
    shown = capsys.readouterr()
    assert shown.out == "85\n"
    assert ("It has never seen 'H' 'e'" in shown.err) == told


def test_sample_uses_the_policy_of_a_run(capsys, run, tiny_policy):
    short = ("--prompt", "1+1=", "--max-new-tokens", 4)
    by_run = out_of(capsys, "sample", "--run-dir", run, *short)
    exported = run.parent / "by_run"
    out_of(capsys, "export", "--run-dir", run, "--out", exported)
    by_model = out_of(capsys, "sample", "--model", exported, *short)
    assert by_run == by_model


GAME = """
from grpo_jax.environments.base import Step, TextEnvironment

class Game(TextEnvironment):
    def reset(self, *, seed, prompt, start="", **row):
        self.left = 2
        return f"{start}{seed % 7}="

    def step(self, text):
        self.left -= 1
        return Step(f"\\x1b{self.left}=", float(text == "!"), self.left == 0)
"""


@pytest.fixture
def game(tmp_path, monkeypatch):
    """The name of an environment in a file, which is forgotten after the test."""
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "my_game.py").write_text(GAME)
    yield f"{tmp_path}/my_game.py:Game"
    sys.modules.pop("my_game", None)


def test_eval_plays_an_environment_that_brings_its_prompts(
    capsys, tmp_path, polite_policy, game
):
    command = ["eval", "--model", polite_policy.folder, "--environment", game]
    command += ["--prompts", 3, "--max-new-tokens", 20]
    text = out_of(capsys, *command, "--completions", tmp_path / "all.jsonl")
    result = json.loads(text)
    assert (result["task"], result["environment"]) == (None, game)
    assert (result["prompts"], result["reward"]) == (3, 2.0)
    assert result["episodes/turns"] == 2.0 and "accuracy" not in result
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3
    roles = [message["role"] for message in records[0]["completion"]]
    assert roles == ["assistant", "user", "assistant"]
    assert records[0]["prompt"][0]["content"].endswith("=")
    # The seed makes the episodes.
    assert json.loads(out_of(capsys, *command, "--seed", 1)) != result


def test_eval_of_a_task_with_an_environment_has_accuracy_and_reward(
    capsys, polite_policy, run, game
):
    # Its rows have no answer that the policy gives, so none is right.
    task = run.parent / "doubles.jsonl"
    command = ("eval", "--model", polite_policy.folder, "--environment", game)
    text = out_of(capsys, *command, "--task", task, "--max-new-tokens", 20)
    result = json.loads(text)
    assert (result["accuracy"], result["prompts"]) == (0.0, 2)
    assert result["reward"] == 2.0


def test_sample_and_chat_play_the_same_episode(capsys, polite_policy, game):
    command = ["--model", polite_policy.folder, "--environment", game]
    command += ["--max-new-tokens", 20, "--prompt", "Go "]
    sampled = out_of(capsys, "sample", *command).splitlines()
    turns = ["assistant: !", "user: \\x1b1=", "assistant: !"]
    assert sampled == turns
    opening, *rest = out_of(capsys, "chat", *command).splitlines()
    assert opening.startswith("user: Go ") and rest == [*turns, "(reward Game: 2)"]
    row = json.dumps({"start": "from a row "})
    text = out_of(capsys, "chat", *command, "--row", row)
    assert text.startswith("user: Go from a row ")


def test_chat_answers_lines_until_the_end_of_the_input(
    monkeypatch, capsys, polite_policy
):
    monkeypatch.setattr("sys.stdin", io.StringIO("a=\n\n  \nb\x1b=\n"))
    text = out_of(capsys, "chat", "--model", polite_policy.folder)
    assert text.splitlines() == [
        "user: a=",
        "assistant: !",
        "user: b\\x1b=",
        "assistant: !",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert out_of(capsys, "chat", "--model", polite_policy.folder) == ""


@pytest.mark.parametrize(("step", "flags"), [(3, []), (2, ["--step", "2"])])
def test_export_writes_the_checkpoint(capsys, tmp_path, run, tiny_policy, step, flags):
    out = tmp_path / "export"
    text = out_of(capsys, "export", "--run-dir", run, "--out", out, *flags)
    assert text == f"step {step} written to {out}\n"
    given = load_pretrained(out).params
    expected = jax.tree.map(lambda leaf: leaf * jnp.float32(step), tiny_policy.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), given, expected))


def test_export_goes_into_the_run_by_default(capsys, run):
    out_of(capsys, "export", "--run-dir", run)
    assert (run / "export" / "model.safetensors").is_file()


def test_plot_takes_runs_with_and_without_a_flag(capsys, tmp_path, run):
    out = tmp_path / "deep" / "curves.png"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "metrics.jsonl", other)
    text = out_of(capsys, "plot", run, "--run-dir", other, "--out", out)
    assert text == f"written to {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="given twice"):  # both ways are one list
        out_of(capsys, "plot", run, "--run-dir", run, "--out", out)


def test_report_writes_a_page_into_the_run_by_default(capsys, tmp_path, run):
    assert out_of(capsys, "report", run) == f"written to {run / 'report.html'}\n"
    out = tmp_path / "page.html"
    out_of(capsys, "report", run, "--out", out)
    assert "<html" in out.read_text() and out.read_text().count("\n") > 5


def test_commands_that_read_a_run_leave_it_as_it_is(capsys, tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "copy")
    for file in (copy / "checkpoints" / "3" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = everything_in(copy)
    short = ("--prompt", "1+1=", "--max-new-tokens", 4)
    out_of(capsys, "sample", "--run-dir", copy, *short)
    out_of(capsys, "eval", "--run-dir", copy, "--out", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 2
    out_of(capsys, "export", "--run-dir", copy, "--out", tmp_path / "export")
    out_of(capsys, "report", copy, "--out", tmp_path / "page.html")
    out_of(capsys, "plot", copy, "--out", tmp_path / "curves.png")
    assert everything_in(copy) == before


def everything_in(folder):
    """Contents and times, which tell even of files that came and went."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def test_train_hands_the_described_run_to_the_loop(monkeypatch):
    from grpo_jax.training import loop

    given, ended = [], types.SimpleNamespace(history=[])
    monkeypatch.setattr(
        loop, "run_to_end", lambda *args, **named: given.append((args, named)) or ended
    )
    arguments = ["--steps", "4", "--objective.preset", "rloo"]
    played = [
        "--tools",
        "json:loads",
        "json:dumps",
        "--environment",
        "json:JSONDecoder",
    ]
    cli._dispatch(["train", *arguments])
    cli._dispatch(["train", *arguments, *played])
    ((config,), named), ((same,), others) = given
    assert same == config
    assert named == {"with_params": False, "tools": (), "environment_factory": None}
    assert others["tools"] == (json.loads, json.dumps)
    assert others["environment_factory"] is json.JSONDecoder
    assert config == TrainConfig(steps=4, objective=ObjectiveConfig.preset("rloo"))
    assert yaml.safe_load(yaml.safe_dump(to_dict(config))) == to_dict(config)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("status", ["finished", "preempted"])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_end_of_a_run_says_what_next_to_whoever_reads(
    monkeypatch, tmp_path, status, stream
):
    folder = tmp_path / "a run"
    kept = CheckpointConfig(keep_best="eval/accuracy")
    result = types.SimpleNamespace(
        run_dir=folder, history=[{}], summary={"status": status}
    )
    ended = lambda *args, **named: result  # noqa: E731
    monkeypatch.setattr("grpo_jax.training.loop.run_to_end", ended)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    out = stream()
    played = ["--tools", "json:loads", "--environment", "json:JSONDecoder"]
    with contextlib.redirect_stdout(out):
        cli._dispatch(["train", *played])
    told = [line.strip() for line in out.getvalue().splitlines()[1:]]
    if (status, stream) != ("finished", Terminal):
        assert out.getvalue() == ""
        return
    commands = ["eval", "sample", "report", "export", "chat"]
    assert [line.split()[1] for line in told] == commands
    # What a run played with is not stored, so they name it again.
    assert [line.endswith(" ".join(played)) for line in told] == [1, 1, 0, 0, 1]
    # Each parses as it is printed, quoted path and all.
    called = []
    for name in ("_evaluate", "_sample", "_report", "_export"):
        real = getattr(cli, name)
        spy = functools.wraps(real)(lambda *args, **given: called.append((args, given)))
        monkeypatch.setattr(cli, name, spy)
    lora = LoraConfig(rank=2)
    for config in (TrainConfig(), TrainConfig(checkpoint=kept, lora=lora)):
        for line in next_commands(folder, config).splitlines()[1:]:
            cli._dispatch(shlex.split(line)[1:])
    assert len(called) == 8
    for args, given in called:
        assert str(folder) in map(str, (*args, *given.values()))
    chat = functools.wraps(cli._chat)(lambda **given: called.append(((), given)))
    monkeypatch.setattr(cli, "_chat", chat)
    played = ["--tools", "a.py:f", "my tools.py:g", "--environment", "game:Game"]
    for line in next_commands(folder, TrainConfig(), played=played).splitlines()[1:]:
        cli._dispatch(shlex.split(line)[1:])
    given = [named for _, named in called[8:] if "tools" in named]
    assert len(given) == 3
    assert {(one["tools"], one["environment"]) for one in given} == {
        (("a.py:f", "my tools.py:g"), "game:Game")
    }
