"""Writes references/adapter.npz: a tiny random model with adapters, run by PEFT.

Needs torch, transformers 5 and peft: `python tests/weights/make_adapter_reference.py`.
The file holds `config` (config.json as text), the base's state dict under `weights/`
(float16 numbers), both files of the adapter folder that PEFT wrote (`adapter_config` as
text, `adapter_model` as bytes), `tokens` [B, S] and `logits` [B, S, V] with adapters.
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers

FILE = pathlib.Path(__file__).parent / "references" / "adapter.npz"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Makes the file."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    base = transformers.LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            noise = torch.randn(parameter.shape)
            value = parameter + 0.3 * noise if "norm" in name else 0.3 * noise
            parameter.copy_(value.half().float())
    weights = {f"weights/{k}": v.half().numpy() for k, v in base.state_dict().items()}
    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    tokens = torch.randint(0, 48, (2, 11))
    with torch.no_grad():
        logits = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = pathlib.Path(folder)
        text = (path / "adapter_config.json").read_text()
        data = (path / "adapter_model.safetensors").read_bytes()
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE,
        config=np.array(json.dumps(config.to_dict())),
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        adapter_config=np.array(text),
        adapter_model=np.frombuffer(data, np.uint8),
        **weights,
    )


if __name__ == "__main__":
    main()
