import io
import logging
import os
import re
import types

import pytest

from grpo_jax.config import ReportConfig
from grpo_jax.reporting.console import Console
from grpo_jax.reporting.logs import attach_log_file

METRICS = {
    "reward": 0.5,
    "kl": 0.00125,
    "completions/mean_length": 31.5,
    "completions/clipped_ratio": 0.25,
    "tokens_per_second/total": 12345.6,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def _without_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_outside_a_terminal_output_is_one_plain_line_every_few_steps():
    stream = io.StringIO()
    with Console(10, ReportConfig(log_every=4), stream=stream) as console:
        for step in range(1, 11):
            console.step(step, METRICS)
            console.sample("2+2?", "4", {"correct": 1.0})
    lines = stream.getvalue().splitlines()
    # the first, each fourth and the last
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]
    assert lines[0] == (
        "step 1/10  reward 0.500  kl 0.0013  length 31.5  cut 25%  tok/s 12,346"
    )
    assert all(re.search(r"  left \d+\w+$", line) for line in lines[1:])
    assert all(line.isprintable() and line.isascii() for line in lines)


def test_each_phase_is_told_when_it_begins_for_the_first_time(tmp_path):
    stream = io.StringIO()
    with attach_log_file(tmp_path), Console(9, ReportConfig(), stream=stream) as shown:
        shown.phase("loading")
        for step in (5, 6):  # of a run that was resumed
            shown.phase("sampling")
            shown.step(step, METRICS)
        shown.phase("evaluating")
    for text in (stream.getvalue(), (tmp_path / "log.txt").read_text()):
        told = re.findall(r"loading|step \d|sampling|evaluating", text)
        assert told == ["loading", "sampling", "step 5", "step 6", "evaluating"]


