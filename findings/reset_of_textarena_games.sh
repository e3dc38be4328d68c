#!/usr/bin/env bash
# textarena 0.7.4.
#
# Expected: `reset` of an environment begins a new game, and what is observed then is of
# that game alone.
# Seen: the wrapper of every game that is made by its name keeps what was observed. Each
# observation of the second game begins with the whole first one, and each of the tenth
# with nine. Nothing fails: a policy reads old rules and hints as if they were new, and
# prompts grow from episode to episode. Make a new environment for each game.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet textarena==0.7.4
cat >"$place/program.py" <<'END_OF_PROGRAM'
import textarena as ta


def observed(env, seed):
    """Rules of the game, moves and hints in what is observed after `reset`."""
    env.reset(num_players=1, seed=seed)
    _, text = env.get_observation()
    counts = (text.count(part) for part in ("You are playing", "[Player]", "target"))
    return "rules {}, moves {}, hints {}".format(*counts)


env = ta.make("GuessTheNumber-v0")
print("first game: ", observed(env, seed=0))
env.step("[3]")
env.get_observation()
print("second game:", observed(env, seed=1))
print("a new one:  ", observed(ta.make("GuessTheNumber-v0"), seed=1))
END_OF_PROGRAM
"$place/venv/bin/python" "$place/program.py" | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
first game:  rules 1, moves 0, hints 0
second game: rules 2, moves 1, hints 1
a new one:   rules 1, moves 0, hints 0
END_OF_OUTPUT
echo "as described"
