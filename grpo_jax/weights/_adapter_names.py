"""The table between the factors of adapters and the tensors of PEFT."""

import dataclasses
from collections.abc import Collection, Sequence

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.lora import PATHS, kernel_of
from grpo_jax.weights._names import Parameter, parameter_table


def adapter_table(
    config: ModelConfig,
    *,
    rank: int,
    targets: Sequence[str],
    shared: Collection[str] = (),
) -> tuple[Parameter, ...]:
    """Both factors of every adapter, with their tensors in the spelling of PEFT.

    n projections in one tensor of a file have one adapter there, of rank n x `rank`, in
    which each has its own rows of the first factor and its own block of the second. A
    module in `shared` has one of `rank`, of which all read the same first factor.
    """
    kernels = {row.path: row for row in parameter_table(config)}
    rows = []
    for target in targets:
        path = PATHS[target]
        kernel = kernel_of(kernels, target)
        *stack, inward, outward = kernel.shape
        together = [row for row in kernels.values() if row.names == kernel.names]
        if _module(kernel) in shared:
            together = [kernel]
        column, ranks = rank * together.index(kernel), rank * len(together)
        top, *_ = kernel.start or (0,)
        for factor, kind, shape, start, whole in (
            ("a", "lora_A", (inward, rank), (column, 0), (ranks, inward)),
            (
                *("b", "lora_B", (rank, outward), (top, column)),
                (kernel.file_shape[0], ranks),
            ),
        ):
            ending = f".{kind}.weight"
            names = tuple(
                f"base_model.model.{name.removesuffix('.weight')}{ending}"
                for name in kernel.names
            )
            rows.append(
                dataclasses.replace(
                    kernel,
                    path=f"{path}/{factor}",
                    shape=(*stack, *shape),
                    names=names,
                    gguf_names=(),
                    start=start,
                    whole=whole,
                )
            )
    return tuple(rows)


def fused_modules(config: ModelConfig) -> dict[str, list[str]]:
    """Modules of files that are several projections here, and their targets."""
    kernels = {row.path: row for row in parameter_table(config)}
    modules: dict[str, list[str]] = {}
    for target, path in PATHS.items():
        kernel = kernels.get(f"{path}/kernel")
        if kernel is not None and kernel.whole is not None:
            modules.setdefault(_module(kernel), []).append(target)
    return modules


def target_modules(config: ModelConfig, targets: Collection[str]) -> list[str]:
    """The endings of module names by which PEFT finds the targets, and no other module.

    Mostly the last part. In LFM2 two kinds of layers have an `out_proj`.
    """
    kernels = {row.path: row for row in parameter_table(config)}
    chosen = {name for t in targets for name in kernel_of(kernels, t).names}
    others = {name for row in kernels.values() for name in row.names} - chosen

    def ending(name: str) -> str:
        parts = name.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts) - 2, -1, -1))
        found = (end for end in ends if not any(o.endswith(f".{end}") for o in others))
        return next(found).removesuffix(".weight")

    return sorted({ending(name) for name in chosen})


def _module(kernel: Parameter) -> str:
    """The name of the module in files, such as `q_proj`."""
    return kernel.names[0].split(".")[-2]
