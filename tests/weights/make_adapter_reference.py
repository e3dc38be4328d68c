"""Writes references/adapter*.npz: tiny random models with adapters, run by PEFT.

Needs torch, transformers 5 and peft: `python tests/weights/make_adapter_reference.py`.
Each file holds `config` (config.json as text), the base's state dict under `weights/`
(float16 numbers), both files of the adapter folder that PEFT wrote (`adapter_config` as
text, `adapter_model` as bytes), `tokens` [B, S] and `logits` [B, S, V] with adapters.
The adapters of experts are in the spelling of transformers 4. PEFT only reads it.
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import safetensors.torch
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "references"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def main() -> None:
    """Makes the files."""
    write_dense()
    write_experts()


def write_dense() -> None:
    """Makes the file of a model without experts, whose adapters PEFT wrote."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        intermediate_size=24, architectures=["LlamaForCausalLM"], **SIZES
    )
    base = randomized(transformers.LlamaForCausalLM(config))
    weights = weights_of(base)
    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        write("adapter", config, weights, model, pathlib.Path(folder))


def write_experts() -> None:
    """Makes the file of a mixture, with an adapter for each expert."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        intermediate_size=24,
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        head_dim=8,
        architectures=["Qwen3MoeForCausalLM"],
        **SIZES,
    )
    base = randomized(transformers.Qwen3MoeForCausalLM(config))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base.save_pretrained(folder)  # with a tensor for each expert
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights = {f"weights/{k}": v.half().numpy() for k, v in weights.items()}
        adapter = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        adapter.save_pretrained(folder)
        tensors = {}
        for layer in range(2):
            place = f"base_model.model.model.layers.{layer}"
            modules = {f"{place}.self_attn.q_proj": (16, 32)}
            modules |= {f"{place}.self_attn.{n}_proj": (16, 16) for n in "kv"}
            modules |= {f"{place}.self_attn.o_proj": (32, 16)}
            for expert in range(3):
                own = f"{place}.mlp.experts.{expert}"
                modules |= {f"{own}.{n}_proj": (16, 12) for n in ("gate", "up")}
                modules |= {f"{own}.down_proj": (12, 16)}
            for module, (inward, outward) in modules.items():
                tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(3, inward)
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(outward, 3)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        write("adapter_experts", config, weights, model, folder)


def randomized(base):
    """The model with float16 numbers of which none is trivially 0 or 1."""
    with torch.no_grad():
        for name, parameter in base.eval().float().named_parameters():
            noise = torch.randn(parameter.shape)
            value = parameter + 0.3 * noise if "norm" in name else 0.3 * noise
            parameter.copy_(value.half().float())
    return base


def weights_of(base):
    """The state dict, by the names in the file."""
    return {f"weights/{k}": v.half().numpy() for k, v in base.state_dict().items()}


def write(name, config, weights, model, folder) -> None:
    """Writes one file, with the logits of random tokens."""
    tokens = torch.randint(0, 48, (2, 11))
    with torch.no_grad():
        logits = model(tokens).logits
    text = (folder / "adapter_config.json").read_text()
    data = (folder / "adapter_model.safetensors").read_bytes()
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        config=np.array(json.dumps(config.to_dict())),
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        adapter_config=np.array(text),
        adapter_model=np.frombuffer(data, np.uint8),
        **weights,
    )


if __name__ == "__main__":
    main()
