"""The tensors of a text model in the files of a multimodal one."""

from collections.abc import Mapping

from grpo_jax.weights._names import Tensor

# Prefixes of the text model, and what they are in its own files.
_TEXT = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
}
_IMAGES = tuple(
    f"{outer}{part}."
    for outer in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector", "visual")
)
# Layers that predict later tokens, beside the model.
_LATER = "mtp."


def text_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of the text model under their own names; other files as they are.

    What sees images or predicts later tokens is left out. Tensors of other parts stay,
    to be refused.
    """
    tensors = {k: tensor for k, tensor in tensors.items() if not k.startswith(_LATER)}
    if not any(name.startswith(tuple(_TEXT)) for name in tensors):
        return tensors
    return {
        _own_name(name): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_IMAGES)
    }


def _own_name(name: str) -> str:
    for prefix, own in _TEXT.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
