#!/usr/bin/env bash
# textarena 0.7.4.
#
# Expected: `close` returns the rewards of a game as numbers, and a player whose move is
# invalid reads why.
# Seen: four games for one player exchange the two. After an invalid move the player reads
# a number as its reason, and after the second one the reward is a text. Adding it up or
# taking a mean fails, far from the game and only once a policy errs twice in a row. The
# number is in the game's info, behind "Invalid Move: ".
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet textarena==0.7.4
cat >"$place/program.py" <<'END_OF_PROGRAM'
import textarena as ta

for name in (
    "GuessTheNumber-v0",
    "Countdown-v0",
    "Cryptarithm-v0",
    "Slitherlink-v0",
    "ThreeCardMonte-v0",
):
    env = ta.make(name)
    env.reset(num_players=1, seed=0)
    env.step("no move")
    env.step("no move")
    rewards, info = env.close()
    print(f"{name}: {rewards[0]!r}; {info[0]['reason']}")
END_OF_PROGRAM
"$place/venv/bin/python" "$place/program.py" | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
GuessTheNumber-v0: 0.0; Invalid Move: Invalid move format. Player 0 did not respond with valid '[number]'.
Countdown-v0: 'Invalid action format. Use `[i j op]` where i,j are indices and op is +,-,*,/'; Invalid Move: 0.5680000000000001
Cryptarithm-v0: 'Bad action format. Use `[A 5]`.'; Invalid Move: 0.0
Slitherlink-v0: 'Bad action format. Use [h row col] or [v row col].'; Invalid Move: 0.0
ThreeCardMonte-v0: 'Bad action. Use `[k]`.'; Invalid Move: 0.0
END_OF_OUTPUT
echo "as described"
