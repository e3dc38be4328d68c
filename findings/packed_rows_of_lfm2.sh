#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, on a CPU or wherever `causal_conv1d` is not installed.
#
# Expected: sequences that `DataCollatorWithFlattening` lays behind each other have the
# logits that each has on its own, or there is an error. Its `position_ids` begin again
# with each sequence, and attention masks by them: Llama gives the same logits.
# Seen: attention of LFM2 and of Qwen3.5 does so too, but the short convolutions of the
# one, and the convolution and the memory of the other, read across the border. All
# but the first sequence of a row get other logits, without a word: the one warning says
# that the fallback in torch "is correct but much slower". Only who also asks the
# collator for `seq_idx`, which is off, gets an error that names the missing package.
#
# The same with turns of different lengths behind a cache: padding in front of a new turn
# is masked, but takes the place of the last tokens in the state of LFM2's convolutions.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet \
  transformers==5.24.0 torch==2.13.0 numpy
cat >"$place/program.py" <<'END_OF_PROGRAM'
import torch
import transformers
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
SEQUENCES = [[5, 17, 20, 31, 8, 9], [3, 1, 4], [20, 21, 7, 2]]


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, 1.0 if weights.ndim == 1 else 0.0, 0.3)
    return model


def report(name, one, other):
    off = float((one - other).abs().max())
    print(f"{name}: {'equal' if off < 1e-3 else 'differ'}")


models = {
    "Llama": made(LlamaForCausalLM, LlamaConfig(**SIZES)),
    "LFM2": made(
        Lfm2ForCausalLM, Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    ),
    "Qwen3.5": made(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig(
            **SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    ),
}  # fmt: skip
batch_of = [{"input_ids": sequence} for sequence in SEQUENCES]
collate = DataCollatorWithFlattening(return_tensors="pt")
print(transformers.__version__)
with torch.no_grad():
    for name, model in models.items():
        batch = collate(batch_of)
        batch.pop("labels")
        packed = model(**batch, use_cache=False).logits[0]
        alone = [model(torch.tensor([one])).logits[0] for one in SEQUENCES]
        first = len(SEQUENCES[0])
        report(f"{name}, first sequence of a row", packed[:first], alone[0])
        report(f"{name}, the others", packed[first:], torch.cat(alone[1:]))
        if name != "Llama":
            asked = DataCollatorWithFlattening(return_seq_idx=True, return_tensors="pt")
            try:
                model(**asked(batch_of), use_cache=False)
            except ValueError as error:
                print(f"{name}, with seq_idx:", str(error).split(".")[0])
    for name in ("Llama", "LFM2"):
        # Two rows of five tokens, then a turn of one token and one of two.
        model, cache = models[name], DynamicCache(config=models[name].config)
        begun = torch.tensor([[5, 17, 20, 31, 8], [3, 1, 4, 9, 6]])
        model(begun, cache=cache)
        mask = torch.tensor([[1] * 5 + [0, 1], [1] * 7])
        places = (mask.cumsum(1) - 1)[:, 5:]
        turn = torch.tensor([[0, 11], [12, 13]])
        given = {"attention_mask": mask, "position_ids": places}
        out = model(turn, **given, cache=cache).logits
        whole = model(torch.tensor([[5, 17, 20, 31, 8, 11]])).logits
        report(f"{name}, the shorter turn", out[0, -1], whole[0, -1])
        whole = model(torch.tensor([[3, 1, 4, 9, 6, 12, 13]])).logits
        report(f"{name}, the longer turn", out[1, -1], whole[0, -1])
END_OF_PROGRAM
HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/program.py" 2>"$place/log" \
  | tee "$place/seen" || { tail -5 "$place/log"; exit 1; }
grep -o "This is correct but much slower" "$place/log" | sort -u | tee -a "$place/seen"
diff "$place/seen" - <<'END_OF_OUTPUT'
5.24.0
Llama, first sequence of a row: equal
Llama, the others: equal
LFM2, first sequence of a row: equal
LFM2, the others: differ
LFM2, with seq_idx: `causal_conv1d_fn` can't keep packed sequences apart without `causal_conv1d`
Qwen3.5, first sequence of a row: equal
Qwen3.5, the others: differ
Qwen3.5, with seq_idx: `causal_conv1d_fn` can't keep packed sequences apart without `causal_conv1d`
Llama, the shorter turn: equal
Llama, the longer turn: equal
LFM2, the shorter turn: differ
LFM2, the longer turn: equal
This is correct but much slower
END_OF_OUTPUT
echo "as described"
