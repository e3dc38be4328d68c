"""Tiny models of every kind, and the committed references of transformers."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models._delta import DeltaConfig
from grpo_jax.models._routing import ExpertsConfig
from grpo_jax.models._short_conv import ConvConfig
from grpo_jax.models.cache import per_layer
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params
from grpo_jax.models.rope import RopeConfig
from grpo_jax.weights._names import parameter_table, read_parameter

REFERENCES = pathlib.Path(__file__).parent / "references"
CASES = sorted(path.stem for path in REFERENCES.glob("*.npz"))

PLAIN = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope=(RopeConfig(theta=1000.0),),
    layer_rope=(0, 0),
    layer_window=(None, None),
    tie_embeddings=True,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=None,
    sandwich_norm=False,
    norm_offset=0.0,
    activation="silu",
    attention_scale=8**-0.5,
    embedding_scale=1.0,
    attention_softcap=None,
    logit_softcap=None,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=None,
)
LATE = {"original_max_position_embeddings": 4, "query_beta": 0.5}
# Every option at once: two rotary bases and a layer without, windows, caps, biases.
FULL = dataclasses.replace(
    PLAIN,
    num_layers=3,
    rope=(
        RopeConfig(theta=1000.0, kind="linear", factor=2.0, **LATE),
        RopeConfig(theta=50.0),
    ),
    layer_rope=(1, 0, None),
    layer_window=(3, None, 5),
    tie_embeddings=False,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm="head",
    sandwich_norm=True,
    norm_offset=1.0,
    activation="gelu_tanh",
    attention_scale=0.4,
    embedding_scale=32**0.5,
    attention_softcap=2.0,
    logit_softcap=5.0,
    rotary_fraction=0.5,
    residual_scale=0.7,
    logit_divisor=3.0,
)

# With norms in their other places.
EXPERTS = dataclasses.replace(
    PLAIN,
    experts=ExpertsConfig(count=5, per_token=2, width=12, normalized=True),
    post_norm=True,
    qk_norm="width",
)

HYBRID = dataclasses.replace(
    PLAIN,
    num_layers=4,
    layer_rope=(0,) * 4,
    layer_window=(None,) * 4,
    mixer=DeltaConfig(
        layers=(True, False) * 2,
        key_heads=2,
        value_heads=4,
        key_dim=6,
        value_dim=5,
        kernel=4,
    ),
    attention_gate=True,
    qk_norm="head",
    norm_offset=1.0,
    rotary_fraction=0.5,
)

CONV = dataclasses.replace(
    PLAIN,
    num_layers=4,
    layer_rope=(0,) * 4,
    layer_window=(None,) * 4,
    mixer=ConvConfig(
        layers=(True, False) * 2, channels=PLAIN.hidden_size, groups=2, kernel=3
    ),
    qk_norm="head",
    remat="layer",  # which changes nothing, in any mode
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model with parameters of which none is trivially 0 or 1, and ragged inputs."""

    model: Decoder
    params: dict
    prompts: jax.Array
    lengths: jax.Array
    completions: jax.Array

    @property
    def variables(self):
        return {"params": self.params}


def make_tiny(config):
    model = Decoder(config)
    leaves, tree = jax.tree.flatten(abstract_params(model))
    random = np.random.default_rng(0)
    # Drawn by numpy: compiling the initialization costs more than most tests.
    leaves = [
        jnp.asarray((leaf.ndim < 3) * 0.5 + 0.2 * random.standard_normal(leaf.shape))
        for leaf in leaves
    ]
    draw = lambda shape: jnp.asarray(random.integers(0, 64, shape))  # noqa: E731
    return Tiny(
        model=model,
        params=jax.tree.unflatten(tree, leaves),
        prompts=draw((3, 6)),
        lengths=jnp.array([6, 3, 1]),
        completions=draw((3, 2, 5)),
    )


@pytest.fixture(scope="session", params=["plain", "full"])
def tiny(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["plain", "full", "experts", "hybrid", "conv"])
def any_tiny(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def plain():
    return make_tiny(PLAIN)


@pytest.fixture(scope="session")
def full():
    return make_tiny(FULL)


@pytest.fixture(scope="session")
def experts():
    return make_tiny(EXPERTS)


@pytest.fixture(scope="session")
def hybrid():
    return make_tiny(HYBRID)


@pytest.fixture(scope="session")
def conv():
    return make_tiny(CONV)


@pytest.fixture(scope="session")
def in_layers():
    """A function of caches: separate arrays for each layer, as the engine has them."""

    def separate(stacks):
        return jax.tree.map(lambda x: per_layer(x, len(x)), stacks)

    return separate


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers says about one tiny model."""

    hf: dict
    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    weights: dict[str, np.ndarray]

    def params(self, config):
        table, kind = parameter_table(config), np.dtype(np.float32)
        tensors = {name: ArrayTensor(values) for name, values in self.weights.items()}
        assert {name for row in table for name in row.names} == {*self.weights}
        return nested({r.path: read_parameter(r, tensors, dtype=kind) for r in table})


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor of a file, in memory."""

    values: np.ndarray

    def read(self, index):
        return self.values[index]


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(leaf)
    return tree


@pytest.fixture(scope="session", params=CASES)
def reference(request):
    with np.load(REFERENCES / f"{request.param}.npz") as data:
        weights = {
            name.removeprefix("weights/"): data[name]
            for name in data.files
            if name.startswith("weights/")
        }
        return Reference(
            hf=json.loads(str(data["config"])),
            tokens=data["tokens"],
            lengths=data["lengths"],
            logits=data["logits"],
            weights=weights,
        )
