#!/usr/bin/env bash
# reasoning-gym 0.1.25. It needs pycosat, for which pip wants a C compiler.
#
# Expected: `score_answer` of a data set gives 1.0 to right answers and less to all others,
# as a verifiable reward has to. Of these four data sets it does not:
#   game_of_life_halting  gives 1.0 to any text;
#   puzzle24              gives 1.0 to the solution of another problem: it asks whether the
#                         expression makes 24, and not which numbers it uses;
#   coin_flip             divides the common beginning by the length of the shorter text, so
#                         "0" is right for every probability that is written as 0.…;
#   gsm_symbolic          reads the first digits without their sign, so -28080 is 28080.
# A policy finds such a constant within a few steps, and the mean reward says 1.0. Score a
# constant and a right answer over a few hundred problems before you train on a data set.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet reasoning-gym==0.1.25
cat >"$place/program.py" <<'END'
import reasoning_gym


def score(name, answer_to):
    """Share of 300 problems on which the same kind of wrong answer gets 1.0."""
    data = reasoning_gym.create_dataset(name, size=300, seed=0)
    scores = [data.score_answer(answer_to(data, entry), entry) for entry in data]
    print(f"{name:21} {sum(score == 1.0 for score in scores) / len(scores):.2f}")


score("game_of_life_halting", lambda data, entry: "certainly nothing")
score("puzzle24", lambda data, entry: data[0]["answer"])
score("coin_flip", lambda data, entry: "0")
score("gsm_symbolic", lambda data, entry: "-" + entry["answer"])
score("chain_sum", lambda data, entry: "0")
END
"$place/venv/bin/python" "$place/program.py" | tee "$place/seen"
diff "$place/seen" - <<'END'
game_of_life_halting  1.00
puzzle24              1.00
coin_flip             0.93
gsm_symbolic          1.00
chain_sum             0.01
END
echo "as described"
