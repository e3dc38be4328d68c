"""What the compiled programs hold and move: no whole parameter, what was estimated."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from grpo_jax.config import MeshConfig, SamplingConfig, TrainConfig
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, abstract_params, param_axes
from grpo_jax.models.limits import cache_columns
from grpo_jax.objective import chunked_logprobs
from grpo_jax.parallel import mesh as meshes
from grpo_jax.parallel.collectives import matmul_over_fsdp, whole_over_fsdp
from grpo_jax.planning.memory import estimate, evaluation_batch
from grpo_jax.rollout import _loop as token_loop
from grpo_jax.rollout import _programs as engine
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.training.optimizer import make_optimizer
from grpo_jax.training.state import Batch, TrainState
from grpo_jax.training.step import make_train_step, score_batch

pytestmark = pytest.mark.slow

# Sizes that no activation has, so that an array of a parameter is known by its shape.
MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 4608,
        "hidden_size": 72,
        "intermediate_size": 176,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
)
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 4, 32, 64
WHILE_BODY = re.compile(r"body=%?([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


class Programs:
    """The programs of a run on a mesh, compiled from shapes alone."""

    def __init__(self, mesh, remat="none"):
        self.mesh = mesh
        sizes = dict(zip(meshes.AXES, mesh.devices.shape, strict=True))
        self.config = TrainConfig(
            model="tiny",
            prompts_per_step=PROMPTS,
            group_size=GROUP,
            max_prompt_tokens=PROMPT_TOKENS,
            max_new_tokens=NEW_TOKENS,
            remat=remat,
            mesh=MeshConfig(**sizes, sampler="gathered"),
        )
        config = dataclasses.replace(MODEL, remat=remat)
        self.model = Decoder(config)
        shapes = abstract_params(self.model)
        places = meshes.parameter_shardings(param_axes(self.model), shapes, mesh)
        self.params = jax.tree.map(self._placed, shapes, places)
        self.gathered = jax.tree.map(
            self._placed, shapes, jax.tree.map(whole_over_fsdp, places)
        )
        self.estimate = estimate(config, self.config, mesh)

    def step(self):
        tx = make_optimizer(self.config.optimizer, total_updates=9)
        everywhere = meshes.replicated(self.mesh)

        def moments(tree):  # parameters' moments lie as they do, counts everywhere
            if isinstance(tree, dict):
                return self.params
            return self._placed(tree, everywhere)

        opt_state = jax.tree.map(
            moments,
            jax.eval_shape(tx.init, self.params),
            is_leaf=lambda tree: isinstance(tree, dict),
        )
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        state = TrainState(step=count, params=self.params, opt_state=opt_state)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(self.model, tx, self.config)
        return self._compile(
            jax.jit(
                functools.partial(step, places=places.params),
                donate_argnums=0,
                out_shardings=(places, None),
            ),
            state,
            self._batch(),
        )

    def score(self):
        score = functools.partial(score_batch, self.model, self.config)
        rows = meshes.batch_sharding(self.mesh)
        scored = jax.jit(score, out_shardings=rows)
        return self._compile(scored, {"params": self.params}, self._batch())

    def generate(self, params, *, apart, prompts=PROMPTS, group=GROUP, refills=False):
        """The loop with all columns; with `refills` others wait for a slot."""
        parts = meshes.batch_shards(self.mesh)
        slots = prompts * group // parts
        waiting = slots // 2 if refills else 0
        rows = (slots + waiting) // group
        how = {"unrolled": apart}
        given = {"params": params}
        made = self._made(engine.changed, self.model, given, **how)
        ready = engine.with_given(made, given)
        cache, block = (
            self._keys_and_values(*shape, **how)
            for shape in ((slots, NEW_TOKENS), (rows, PROMPT_TOKENS))
        )
        of_parts = functools.partial(self._rows, prompts=parts)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)

        def held(count):
            kinds = (jnp.int32, (count,)), (jnp.uint32, (count, 2))
            integers, keys = (of_parts(*shape, dtype=kind) for kind, shape in kinds)
            return token_loop.Held(*[integers] * 3, keys)

        start = token_loop.Start(
            held=held(slots),
            fed=of_parts(slots),
            index=of_parts(slots),
            column=scalar,
            queue=held(waiting) if refills else None,
            queued=of_parts(),
            floors=of_parts(),
            fewer=scalar,
        )
        return self._compile(
            token_loop.advance,
            self.model,
            ready,
            of_parts(rows, MODEL.hidden_size, dtype=jnp.float32),
            block,
            cache,
            start,
            settings=GroupSettings(
                group_size=group,
                max_new_tokens=NEW_TOKENS,
                sampling=SamplingConfig(),
                stop_ids=(1,),
            ),
            turns=NEW_TOKENS,
            impl="threefry2x32",
            aligned=not refills,
        )

    def sampling_peak(self, params, *, prompts, group, ahead=0):
        """Bytes while prompts are computed, the ring grows, and tokens are drawn."""
        parts = meshes.batch_shards(self.mesh)
        slots, rows = prompts * group // parts, (prompts + ahead) // parts
        how = {"unrolled": True}
        of_parts = functools.partial(self._rows, prompts=parts)
        kept = cache_columns(NEW_TOKENS, 0)
        assert kept < NEW_TOKENS
        half, whole, block = (
            self._keys_and_values(*shape, **how)
            for shape in ((slots, kept), (slots, NEW_TOKENS), (rows, PROMPT_TOKENS))
        )
        last = of_parts(rows, MODEL.hidden_size, dtype=jnp.float32)
        prefill = self._compile(
            engine.prefill,
            self.model,
            {"params": params},
            of_parts(rows, PROMPT_TOKENS),
            of_parts(rows),
            of_parts(rows),
            block,
            last=last,
            **how,
        )
        widen = self._compile(engine.widen, half, of_parts(), columns=NEW_TOKENS)
        loop = self.generate(
            params, apart=True, prompts=prompts, group=group, refills=ahead > 0
        )
        # Also the layers as the loop reads them; other weights it shares.
        always = bytes_of([params, params["layers"], block, last])
        return max(
            always + bytes_of(half) + own_bytes(prefill),
            always + bytes_of(half) + own_bytes(widen),
            always + bytes_of(whole) + own_bytes(loop),
        )

    def _keys_and_values(self, rows, columns, **how):
        parts = meshes.batch_shards(self.mesh)
        how = {"parts": parts, "rows": rows, "columns": columns, **how}
        return self._made(engine.empty, self.model, **how)

    def _made(self, function, *arguments, **options):
        """The arrays that a program makes, as shapes where it lays them."""
        compiled = self._compile(function, *arguments, **options)
        return jax.tree.map(self._placed, compiled.out_info, compiled.output_shardings)

    def _compile(self, function, *arguments, **options):
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(meshes.RULES):
            return function.lower(*arguments, **options).compile()

    def _batch(self):
        tokens = (GROUP, NEW_TOKENS)
        return Batch(
            prompts=self._rows(PROMPT_TOKENS),
            prompt_lengths=self._rows(),
            completions=self._rows(*tokens),
            mask=self._rows(*tokens, dtype=bool),
            advantages=self._rows(GROUP, dtype=jnp.float32),
            sampler_logp=self._rows(*tokens, dtype=jnp.float32),
            ref_logp=self._rows(*tokens, dtype=jnp.float32),
        )

    def _rows(self, *shape, dtype=jnp.int32, prompts=PROMPTS):
        row = jax.ShapeDtypeStruct((prompts, *shape), dtype)
        return self._placed(row, meshes.batch_sharding(self.mesh))

    @staticmethod
    def _placed(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def whole_leaves(compiled):
    """Shapes of parameters that the program of one device has whole, axes sorted."""
    leaves = jax.tree.leaves(abstract_params(Decoder(MODEL)))
    wanted = {tuple(sorted(leaf.shape)) for leaf in leaves if leaf.size > 1000}
    shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    there = {tuple(sorted(int(n) for n in s.split(",") if n != "1")) for s in shapes}
    return wanted & there


def loops(compiled):
    """Of each loop the lines of its body, and of all computations that it calls."""
    lines, name = {}, ""
    for line in compiled.as_text().splitlines():
        if start := COMPUTATION.match(line):
            name = start[1]
        lines.setdefault(name, []).append(line)
    for body in set(WHILE_BODY.findall(compiled.as_text())):
        inside, waiting = set(), {body}
        while waiting:
            inside.add(name := waiting.pop())
            waiting |= set(CALLED.findall("\n".join(lines.get(name, ())))) - inside
        yield [line for name in inside for line in lines.get(name, ())]


def made(lines, operation):
    """Shapes of the results of an operation, axes sorted, without ones."""
    result = re.compile(rf"= \w+\[([\d,]*)\]\S* {operation}(?:-start)?\(")
    shapes = [match[1].split(",") for line in lines if (match := result.search(line))]
    return {tuple(sorted(int(n) for n in s if n not in ("", "1"))) for s in shapes}


def gathered_in_loops(compiled):
    """Shapes that are gathered at every turn of a loop."""
    return set().union(*(made(lines, "all-gather") for lines in loops(compiled)))


LAYER = {(72, 96), (48, 72), (72, 176)}  # q and o; k and v; gate, up and down


@pytest.fixture(scope="module")
def programs(meshes_of):
    return Programs(meshes_of(1, 8, 1), remat="none")


@pytest.fixture(scope="module")
def step(programs):
    return programs.step()


@pytest.fixture(scope="module")
def score(programs):
    return programs.score()


@pytest.fixture(scope="module")
def generate(programs):
    return programs.generate(programs.gathered, apart=True)


@pytest.fixture(scope="module")
def refilling(programs):
    return programs.generate(programs.gathered, apart=True, refills=True)


def test_training_and_scoring_gather_a_layer_at_a_time(step, score):
    for program in (step, score):
        assert not whole_leaves(program)
        assert gathered_in_loops(program) >= LAYER


def test_what_has_a_number_per_token_is_not_gathered_for_each_chunk(step, score):
    assert PROMPTS * GROUP * NEW_TOKENS == 4 * 1024  # four chunks of logits
    for program in (step, score):
        assert (1024,) not in gathered_in_loops(program)


def test_a_gradient_over_fsdp_is_split_and_the_same(meshes_of):
    def score(hidden, head, tokens):
        return {"chosen": jnp.sin(hidden @ head).sum(axis=-1) * tokens}

    def total(hidden, head, tokens, over):
        return over(score, hidden, head, tokens)["chosen"].sum()

    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (8, 3, 16))
    head, tokens = jax.random.normal(keys[1], (16, 64)), jnp.arange(24).reshape(8, 3)
    plain = functools.partial(total, over=lambda f, *arrays: f(*arrays))
    wanted = jax.grad(plain, argnums=(0, 1))(hidden, head, tokens)
    mesh = meshes_of(2, 4, 1)
    with jax.set_mesh(mesh):
        split = jax.device_put((hidden, head, tokens), meshes.batch_sharding(mesh))
        over = functools.partial(total, over=matmul_over_fsdp)
        found = jax.jit(jax.grad(over, argnums=(0, 1)))(*split)
    assert found[0].sharding.spec == P(("data", "fsdp"))
    for one, other in zip(found, wanted, strict=True):
        most = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5 * most)


def test_a_head_is_gathered_for_no_number_of_tokens(meshes_of):
    """Each chunk would gather it, and sum its gradient over the devices."""

    def loss(hidden, head, tokens):
        return matmul_over_fsdp(chunked_logprobs, hidden, head, tokens).logp.sum()

    mesh = meshes_of(1, 8, 1)
    with jax.set_mesh(mesh):
        batch = meshes.batch_sharding(mesh)
        columns = jax.sharding.NamedSharding(mesh, P("fsdp"))
        hidden = jax.ShapeDtypeStruct((8, 512, 48), jnp.float32, sharding=batch)
        tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=batch)
        head = jax.ShapeDtypeStruct((48, 256), jnp.float32, sharding=columns)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = gradient.lower(hidden, head, tokens).compile()
    lines = compiled.as_text().splitlines()
    assert list(loops(compiled))
    for operation in ("all-gather", "all-reduce"):
        assert (48, 256) not in made(lines, operation)
    assert (8, 48, 512) in made(lines, "all-gather")


@pytest.mark.parametrize("loop", ["generate", "refilling"])
def test_sampling_gathers_nothing_in_its_loop(loop, request):
    assert not gathered_in_loops(request.getfixturevalue(loop))


def copies_of_a_cache(compiled, *, shards, rows, heads=4):
    """Copies of a layer's cache or prompts in the loops that write the cache."""
    slots = PROMPTS * GROUP // shards
    shapes = [(slots, heads, NEW_TOKENS, 12), (rows, heads, PROMPT_TOKENS, 12)]
    cache, prompts = (tuple(sorted(shape)) for shape in shapes)
    decoding = [x for x in loops(compiled) if cache in made(x, "dynamic-update-slice")]
    assert decoding
    return [{cache, prompts} & made(lines, "copy") for lines in decoding]


