"""Reward functions for the tests, importable by name as the worker needs them.

Some are written as users of TRL write them; the misbehaving ones act on the text of the
completion.
"""

import asyncio
import os
import re
import signal
import sys
import time

# Seconds for what must happen: far more than the slowest machine needs.
PATIENCE = 600.0


def at_some_limit(check, first):
    """Runs `check(limit)` with longer limits while it fails.

    What hangs is late at any limit. What is good may be late at the first, where the
    machine has other work.
    """
    for limit in (first, 10.0 * first):
        try:
            return check(limit)
        except AssertionError:
            continue
    return check(100.0 * first)


def metrics(scores):
    """The metrics of a step that has these scores alone."""
    from grpo_jax.rewards.metrics import reduce_metrics

    rewards = dict(zip(scores.names, scores.rewards, strict=True))
    failures = dict(zip(scores.names, scores.failures, strict=True))
    return reduce_metrics(rewards, failures, [scores.logged])


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def accuracy_reward(completions, solution, log_extra=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    if log_extra is not None:
        log_extra("solution", list(solution))
    return [
        None if expected == "?" else float(content.strip() == expected)
        for content, expected in zip(contents, solution, strict=True)
    ]


def think_format_reward(completions, **kwargs):
    pattern = r"^<think>(?!.*<think>)(.*?)</think>.*$"
    contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, text, re.DOTALL | re.MULTILINE) for text in contents]
    return [1.0 if match else 0.0 for match in matches]


async def slow_length(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def misbehave(completions, log_extra, log_metric, **kwargs):
    """1.0 for a good completion; the others name what goes wrong."""
    for text in completions:
        match text:
            case "raise":
                raise KeyError("no such answer")
            case "hang":
                time.sleep(3600.0)
            case "exit":
                os._exit(3)
            case "sys.exit":
                sys.exit(0)
            case "memory":
                bytearray(6 * 2**30)
    log_extra("seen", [text.upper() for text in completions])
    log_metric("calls", 1.0)
    return [1.0 for _ in completions]


def wrong_count(completions, **kwargs):
    return [1.0]


def jax_state(completions, **kwargs):
    """1.0 if this process has not loaded JAX and would keep it on the CPU."""
    clean = "jax" not in sys.modules and os.environ.get("JAX_PLATFORMS") == "cpu"
    return [float(clean) for _ in completions]


def alarmed(completions, **kwargs):
    """1.0 where `signal.alarm` may be used, as by scorers with a time limit."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, before)
    return [1.0 for _ in completions]


def process_id(completions, **kwargs):
    return [float(os.getpid()) for _ in completions]


class Bonus:
    """A callable object with a setting."""

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, completions, **kwargs):
        return [self.amount for _ in completions]
