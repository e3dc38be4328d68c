"""Every family against transformers itself, on tiny random models: both directions.

Needs torch. `pytest -m parity -o junit_family=xunit1 --junitxml=FILE` writes the
largest errors down, each relative to the spread of the logits.
"""

import dataclasses
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import SamplingConfig
from grpo_jax.models._delta import chunked_delta_rule, delta_rule
from grpo_jax.rollout.generate import generate
from grpo_jax.weights import _safetensors as our_safetensors
from grpo_jax.weights import load_pretrained, save_pretrained

SCRIPT = pathlib.Path(__file__).parents[1] / "models" / "make_references.py"
CASES = sorted(path.stem for path in SCRIPT.parent.glob("references/*.npz"))
MESSAGES = [{"role": "user", "content": "what is 12"}]
NEW = 12  # tokens that are generated

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # torch and transformers have their own
]


@dataclasses.dataclass(frozen=True)
class Live:
    """A model of transformers, and what was loaded of its folder."""

    theirs: object
    ours: object
    folder: pathlib.Path
    rows: list  # token ids of ragged prompts

    @property
    def prompts(self):
        width = max(map(len, self.rows))
        padded = [[*row, *[7] * (width - len(row))] for row in self.rows]
        return jnp.asarray(padded), jnp.asarray([len(row) for row in self.rows])


@pytest.fixture(scope="module", params=CASES)
def live(request, tmp_path_factory, tools):
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_references", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # Another seed than that of the committed references.
    generator = torch.Generator().manual_seed(1000 + CASES.index(request.param))
    theirs = script.random_model(*script.CASES[request.param], generator)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    tools.make_fast().save_pretrained(folder)
    rows = [
        torch.randint(0, 48, (length,), generator=generator).tolist()
        for length in script.LENGTHS
    ]
    return Live(theirs, load_pretrained(folder), folder, rows)


def their_logits(model, row):
    import torch

    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


def our_logits(ours, hidden):
    out = hidden @ ours.model.apply({"params": ours.params}, method=ours.model.head)
    cap = ours.config.logit_softcap
    return np.asarray(out if cap is None else cap * jnp.tanh(out / cap))


def greedy(live):
    """The completions of both, [N, 1, NEW] and [N, NEW]; no token ends one early."""
    import torch

    drawn = generate(
        live.ours.model,
        live.ours.params,
        *live.prompts,
        jax.random.key(0),
        group_size=1,
        max_new_tokens=NEW,
        sampling=SamplingConfig(temperature=0.0, stop_ids=()),
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    live.theirs.generation_config.eos_token_id = None
    theirs = []
    for row in live.rows:
        # Without a mask, transformers hides the tokens of a prompt that are padding's.
        mask = torch.ones(1, len(row), dtype=torch.long)
        inputs = {"input_ids": torch.tensor([row]), "attention_mask": mask}
        theirs.append(live.theirs.generate(**inputs, **options)[0])
    theirs = [
        out[len(row) :].tolist() for out, row in zip(theirs, live.rows, strict=True)
    ]
    return drawn.tokens, np.asarray(theirs)


def test_logits_and_greedy_tokens_are_those_of_transformers(live, record_property):
    ours, worst = live.ours, {"forward": 0.0, "score": 0.0}
    variables = {"params": ours.params}
    prompts, lengths = live.prompts
    tokens, expected = greedy(live)
    np.testing.assert_array_equal(tokens[:, 0], expected)

    def run(method, *args):
        apply = lambda v: ours.model.apply(v, *args, method=method)  # noqa: E731
        return our_logits(ours, jax.jit(apply)(variables))

    plain = run(ours.model.forward, prompts, lengths)
    scored = run(ours.model.score, prompts, lengths, tokens)[:, 0]
    for i, row in enumerate(live.rows):
        theirs = their_logits(live.theirs, [*row, *expected[i].tolist()])
        pairs = {
            "forward": (plain[i, : len(row)], theirs[: len(row)]),
            "score": (scored[i], theirs[len(row) - 1 : -1]),
        }
        for name, (found, wanted) in pairs.items():
            error = float(np.abs(found - wanted).max() / wanted.std())
            worst[name] = max(worst[name], error)
    for name, error in worst.items():
        record_property(name, error)
    assert max(worst.values()) < 1e-4


PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "def fibonacci(n):\n    ",
    "2, 3, 5, 7, 11, 13,",
    "Zwei plus zwei ist",
)
GEMMA = "GRPO_JAX_GEMMA_GGUF"


@pytest.mark.skipif(GEMMA not in os.environ, reason=f"{GEMMA} names no file")
def test_a_gguf_file_answers_as_transformers_that_reads_it():
    """Both dequantize the file by themselves. It needs accelerate."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = pathlib.Path(os.environ[GEMMA])
    ours = load_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    ).eval()
    rows = [ours.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    tokens, expected = greedy(Live(theirs, ours, path.parent, rows))
    np.testing.assert_array_equal(tokens[:, 0], expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_reads_an_export_as_the_same_model(
    live, shards, tmp_path, tools, monkeypatch, record_property
):
    import torch
    import transformers

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(live.ours.params))
    limit, write = -(-size // shards) + 10_000, our_safetensors.write_folder
    monkeypatch.setattr(
        our_safetensors,
        "write_folder",
        lambda folder, tensors: write(folder, tensors, max_shard_bytes=limit // shards),
    )
    out = tmp_path / "out"
    save_pretrained(out, live.ours)
    assert (out / "model.safetensors").exists() == (shards == 1)
    tools.assert_same_bits(load_pretrained(out).params, live.ours.params)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.generation_config.eos_token_id == list(live.ours.tokenizer.stop_ids)
    for row in live.rows:
        expected = their_logits(live.theirs, row)
        error = np.abs(their_logits(theirs.eval(), row) - expected).max()
        record_property("export", float(error / expected.std()))
        # The same numbers through the same code, but perhaps other attention kernels.
        assert error < 1e-5 * expected.std()
    # Not compared with our ids: for Qwen2 transformers puts a pre-tokenizer of its own
    # in the place of the file's, here and in the folder that it wrote itself.
    source, exported = (
        transformers.AutoTokenizer.from_pretrained(place).apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=False
        )
        for place in (live.folder, out)
    )
    assert exported == source


@pytest.mark.parametrize("rule", [delta_rule, chunked_delta_rule])
def test_the_delta_rule_is_that_of_transformers(rule):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    queries, keys, values = draw(2, 70, 2, 6), draw(2, 70, 2, 6), draw(2, 70, 4, 5)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    rest = -np.abs(draw(2, 70, 4)), 1.0 / (1.0 + np.exp(-draw(2, 70, 4)))
    memory = draw(2, 4, 6, 5)
    # Theirs divide queries by the root of their width.
    given = queries * 6**-0.5, keys, values, *rest, memory
    found = jax.jit(rule)(*map(jnp.asarray, given))
    for their_rule in (
        theirs.torch_chunk_gated_delta_rule,
        theirs.torch_recurrent_gated_delta_rule,
    ):
        expected = their_rule(
            *map(torch.tensor, (queries, keys, values, *rest)),
            initial_state=torch.tensor(memory),
            output_final_state=True,
        )
        for ours, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, other.numpy(), atol=2e-5)
