"""Strict JAX settings and eight virtual CPU devices for every test."""

import ctypes
import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import random
import re
import sys
import tempfile
import threading

from grpo_jax.parallel.compile_cache import _cache_name

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compilation is the cost of a JAX suite. Tiny programs gain nothing from being
# optimized, and a private cache lets processes and the next run share what is compiled.
# By environment, so that the processes that tests start do the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# No one reads from which lines of Python a program was made.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Virtual devices of a machine that does much else wait for each other: after 40 seconds
# XLA would end the process.
if "terminate_timeout" not in os.environ.setdefault("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_collective_call_terminate_timeout_seconds=3600"
    )
# The older emitters compile tiny programs in less than half of the time. Newer
# versions no longer have them, and die of a flag that they do not know.
if (
    importlib.metadata.version("jaxlib").startswith("0.10.")
    and "fusion_emitters" not in os.environ["XLA_FLAGS"]
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    f"{tempfile.gettempdir()}/grpo_jax_test_cache_{os.getuid()}_{_cache_name()}",
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import numpy as np
import pytest

from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.parallel import mesh as meshes

# Time is not what these tests are about, and a run that failed must fail again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(mode=0o700, exist_ok=True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

HERE = pathlib.Path(__file__).parent
# Files of a minute or more, the longest first.
LONGEST = (
    "training/test_torture.py",
    "training/test_processes.py",
    "training/test_loop.py",
    "training/test_meshes.py",
    "planning/test_programs.py",
    "rollout/test_forced.py",
    "rollout/test_carry_over.py",
    "rollout/test_sampler.py",
    "models/test_decoder.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(items):
    """Start with what takes longest, so that no worker is left alone with it."""
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def forgets_programs():
    """Gives the memory of compiled programs back, where there are many.

    JAX keeps each program of each test for ever; what modules share comes back from
    the cache on disk.
    """
    yield
    if resident_bytes() > 2**30:
        jax.clear_caches()
        gc.collect()
        # glibc keeps what is freed, unless it is asked.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


def resident_bytes():
    """The memory of this process; 0 where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class TinyPolicy:
    """A language model of two layers over bytes, none of its parameters trivial."""

    model: object
    params: dict
    tokenizer: object
    folder: pathlib.Path

    @property
    def variables(self):
        return {"params": self.params}


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory):
    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder, abstract_params
    from grpo_jax.weights.pretrained import Pretrained, save_pretrained

    tokenizer = byte_tokenizer()
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.stop_ids[0],
            "pad_token_id": tokenizer.pad_id,
        }
    )
    model = Decoder(config)
    leaves, tree = jax.tree.flatten(abstract_params(model))
    random = np.random.default_rng(0)
    drawn = [
        np.float32((leaf.ndim < 3) * 0.5 + 0.2 * random.standard_normal(leaf.shape))
        for leaf in leaves
    ]
    params = jax.tree.map(jax.numpy.asarray, jax.tree.unflatten(tree, drawn))
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(folder, Pretrained(model, params, tokenizer, config))
    return TinyPolicy(model, params, tokenizer, folder)


@pytest.fixture(scope="session")
def hybrid_policy(tiny_policy):
    """Of two layers, one with a memory in the place of attention. Without a folder."""
    return mixed(
        tiny_policy,
        architectures=["Qwen3_5ForCausalLM"],
        model_type="qwen3_5_text",
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=5,
    )


@pytest.fixture(scope="session")
def conv_policy(tiny_policy):
    """Of three layers, two with a short convolution in the place of attention."""
    return mixed(
        tiny_policy,
        architectures=["Lfm2ForCausalLM"],
        model_type="lfm2",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        norm_eps=1e-5,
        rms_norm_eps=None,
    )


def mixed(tiny_policy, **keys):
    """The tiny policy with other keys of its `config.json`, and other parameters."""
    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder, abstract_params

    hf = tiny_policy.model.config.to_hf() | keys
    hf = {key: value for key, value in hf.items() if value is not None}
    model, random = Decoder(ModelConfig.from_hf(hf)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (x.ndim < 3) * 0.5 + 0.2 * random.standard_normal(x.shape),
        abstract_params(model),
    )
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), params)
    return dataclasses.replace(tiny_policy, model=model, params=params)


@pytest.fixture(scope="session")
def polite_policy(tiny_policy, tmp_path_factory):
    """Answers a text that ends with "=" by "!", and ends its turn; else never ends it.

    Likeliest after a token is what is nearest to it, which "=" and "!" are not.
    """
    from grpo_jax.weights.pretrained import Pretrained, save_pretrained

    tokenizer = tiny_policy.tokenizer
    params = jax.tree.map(np.array, tiny_policy.params)
    # Layers add nothing to the embedding.
    params["layers"]["attn"]["o"]["kernel"][:] = 0.0
    params["layers"]["mlp"]["down"]["kernel"][:] = 0.0
    params["final_norm"]["scale"][:] = 10.0
    table = np.random.default_rng(0).normal(size=(264, 32)).astype(np.float32)
    asks, says = (tokenizer.encode_prompt(text)[0] for text in "=!")
    first, second = np.eye(2, 32, dtype=np.float32)
    table[:, :2] = 0.0  # no other token is near
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    table[asks], table[says] = first, 1.5 * first + 0.9 * second
    table[tokenizer.stop_ids[0]] = 4.0 * second
    params["embed"]["embedding"] = table
    params = jax.tree.map(jax.numpy.asarray, params)
    folder = tmp_path_factory.mktemp("polite") / "model"
    model = tiny_policy.model
    save_pretrained(folder, Pretrained(model, params, tokenizer, model.config))
    return TinyPolicy(model, params, tokenizer, folder)


def byte_tokenizer(chat_template=None):
    """One token per byte, 256 for padding and 257 for the end."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    from grpo_jax.weights.tokenizer import Tokenizer, import_fast_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<pad>", "<end>"])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    wrapped = import_fast_tokenizer()(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<end>"
    )
    wrapped.chat_template = chat_template
    return Tokenizer(wrapped)


