"""Kill a run again and again, damage what it saved, and compare what it ends in.

    python tests/training/torture.py --kills 50

A run is started, interrupted at a random moment and started again by the same command
until it ends; then the next run begins, until there were as many kills as asked for.
Each must end in the `params_sha256` and the metrics of a run that nothing disturbed,
with each step once in `metrics.jsonl`.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpointing"))

from damages import DAMAGES  # noqa: E402

STEPS = 40
# Fewer slots than completions of a step, so that some always continue in the next.
CARRY_OVER = ("--rollout.carry-over", "--rollout.slots", "3")
# Completions of several turns, answered by an environment.
PLAYED = ("--environment", f"{Path(__file__).parent / 'echoes.py'}:Echo")
PLAYED += ("--max-new-tokens", "16")
_PATIENCE = 600.0  # seconds in which what is waited for must happen
_FREE_METRICS = ("time/", "tokens_per_second/", "mfu/", "compile/")
_FREE_METRICS += ("tools/latency", "eval/tools/latency")


@dataclasses.dataclass
class Tally:
    """What was done to the runs."""

    starts: int = 0
    kills: Counter[str] = dataclasses.field(default_factory=Counter)  # by moment
    terminated: int = 0  # stopped by SIGTERM: saved, exit status 0
    damages: Counter[str] = dataclasses.field(default_factory=Counter)  # by kind
    quarantined: int = 0  # damaged checkpoints that the runs found
    ended: int = 0  # runs, each in the bits of the undisturbed one

    def __str__(self) -> str:
        def listed(counter: Counter[str]) -> str:
            parts = [f"{count} {name}" for name, count in sorted(counter.items())]
            return f"{counter.total()} ({', '.join(parts)})"

        return (
            f"starts                    {self.starts}\n"
            f"SIGKILLs                  {listed(self.kills)}\n"
            f"SIGTERMs, saved, status 0 {self.terminated}\n"
            f"checkpoints damaged       {listed(self.damages)}\n"
            f"of them quarantined       {self.quarantined}\n"
            f"runs ended in same bits   {self.ended}"
        )


class Torture:
    """Runs of one configuration in `folder`, which are started and interrupted.

    Every accident starts the run once. Where the run ends before the accident happens,
    it is compared, and a new run takes its place.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        cache: str,
        seed: int,
        steps: int = STEPS,
        options: Sequence[str] = (),
    ) -> None:
        self.tally = Tally()
        self._steps = steps
        self._options = options
        self._model = model
        self._cache = cache
        self._random = random.Random(seed)
        self._path = folder / "undisturbed"
        self._finish(self._start())
        self._expected = self._outcome()
        self._path = folder / "disturbed"

    def kill_at_the_start(self) -> None:
        """SIGKILL while the run is loaded, restored or compiled."""
        process = self._start()
        time.sleep(self._random.uniform(0.0, 4.0))
        self._kill(process, "at the start")

    def kill_in_a_step(self) -> None:
        """SIGKILL a step or more further than the run has been, anywhere in a step."""
        before = self._size()
        process = self._start()
        if self._wait(process, lambda: self._size() > before):
            time.sleep(self._random.uniform(0.0, 0.03))
            self._kill(process, "in a step")

    def kill_in_a_save(self) -> None:
        """SIGKILL while a checkpoint is being written."""
        left = self._unfinished_saves()
        process = self._start()
        while self._wait(process, lambda: self._unfinished_saves() - left):
            # Stopped, so that the save cannot end between this look and the kill.
            process.send_signal(signal.SIGSTOP)
            if self._unfinished_saves() - left:
                self._kill(process, "in a save")
                return
            process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: the run saves and ends in peace."""
        before = self._size()
        process = self._start()
        if not self._wait(process, lambda: self._size() > before):
            return
        process.terminate()
        if self._finish(process) == "preempted":
            assert not (self._path / "summary.json").exists()
            self.tally.terminated += 1

    def damage(self) -> None:
        """Something happens to the newest checkpoint, if an older one is there."""
        saves = self._path / "checkpoints"
        steps = sorted(int(p.name) for p in saves.glob("*") if p.name.isdigit())
        if len(steps) < 2:
            return
        kind = self._random.choice(sorted(DAMAGES))
        DAMAGES[kind](saves / str(steps[-1]))
        self.tally.damages[kind] += 1

    def end(self) -> None:
        """The run is left in peace until it ends, and compared."""
        assert self._finish(self._start()) == "finished"

    def _start(self) -> subprocess.Popen[bytes]:
        self.tally.starts += 1
        self._path.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # All starts share what was compiled, so each takes seconds.
            "JAX_COMPILATION_CACHE_DIR": self._cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self._path / "output.txt", "ab") as output:
            return subprocess.Popen(
                [*_command(self._model, self._path, self._steps), *self._options],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _wait(
        self, process: subprocess.Popen[bytes], happened: Callable[[], object]
    ) -> bool:
        """Whether it happened before the run ended, which is then compared."""
        deadline = time.monotonic() + _PATIENCE
        while not happened():
            if process.poll() is not None:
                self._finish(process)
                return False
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.001)
        return True

    def _kill(self, process: subprocess.Popen[bytes], moment: str) -> None:
        process.kill()
        if process.wait() == -signal.SIGKILL:
            self.tally.kills[moment] += 1
        else:
            self._finish(process)

    def _finish(self, process: subprocess.Popen[bytes]) -> str:
        """Waits for the end of a process, which must be a good one; its status."""
        code = process.wait(timeout=_PATIENCE)
        assert code == 0, (code, (self._path / "output.txt").read_text()[-5000:])
        status = _read_json(self._path / "manifest.json")["status"]
        if status == "finished" and self._path.name == "disturbed":
            assert self._outcome() == self._expected
            saves = self._path / "checkpoints"
            self.tally.quarantined += len(list(saves.glob("*.damaged*")))
            self.tally.ended += 1
            shutil.rmtree(self._path)
        return status

    def _outcome(self) -> tuple[str, list[dict]]:
        """The digest of the parameters, and the metrics without times."""
        lines = (self._path / "metrics.jsonl").read_text().splitlines()
        history = [
            {
                k: v
                for k, v in json.loads(line).items()
                if not k.startswith(_FREE_METRICS)
            }
            for line in lines
        ]
        assert [line["step"] for line in history] == list(range(1, self._steps + 1))
        summary = _read_json(self._path / "summary.json")
        return summary["params_sha256"], history

    def _size(self) -> int:
        """Bytes of metrics that this or an earlier start has written."""
        metrics = self._path / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def _unfinished_saves(self) -> set[int]:
        """Folders that are being written, by their number on the disk."""
        found = set()
        for path in (self._path / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            try:
                found.add(path.stat().st_ino)
            except FileNotFoundError:
                continue
        return found


def _command(model: str, run_dir: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "grpo_jax", "train"),
        *("--model", model, "--run-dir", str(run_dir), "--task", "arithmetic"),
        *("--steps", str(steps), "--prompts-per-step", "2", "--group-size", "2"),
        *("--max-new-tokens", "4", "--eval-every", "0", "--eval-prompts", "0"),
        *("--checkpoint.every", "2", "--optimizer.learning-rate", "1e-3"),
        # Moves the parameters even where no answer is right.
        *("--objective.entropy-coef", "0.1"),
    ]


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def main() -> None:
    """Tortures runs of the embedded model and prints the tally."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--carry-over", action="store_true")
    parser.add_argument("--environment", action="store_true")
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(
            Path(folder),
            model="embedded",
            cache=str(Path(folder) / "cache"),
            seed=arguments.seed,
            options=(CARRY_OVER if arguments.carry_over else ())
            + (PLAYED if arguments.environment else ()),
        )
        accidents = (
            [torture.kill_in_a_step] * 5
            + [torture.kill_in_a_save] * 3
            + [torture.kill_at_the_start, torture.terminate]
        )
        while torture.tally.kills.total() < arguments.kills:
            chosen.choice(accidents)()
            if chosen.random() < 0.3:
                torture.damage()
            tally = torture.tally
            sys.stderr.write(f"{tally.kills.total()} kills, {tally.ended} runs ended\n")
        torture.end()
    sys.stdout.write(f"{torture.tally}\n")


if __name__ == "__main__":
    main()
