#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.14.1 and gguf 0.19.0), beside sentencepiece 0.2.3.
#
# Expected: `AutoTokenizer.from_pretrained(folder, gguf_file=...)` of a Gemma file gives the
# ids of its SentencePiece model. A run of spaces is first cut into tokens of the user's
# type, the longest first, and these are never joined: Gemma has them of 2 to 31 spaces.
# Seen: transformers joins them like other pieces, ranked by their position in the file.
# Runs of up to the longest token agree, most longer ones do not. In Gemma 3 (up to 31
# spaces) 33 spaces are 31 and 2, but 16 and 17 in transformers. The merges are ranked by
# position, because "scores do not follow the merge order"; in the file of Gemma 3 270M
# they do: those of all 255,474 ordinary pieces fall with the position.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/program.py" <<'END_OF_PROGRAM'
import io
import logging
import pathlib
import tempfile

import gguf
import sentencepiece
import transformers

# Gemma has tokens of 2 to 31 spaces that are cut out before anything is joined. This
# small model has them up to 4.
SPACES = ["\u2581" * count for count in (2, 3, 4)]
stored = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat and the dog sat on the cat"] * 9),
    model_writer=stored,
    model_type="bpe",
    vocab_size=330,
    hard_vocab_limit=False,
    byte_fallback=True,
    user_defined_symbols=SPACES,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    minloglevel=2,
)
model = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())

# As llama.cpp's converter writes it: real spaces in tokens of the user's type.
tokens, scores, types = [], [], []
for index in range(model.vocab_size()):
    piece, score, kind = model.id_to_piece(index), model.get_score(index), 1
    if model.is_unknown(index):
        kind = 2
    elif model.is_control(index):
        kind = 3
    elif model.is_byte(index):
        kind = 6
    elif piece in SPACES:
        piece, score, kind = piece.replace("\u2581", " "), -1000.0, 4
    tokens.append(piece)
    scores.append(score)
    types.append(kind)

folder = pathlib.Path(tempfile.mkdtemp())
writer = gguf.GGUFWriter(folder / "m.gguf", "gemma3")
for key, value in {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
}.items():
    writer.add_uint32(f"gemma3.{key}", value)
writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores(scores)
writer.add_token_types(types)
writer.add_bos_token_id(model.bos_id())
writer.add_eos_token_id(model.eos_id())
writer.add_unk_token_id(model.unk_id())
writer.add_add_bos_token(False)
writer.add_add_space_prefix(False)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

logging.disable(logging.WARNING)
theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")


def runs(ids):
    """How many spaces each token of spaces has."""
    texts = [tokens[index].replace("\u2581", " ") for index in ids]
    return " ".join(str(text.count(" ")) for text in texts if " " in text)


for count in (3, 4, 5, 6, 7):
    text = " " * count + "the"
    found = runs(theirs(text)["input_ids"])
    print(f"{count} spaces: {runs(model.encode(text))}, in transformers {found}")
END_OF_PROGRAM
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet \
  transformers==5.24.0 torch==2.14.1 gguf==0.19.0 sentencepiece==0.2.3
"$place/venv/bin/python" "$place/program.py" 2>/dev/null | tee "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
3 spaces: 3, in transformers 3
4 spaces: 4, in transformers 4
5 spaces: 4 1, in transformers 2 3
6 spaces: 4 2, in transformers 4 2
7 spaces: 4 3, in transformers 4 3
END_OF_OUTPUT
echo "as described"