@pytest.fixture(scope="session")
def meshes_of():
    """A mesh of the first devices, by its three sizes; each is made once."""
    from grpo_jax.config import MeshConfig
    from grpo_jax.parallel.mesh import make_mesh

    def make(data, fsdp, tensor):
        return make_mesh(
            MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
            devices=jax.devices()[: data * fsdp * tensor],
        )

    return make


def act_on_processes(act, count):
    """What each of several threads gives, which gather as processes do."""
    meeting, parts, results = threading.Barrier(count), [None] * count, [None] * count
    number = threading.local()

    def gathered(values, merge):
        meeting.wait(60.0)
        parts[number.value] = values
        meeting.wait(60.0)
        return merge(parts)

    def rows(values):
        stack = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)  # noqa: E731
        return gathered(values, stack)

    def lists(values):
        return gathered(values, lambda parts: [x for part in parts for x in part])

    def run(index):
        number.value = index
        results[index] = act(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: number.value)
        ours = [m for name, m in sys.modules.items() if name.startswith("grpo_jax.")]
        for module in ours:  # also those that import the functions by name
            for name, gather in (("gather_rows", rows), ("gather_lists", lists)):
                if name in vars(module):
                    patch.setattr(module, name, gather)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


class ScriptedSampler:
    """A sampler without a model: `script(number, sample)` is the text it says.

    Where its completions are answered it says a list of texts, one for each turn.
    """

    def __init__(self, script, tokenizer):
        self.script, self.tokenizer = script, tokenizer
        self.stop = tokenizer.stop_ids[0]
        self.variables, self.versions = None, []

    def update(self, variables, *, version):
        self.variables = variables
        self.versions.append(version)

    def release(self):
        self.variables = None

    def sample(
        self,
        prompts,
        *,
        numbers,
        group_size,
        max_new_tokens,
        ended=None,
        turns=None,
        **_,
    ):
        from grpo_jax.rollout.encoding import unpad
        from grpo_jax.rollout.sampler import Completions

        self.prompts = prompts
        if turns is not None:
            return self.play(numbers, group_size, max_new_tokens, turns)
        own = numbers[meshes.own_share(len(prompts))]
        tokens = np.zeros((len(own), group_size, max_new_tokens), np.int32)
        lengths = np.zeros(tokens.shape[:2], np.int32)
        for n, g in np.ndindex(*lengths.shape):
            text = self.script(own[n], g)
            ids = self.tokenizer.encode_prompt(text)[:max_new_tokens] if text else []
            tokens[n, g, : len(ids)], lengths[n, g] = ids, len(ids)
            if ended is not None and g == group_size - 1:
                ended(n, unpad(tokens[n : n + 1], lengths[n : n + 1])[0])
        return Completions(
            tokens=tokens,
            lengths=lengths,
            logp=np.zeros(tokens.shape, np.float32),
            finished=lengths < max_new_tokens,
        )

    def play(self, numbers, group_size, max_new_tokens, turns):
        from grpo_jax.rollout.sampler import Completions

        own = numbers[meshes.own_share(len(numbers))]
        places = list(np.ndindex(len(own), group_size))
        ids, masks = {at: [] for at in places}, {at: [] for at in places}
        said = {(n, g): iter(self.script(own[n], g)) for n, g in places}
        asked = places
        while asked:
            for n, g in asked:
                turn = [*self.tokenizer.encode_prompt(next(said[n, g])), self.stop]
                turn = turn[: max_new_tokens - len(ids[n, g])]
                ids[n, g] += turn
                masks[n, g] += [True] * len(turn)
                turns.ended(n, g, list(ids[n, g]))
            asked = []
            for n, g, tokens in turns.answers(wait=True):
                if tokens is not None:
                    ids[n, g] += tokens
                    masks[n, g] += [False] * len(tokens)
                    asked.append((n, g))
        lengths = np.array([len(ids[at]) for at in places], np.int32)
        arrays = np.zeros((2, len(places), lengths.max()), np.int32)
        for at, (row, mask) in zip(places, arrays.swapaxes(0, 1), strict=True):
            row[: len(ids[at])], mask[: len(ids[at])] = ids[at], masks[at]
        shape = len(own), group_size
        tokens, sampled = arrays.reshape(2, *shape, -1)
        last = np.array([ids[at][-1] for at in places]).reshape(shape)
        return Completions(
            tokens=tokens,
            lengths=lengths.reshape(shape),
            logp=np.zeros(tokens.shape, np.float32),
            finished=last == self.stop,
            sampled=sampled > 0,
        )