def test_sampling_writes_its_cache_in_place_and_copies_no_prompt(generate):
    assert not any(copies_of_a_cache(generate, shards=8, rows=PROMPTS // 8))


def test_refilled_slots_write_in_place_as_well(refilling):
    assert not any(copies_of_a_cache(refilling, shards=8, rows=3))


@pytest.mark.parametrize("refills", [False, True])
def test_a_cache_is_written_in_place_where_heads_are_split(meshes_of, refills):
    programs = Programs(meshes_of(2, 2, 2))
    loop = programs.generate(programs.gathered, apart=True, refills=refills)
    assert not gathered_in_loops(loop) & (LAYER | {(72, 4608)})
    rows = (PROMPTS + refills * PROMPTS // 2) // 4
    assert not any(copies_of_a_cache(loop, shards=4, heads=2, rows=rows))


def test_a_copied_cache_would_be_seen():
    def loop(cache):
        write = lambda i, x: jnp.flip(x, 0).at[i].set(1.0)  # noqa: E731
        return jax.lax.fori_loop(0, 3, write, cache)

    cache = jax.ShapeDtypeStruct((5, 7, 11), jnp.float32)
    (lines,) = loops(jax.jit(loop).lower(cache).compile())
    assert (5, 7, 11) in made(lines, "copy")


def test_a_split_sampler_gathers_a_layer_at_a_time(programs):
    program = programs.generate(programs.params, apart=False)
    # Embedding and head serve all tokens: they are gathered before the loop.
    assert whole_leaves(program) == {(72, 4608)}
    assert gathered_in_loops(program) >= LAYER


def test_a_gathered_stack_would_be_seen(programs, meshes_of):
    kernel = programs.params["layers"]["mlp"]["up"]["kernel"]
    everywhere = meshes.replicated(meshes_of(1, 8, 1))

    def gathers(kernel):
        return 2.0 * jax.lax.with_sharding_constraint(kernel, everywhere)

    seen = jax.jit(gathers).lower(kernel).compile()
    assert whole_leaves(seen) == {(5, 72, 176)}


def test_a_sharding_loses_its_split_over_fsdp_alone(meshes_of):
    def without(*axes):
        place = jax.sharding.NamedSharding(meshes_of(2, 2, 2), P(*axes))
        return whole_over_fsdp(place).spec

    assert without(None, "fsdp", "tensor") == P(None, None, "tensor")
    assert without(("data", "fsdp"), "tensor") == P(("data",), "tensor")
    assert without(("fsdp",)) == P(None)


def bytes_of(shapes):
    """Bytes on one device."""
    leaves = jax.tree.leaves(shapes)
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
    return sum(n * x.dtype.itemsize for n, x in zip(sizes, leaves, strict=True))


def own_bytes(compiled):
    """What a program needs beside its arguments."""
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + made


def within_a_factor_of_two(taken, estimate, phase):
    estimated = sum(estimate.phases[phase].values())
    assert taken / 2 < estimated < taken * 2, (taken, estimated)


def test_the_estimate_is_what_xla_asks_for(programs, step, score):
    estimate = programs.estimate
    # The results of an update take the place of the state.
    memory = step.memory_analysis()
    within_a_factor_of_two(memory.temp_size_in_bytes, estimate, "update")
    within_a_factor_of_two(own_bytes(score), estimate, "score")
    sampling = programs.sampling_peak(programs.gathered, prompts=PROMPTS, group=GROUP)
    within_a_factor_of_two(sampling, estimate, "rollout")
    state = estimate.always["parameters"] + estimate.always["optimizer moments"]
    assert memory.argument_size_in_bytes == pytest.approx(state, rel=0.1)  # and batch


def test_the_estimate_holds_on_one_device_with_layers_computed_again(meshes_of):
    programs = Programs(meshes_of(1, 1, 1), remat="layer")
    taken = programs.step().memory_analysis().temp_size_in_bytes
    within_a_factor_of_two(taken, programs.estimate, "update")


def test_the_estimate_of_an_evaluation_is_what_xla_asks_for(programs):
    batch = evaluation_batch(MODEL, programs.config, programs.mesh)
    assert programs.config.eval_prompts >= batch + batch // 2
    taken = programs.sampling_peak(
        programs.gathered, prompts=batch, group=1, ahead=batch // 2
    )
    within_a_factor_of_two(taken, programs.estimate, "evaluation")
