"""Layer types: which of a few kinds of layer each parameter of a model belongs to.

Coordinates of one type share one sequence of quantization levels (QODA, arXiv 2505.14371). The types follow the paper's
ablation, in which embeddings, attention, feed-forward layers and the rest differ in how sensitive they are.

The rules, first match wins:

1. One-dimensional parameters called `bias`, `bias_*` or `*_bias` are `bias`, whichever module owns them.
2. The owning module's class: embeddings, normalisation layers, convolutions, recurrent layers and their cells.
3. Linear layers by position: `output` if named like a head, or if last in the model (unless it is one of a row of equal
   blocks); `attention` or `feed_forward` by the nearest enclosing module that says so; else `feed_forward`.
4. Parameters that modules of other classes hold directly: the same words in the parameter's name; else `other`.

A parameter that several modules share has the type of its first owner, in the order of `model.named_parameters()`: a
language model's output layer tied to its embedding is `embedding`, and no other layer becomes `output` in its place.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from qoda_kernels.errors import RegistryError

LAYER_TYPES = (
    "embedding",
    "attention",
    "feed_forward",
    "convolution",
    "recurrent",
    "norm",
    "bias",
    "output",
    "other",
)

_LINEAR = "linear"  # a class whose type depends on its position; never a result

_TORCH_CLASSES: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("norm", (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)),
    ("convolution", (_ConvNd,)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    (_LINEAR, (nn.Linear, nn.Bilinear)),
)

_NORM_NAME = re.compile(r"norm|^(ln|bn)(_?[0-9a-z]{1,2})?$", re.IGNORECASE)
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
_EMBEDDING_NAME = re.compile(r"embed|^(wte|wpe|shared)$|(^|_)(pos|tok|token)_emb|_tokens?$", re.IGNORECASE)
_CONVOLUTION_NAME = re.compile(r"conv", re.IGNORECASE)
_RECURRENT_NAME = re.compile(r"lstm|gru|rnn", re.IGNORECASE)
_RECURRENT_LEAF = re.compile(r"^weight_(ih|hh|hr)(_|$)")
_ATTENTION_NAME = re.compile(
    r"attn|attention|^(mha|qkv|qkv_proj|[qkvo]_proj|query|key|value|to_[qkv]|to_qkv|to_out)(_weight)?$", re.IGNORECASE
)
_ATTENTION_CLASS = re.compile(r"(Attention|Attn|MHA)$")
_FEED_FORWARD_NAME = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|expert|^(ff|moe|fc[12]|linear[12]|w[123]|c_fc|(gate|up|down|gate_up)_proj)$",
    re.IGNORECASE,
)
_FEED_FORWARD_CLASS = re.compile(r"(MLP|Mlp|FFN|FeedForward|Experts?)$")
_LINEAR_NAME = re.compile(r"^fc|linear|dense|proj", re.IGNORECASE)
_LINEAR_CLASS = re.compile(r"Linear|^Conv1D$")  # Conv1D of the transformers library is a transposed Linear
_OUTPUT_NAME = re.compile(
    r"^(lm_head|classifier|head|heads|score|logits|fc_out|qa_outputs|output_layer|output_projection|embed_out|cls_head)$"
)
_OUTPUT_CLASS = (nn.AdaptiveLogSoftmaxWithLoss,)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lives: modules from the root (name "") to its owner, and its own name and rank there."""

    path: tuple[str, ...]
    modules: tuple[nn.Module, ...] | None  # as long as `path`; None where only names are known
    leaf: str
    shape: tuple[int, ...]

    @property
    def owner(self) -> nn.Module | None:
        return None if self.modules is None else self.modules[-1]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def layer_types(model: nn.Module, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """Layer type of every parameter of a model.

    Args:
        model: any module; look-alikes of well-known classes are recognised by class and parameter names.
        shapes: parameter name -> its shape, where the host keeps only a part of it in each process.

    Returns:
        Parameter name -> one of `LAYER_TYPES`, in the order of `model.named_parameters()`.

    Raises:
        RegistryError: for a lazy parameter that has no shape yet.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {
        name: _place(name, parameter, modules, (shapes or {}).get(name))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    types = _types_of_places(places)
    return {name: types[name] for name, _ in model.named_parameters()}


def layer_types_of_named_parameters(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Layer type of every parameter, from names and shapes alone: for front ends that are given no model.

    Less certain than `layer_types`: a matrix that no word in its name explains counts as `feed_forward`, a vector
    called `weight` as `norm`, and a `weight` of three to five dimensions as `convolution`.

    Args:
        named_parameters: (name, tensor) pairs in the model's order; only the tensors' shapes are read.

    Returns:
        Parameter name -> one of `LAYER_TYPES`, in the order given.

    Raises:
        RegistryError: for a name given twice, or a lazy parameter that has no shape yet.
    """
    places: dict[str, _Place] = {}
    for name, parameter in named_parameters:
        if name in places:
            raise RegistryError(f"parameter name {name!r} is given twice")
        places[name] = _place(name, parameter, None)
    return _types_of_places(places)


def _place(
    name: str,
    parameter: torch.Tensor,
    modules: Mapping[str, nn.Module] | None,
    shape: Sequence[int] | None = None,
) -> _Place:
    if is_lazy(parameter):
        raise RegistryError(f"parameter {name!r} has no shape yet: run the lazy modules once before compressing")
    *owner, leaf = name.split(".")
    if "parametrizations" in owner:  # weight norm and its like: the owner is the module that is parametrized
        position = owner.index("parametrizations")
        owner, leaf = owner[:position], owner[position + 1]
    chain = None if modules is None else tuple(modules[".".join(owner[:depth])] for depth in range(len(owner) + 1))
    return _Place(path=("", *owner), modules=chain, leaf=leaf, shape=tuple(parameter.shape if shape is None else shape))


def _types_of_places(places: Mapping[str, _Place]) -> dict[str, str]:
    types = {name: _type_of(place) for name, place in places.items()}
    output = _last_linear([place for place in places.values() if _is_linear_weight(place)])
    for name, place in places.items():
        if output is not None and place.path == output.path and types[name] == "feed_forward":
            types[name] = "output"
    return types


def _type_of(place: _Place) -> str:
    if _is_bias(place):
        return "bias"
    by_class = _type_of_class(place)
    if by_class == _LINEAR:
        return _type_of_linear(place)
    return by_class or _type_of_name(place)


def _is_bias(place: _Place) -> bool:
    leaf = place.leaf
    return place.ndim <= 1 and (leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias"))


def _type_of_class(place: _Place) -> str | None:
    """Type that the owner's class decides, `_LINEAR` where position decides, None where the class says nothing."""
    owner = place.owner
    if owner is None:
        return None
    for layer_type, classes in _TORCH_CLASSES:
        if isinstance(owner, classes):
            return layer_type
    name = type(owner).__name__
    if place.ndim <= 1:
        return "norm" if _NORM_CLASS.search(name) else None
    if place.ndim == 2 and place.leaf == "weight":
        if "Embedding" in name:
            return "embedding"
        return _LINEAR if _LINEAR_CLASS.search(name) else None
    return "convolution" if place.ndim >= 3 and "Conv" in name else None


def _type_of_linear(place: _Place) -> str:
    role = _role(place)
    if role == "attention":
        return role
    return "output" if _is_named_output(place) else "feed_forward"


def _is_named_output(place: _Place) -> bool:
    if place.modules is not None and any(isinstance(module, _OUTPUT_CLASS) for module in place.modules):
        return True
    return place.ndim >= 2 and _OUTPUT_NAME.search(place.path[-1]) is not None


def _role(place: _Place) -> str | None:
    """`attention` or `feed_forward`, whichever the parameter's own name or the nearest enclosing module says."""
    classes = ("",) * len(place.path) if place.modules is None else tuple(type(m).__name__ for m in place.modules)
    for name, class_name in ((place.leaf, ""), *reversed(list(zip(place.path, classes, strict=True)))):
        if _FEED_FORWARD_NAME.search(name) or _FEED_FORWARD_CLASS.search(class_name):
            return "feed_forward"
        if _ATTENTION_NAME.search(name) or _ATTENTION_CLASS.search(class_name):
            return "attention"
    return None


def _type_of_name(place: _Place) -> str:
    """Type of a parameter whose owner's class says nothing, or is not known."""
    words = (place.leaf, place.path[-1])
    if _RECURRENT_LEAF.search(place.leaf):
        return "recurrent"
    if place.ndim <= 1 and _says(_NORM_NAME, words):
        return "norm"
    if place.modules is None and place.ndim == 1 and place.leaf == "weight":
        return "norm"
    if _is_named_output(place):
        return "output"
    if place.ndim >= 1 and _says(_EMBEDDING_NAME, words) and not _looks_like_convolution(place):
        return "embedding"
    return _role(place) or _type_of_shape(place, words)


def _type_of_shape(place: _Place, words: tuple[str, str]) -> str:
    if place.ndim < 2:
        return "other"
    if _looks_like_convolution(place) or (place.ndim >= 3 and _says(_CONVOLUTION_NAME, words)):
        return "convolution"
    if _says(_RECURRENT_NAME, words):
        return "recurrent"
    is_plain_matrix = place.modules is None and place.ndim == 2 and place.leaf == "weight"
    return "feed_forward" if is_plain_matrix or _says(_LINEAR_NAME, words) else "other"


def _looks_like_convolution(place: _Place) -> bool:
    return place.modules is None and place.leaf == "weight" and 3 <= place.ndim <= 5


def _says(pattern: re.Pattern[str], words: Iterable[str]) -> bool:
    return any(pattern.search(word) for word in words)


def _is_linear_weight(place: _Place) -> bool:
    if place.ndim < 2 or place.leaf not in ("weight", "weight_v"):  # weight_v: torch.nn.utils.weight_norm
        return False
    if place.modules is None:
        return _type_of(place) in ("feed_forward", "attention", "output")
    return _type_of_class(place) == _LINEAR


def _last_linear(linears: Sequence[_Place]) -> _Place | None:
    """The last linear layer's weight, unless it is one of a row of equal blocks: a bare encoder has no output layer."""
    if not linears:
        return None
    last = linears[-1]
    for position, component in enumerate(last.path[:-1]):
        if component.isdigit() and any(_differ_only_at(position, last, other) for other in linears[:-1]):
            return None
    return last


def _differ_only_at(position: int, one: _Place, other: _Place) -> bool:
    def without(place: _Place) -> tuple[str, ...]:
        return place.path[:position] + place.path[position + 1 :]

    return len(one.path) == len(other.path) and without(one) == without(other) and one.shape == other.shape
