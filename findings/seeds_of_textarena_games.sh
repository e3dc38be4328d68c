#!/usr/bin/env bash
# textarena 0.7.4.
#
# Expected: a game follows from its seed and its moves. `reset` says that its seed is for
# reproducibility.
# Seen: `reset` calls `random.seed` of the process, and games draw from there as they are
# played. So a game changes when another one is reset or moved beside it, as the games of
# a group are. Each `reset` also sets the random numbers of the rest of the program. Give
# each game its own state of `random`, and exchange it around each call.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet textarena==0.7.4
cat >"$place/program.py" <<'END_OF_PROGRAM'
import random

import textarena as ta


def begun(seed):
    env = ta.make("2048-v0-raw")
    env.reset(num_players=1, seed=seed)
    return env


def board(env):
    env.step("[left]")
    return env.state.game_state["board"]


first = board(begun(0))
print("seed 0 again:", "same" if board(begun(0)) == first else "another")
beside = begun(0)
begun(1)
print("seed 0 beside seed 1:", "same" if board(beside) == first else "another")
random.seed(5)
expected = random.random()
random.seed(5)
begun(0)
print("numbers of the caller:", "same" if random.random() == expected else "others")
END_OF_PROGRAM
"$place/venv/bin/python" "$place/program.py" | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
seed 0 again: same
seed 0 beside seed 1: another
numbers of the caller: others
END_OF_OUTPUT
echo "as described"
