"""The completions of one process's prompts, by the engine or in one loop."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Key, PyTree

from grpo_jax.models.protocol import LanguageModel, SlotDecoder
from grpo_jax.parallel import mesh as meshes
from grpo_jax.rollout._ended import Told, draw_all, tell
from grpo_jax.rollout._engine import Engine
from grpo_jax.rollout._settings import GroupSettings
from grpo_jax.rollout._together import generate_together
from grpo_jax.rollout.encoding import pad
from grpo_jax.rollout.sampler import Completions
from grpo_jax.rollout.turns import Turns


def complete(
    model: LanguageModel,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    settings: GroupSettings,
    *,
    numbers: np.ndarray,
    key: Key[jax.Array, ""],
    mesh: Mesh | None,
    width: int,
    most: int | None = None,
    batch_size: int | None = None,
    ended: Told | None = None,
    turns: Turns | None = None,
) -> Completions:
    """Completions of this process's prompts; no process has more than `most`."""
    processes = jax.process_count()
    parts = max(1 if mesh is None else meshes.batch_shards(mesh) // processes, 1)
    rows = math.ceil((len(prompts) if most is None else most) / parts)
    group_size = settings.group_size
    at_once = rows * group_size
    if batch_size is not None:
        at_once = min(at_once, max(batch_size // (parts * processes), 1))
    if isinstance(model, SlotDecoder):
        engine = Engine(
            model,
            settings,
            mesh=mesh,
            slots=at_once,
            prompt_tokens=width,
            # Completions that wait for an answer come back.
            streams=turns is not None,
        )
        engine.update(variables)
        groups = engine.add(prompts, numbers.astype(np.uint32).tolist(), key)
        draw_all(engine, groups, group_size=group_size, ended=ended, turns=turns)
        return engine.completions(groups)[0]
    if turns is not None:
        raise ValueError(
            "tools and environments need a model whose sequences can stand at "
            f"different places, got {type(model).__name__}, which has no "
            "`decode_slots`; give one that has (see models/protocol.py)."
        )
    tokens, lengths = pad(
        [*prompts, *[[0]] * (parts * rows - len(prompts))], length=width, pad_id=0
    )
    places = np.zeros(parts * rows, np.uint32)
    places[: len(prompts)] = numbers
    own = [x.reshape(parts, rows, *x.shape[1:]) for x in (tokens, lengths, places)]
    each = max(at_once // group_size, 1)
    drawn = []
    for first in range(0, rows, each):
        of_all = [x[:, first : first + each] for x in own]
        batch: Any = [x.reshape(-1, *x.shape[2:]) for x in of_all]
        if mesh is not None:
            batch = meshes.to_mesh(mesh, batch)
        given = (*batch[:2], key, batch[2])
        part = generate_together(model, variables, *given, settings=settings)
        if mesh is not None:
            # Each process fetches the rows of its own prompts.
            part = jax.device_put(part, batch[1].sharding)
        by_part = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
        drawn.append(jax.tree.map(by_part, meshes.to_host(part)))
        tell(drawn[-1], ended, first=first, rows=rows, count=len(prompts))
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *drawn)
    # Behind the prompts of this process are rows of filling.
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(prompts)], joined)