def test_time_passes_in_a_terminal_before_anything_is_known(terminal, monkeypatch):
    now = [1000.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("grpo_jax.reporting.console.time", clock)
    with Console(3, ReportConfig(), stream=terminal) as console:
        console.phase("loading")
        now[0] += 125.0  # while nothing is told to the console
    shown = _without_codes(terminal.getvalue())
    assert "loading" in shown
    assert re.search(r"step 0/3 .* 2m05s so far", shown)


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, attach_log_file(tmp_path):
        with Console(3, ReportConfig(), stream=stream) as console:
            console.step(1, METRICS)
            assert os.read(read, 100).startswith(b"step 1/3")
            os.close(read)  # as `| head` does
            for step in 2, 3:
                console.step(step, METRICS)
        stream.flush()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [re.search(r"step \d", line)[0] for line in lines] == [
        f"step {step}" for step in (1, 2, 3)
    ]


def test_first_evaluation_is_shown_and_missing_numbers_are_dashes():
    stream = io.StringIO()
    with Console(10, ReportConfig(), stream=stream) as console:
        console.step(0, {"eval/accuracy": 0.125})
        console.step(1, {"reward": float("nan")})
    assert stream.getvalue().splitlines() == [
        "step 0/10  accuracy 12.5%",
        "step 1/10  reward -",
    ]


def test_ci_and_dumb_terminals_get_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with Console(2, ReportConfig(), stream=terminal) as console:
        console.step(1, METRICS)
    assert "\x1b" not in terminal.getvalue()
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    with Console(2, ReportConfig(), stream=terminal) as console:
        console.step(2, METRICS)
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("index", range(6))
def test_hostile_text_is_shown_letter_by_letter_in_the_live_display(
    terminal, index, synthetic
):
    text = synthetic.HOSTILE[index]
    with Console(3, ReportConfig(), stream=terminal) as console:
        console.sample(text, text, {"[/correct]": 1.0, "style": None})
        console.step(1, METRICS)
        console.warning(f"reward function failed on {text}")
    shown = _without_codes(terminal.getvalue())
    assert not re.search(
        r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown
    )
    assert "[/correct] 1  style none" in shown
    for piece in ("[/INST] [bold]loud[/bold] :smile:", "</script><script>"):
        if piece in text:
            assert shown.count(piece) >= 3  # prompt, completion, warning
    if "\x1b]0;title" in text:
        assert "\\x1b]0;title\\x07" in shown


@pytest.mark.parametrize("index", range(6))
def test_hostile_text_is_harmless_in_plain_lines_and_in_the_log_file(
    tmp_path, index, synthetic
):
    text = synthetic.HOSTILE[index]
    stream = io.StringIO()
    with (
        attach_log_file(tmp_path),
        Console(1, ReportConfig(), stream=stream) as console,
    ):
        console.note(text)
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    for written in (stream.getvalue(), log):
        assert written.replace("\n", "").isprintable()


def test_live_display_shows_progress_and_keeps_the_last_accuracy(terminal):
    with Console(40, ReportConfig(), stream=terminal) as console:
        console.step(0, {"eval/accuracy": 0.125})
        console.step(1, METRICS)
        console.note("a checkpoint was saved")
        terminal.truncate(0)
        console.step(2, METRICS)
    shown = _without_codes(terminal.getvalue())
    last = shown[shown.rindex("step 2/40") :]
    assert "12.5%" in last and "0.500" in last and "12,346" in last
    assert " left" in last


def test_sample_stays_long_enough_to_be_read(terminal):
    with Console(40, ReportConfig(), stream=terminal) as console:
        for step in range(1, 4):
            console.step(step, METRICS)
            console.sample(f"prompt {step}", "text", {"correct": 0.0})
    shown = _without_codes(terminal.getvalue())
    assert "prompt 1" in shown and "prompt 2" not in shown
    # It is not said to be of a later step.
    last = shown[shown.rindex("step 3/40") :]
    assert "a completion of step 1 " in last


def test_a_sample_of_several_turns_is_shown_with_its_calls(terminal, synthetic):
    row = synthetic.talk(text="\x1b[2J9591")
    with Console(40, ReportConfig(), stream=terminal) as console:
        console.sample(row["prompt"], row["completion"], row["rewards"])
    shown = _without_codes(terminal.getvalue())
    assert "user: What is 417 * 23?" in shown
    assert 'assistant calls: calculate(expression="417*23")' in shown
    assert "tool calculate: \\x1b[2J9591" in shown
    assert "assistant: It is 9591." in shown


def test_a_resumed_run_shows_where_it_stands_before_its_next_step(terminal):
    with Console(40, ReportConfig(), stream=terminal) as console:
        console.start_at(30)
    assert "step 30/40" in _without_codes(terminal.getvalue())


def test_records_of_other_modules_reach_the_console_and_the_log_file(tmp_path):
    stream = io.StringIO()
    logger = logging.getLogger("grpo_jax.checkpointing.checkpoints")
    with attach_log_file(tmp_path) as path:
        with Console(5, ReportConfig(), stream=stream) as console:
            logger.warning("step %d was damaged and set aside", 4)
            logger.debug("not for people")
            console.step(5, {"reward": 1.0})
        logger.info("after the console")
    logger.warning("after the run")
    shown = stream.getvalue().splitlines()
    assert shown == [
        "warning: step 4 was damaged and set aside",
        "step 5/5  reward 1.000",
    ]
    log = path.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == [
        "WARNING step 4 was damaged and set aside",
        "INFO step 5/5  reward 1.000",
        "INFO after the console",
    ]
    assert logging.getLogger("grpo_jax").level == logging.NOTSET
    assert logging.getLogger("grpo_jax").handlers == []


def test_progress_goes_to_the_log_file_although_the_display_is_live(tmp_path, terminal):
    with attach_log_file(tmp_path) as path:
        with Console(5, ReportConfig(), stream=terminal) as console:
            console.step(1, {"reward": 1.0})
    assert "INFO step 1/5  reward 1.000" in path.read_text()


def test_resumed_run_appends_to_its_log_file(tmp_path):
    for text in ("first", "second"):
        with attach_log_file(tmp_path) as path:
            logging.getLogger("grpo_jax").warning(text)
    assert [line.split()[-1] for line in path.read_text().splitlines()] == [
        "first",
        "second",
    ]


def test_summary_lines_up_the_values_that_are_known():
    stream = io.StringIO()
    with Console(5, ReportConfig(), stream=stream) as console:
        console.summary(
            {
                "accuracy_before_training": None,
                "eval_reward_before_training": float("nan"),
                "accuracy_after": 0.85,
                "steps": 5,
                "seconds": 203.5,
            }
        )
    assert stream.getvalue().splitlines() == [
        "accuracy_after  85.0%",
        "steps           5",
        "seconds         3m23s",
    ]


def test_other_processes_are_quiet(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.DEBUG, "grpo_jax"):
        with Console(5, ReportConfig(), stream=stream, enabled=False) as console:
            console.step(1, METRICS)
            console.sample("p", "c", {})
            console.note("n")
            console.warning("w")
            console.summary({"steps": 5})
    assert stream.getvalue() == "" and caplog.records == []


def test_stream_that_knows_only_ascii_gets_escapes_instead_of_an_error():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Console(5, ReportConfig(), stream=stream) as console:
        console.note("漢 \N{GRINNING FACE}")
    assert stream.buffer.getvalue() == b"\\u6f22 \\U0001f600\n"


def test_handlers_are_removed_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        with (
            attach_log_file(tmp_path),
            Console(5, ReportConfig(), stream=io.StringIO()),
        ):
            raise RuntimeError("out of memory")
    assert logging.getLogger("grpo_jax").handlers == []