class GuessNumber(TextEnvironment):
    """A number from 1 to 16, which halving finds in five guesses at most."""

    def reset(self, *, seed, **row):
        self.number, self.left = random.Random(seed).randint(1, 16), 5
        return "Guess my number from 1 to 16."

    def step(self, text):
        self.left -= 1
        guesses = re.findall(r"\d+", text)
        found = bool(guesses) and int(guesses[-1]) == self.number
        if found or not self.left:
            return Step(reward=float(found), done=True)
        if not guesses:
            return Step("Give a number.", 0.0)
        lower = int(guesses[-1]) > self.number
        return Step("It is lower." if lower else "It is higher.", 0.0)


@pytest.fixture(scope="session")
def guess_number():
    return GuessNumber


@pytest.fixture(scope="session")
def fake_sampler(tiny_policy):
    return lambda script, tokenizer=tiny_policy.tokenizer: ScriptedSampler(
        script, tokenizer
    )


# Turns of a role and a text; calls as Qwen2.5 writes them, in as few bytes as possible.
CHAT_TEMPLATE = """
{%- for tool in tools or [] %}{{ tool.function.name }}!{% endfor %}
{%- for m in messages %}{{ m.role[0] }}:{{ m.content }}
{%- for call in m.tool_calls or [] -%}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<end>{% endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Over bytes, with a chat template that can call tools."""
    return byte_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def on_processes():
    return act_on_processes
