"""Finds which tensors read and write the residual stream of a decoder, and rotates the stream.

Legend: D hidden size, O out_features, I in_features, R an orthogonal D x D matrix, d head_dim.

Idea
    Rotating the stream (x -> x R everywhere) changes no output if everything that touches it is
    rotated too:
    what writes it      W <- R^T W, b <- R^T b; embeddings and image features v <- v R
    what reads it       W <- W R
    RMSNorms            commute with R once their gain is folded into the readers

How the tensors are found
    The decoder runs on four tokens (on the meta device, if the model lies there), and hooks record
    which tensor goes from where to where. So no architecture is named. Found by name are only:
    q/k/v/o_proj of attention modules, down_proj, and what feeds images into a text decoder
    (multi_modal_projector, image_newline; a vision_tower feeds only the projector).
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..numerics.rotations import hadamard
from .decoder import block_prefixes, decoder_of, quantizable, watch_inputs

CHUNK_ROWS = 4096  # rows rotated at a time, because an embedding in fp64 is four times its bf16
_TOKENS = 4
Rotate = Callable[[Tensor], Tensor]  # a rotation: x [..., n] -> x R, differentiable


@dataclass(frozen=True)
class Residual:
    """Full names of the modules around the residual stream.

    The names of parameters are these with `.weight` or `.bias`.
    """

    width: int  # D
    head_dim: int
    embedding: str
    head: str
    tied: bool  # embedding and head are one matrix
    # The weight that gives a norm no gain: 1, or 0 if its gain is 1 + weight.
    norms: dict[str, float]
    readers: dict[str, str]  # linear (and head) -> the norm it reads the stream through
    writers: frozenset[str]  # linears whose output is added to the stream, or is part of it
    vectors: frozenset[str]  # parameters that are themselves vectors of the stream
    values: dict[str, int]  # v_proj -> index of its block
    outputs: dict[str, int]  # o_proj -> index of its block


def residual_of(model: nn.Module) -> Residual:
    """Find what touches the residual stream of `model`.

    LLQError that names the place if no rotation of the stream leaves the model's outputs as they
    are.
    """
    # 1. Run the decoder and record which norm's output each linear reads.
    decoder_name, decoder = decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise LLQError(f"{type(model).__name__} has no output embeddings: it cannot be rotated")
    width = int(embedding.weight.shape[1])
    linears = quantizable(model)
    flow = _Flow.record(decoder, width, linears)

    # 2. Sort the linears of all blocks into readers and writers of the stream.
    projections = _Projections.of(model)
    readers: dict[str, str] = {}
    writers: set[str] = set()
    for name in linears:
        norm = flow.norm_before(name)
        if norm is not None:
            readers[name] = names[id(norm)]
        elif name in projections.outputs or name.endswith("down_proj"):
            writers.add(name)
        else:
            raise LLQError(
                f"{name} reads the residual stream past its norm, or none of it: "
                "it cannot be rotated"
            )

    # 3. Check that every norm of the stream feeds readers only, and commutes with rotations.
    if not flow.ends_in_norm:
        raise LLQError("the decoder does not end in a norm: its residual stream cannot be rotated")
    readers[names[id(head)]] = names[id(flow.last_norm)]
    norms: dict[str, float] = {}
    for norm in flow.norms:
        name = names[id(norm)]
        if name in readers.values():
            norms[name] = _unit_weight(norm, name)
        elif f"{name}.weight" not in projections.norm_weights:
            raise LLQError(
                f"{name} feeds no linear (it may follow a block's output): "
                "no rotation passes through it"
            )

    # 4. Check that value and output projections are where a Llama has them.
    head_dim = projections.checked_head_dim(readers)

    # 5. Check that every other parameter is known to have nothing to do with the stream.
    fed, vectors = _image_inputs(model, decoder_name, names[id(head)], width)
    modules = (*readers, *writers, *norms, *fed)
    known = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    known |= projections.norm_weights | vectors | {f"{names[id(embedding)]}.weight"}
    _check_others(model, known)
    return Residual(
        width=width,
        head_dim=head_dim,
        embedding=names[id(embedding)],
        head=names[id(head)],
        tied=head.weight is embedding.weight,
        norms=norms,
        readers=readers,
        writers=frozenset(writers | fed),
        vectors=frozenset(vectors),
        values=projections.values,
        outputs=projections.outputs,
    )


@dataclass
class _Projections:
    """The value and output projections of all attention modules, found by their names.

    norm_weights: weights of norms that stand after the projections, not in the stream.
    """

    values: dict[str, int] = field(default_factory=dict)  # v_proj -> index of its block
    outputs: dict[str, int] = field(default_factory=dict)  # o_proj -> index of its block
    head_dims: set[int] = field(default_factory=set)
    norm_weights: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> _Projections:
        found = cls()
        for index, prefix in enumerate(block_prefixes(model)):
            for name, module in model.get_submodule(prefix).named_modules():
                if hasattr(module, "q_proj"):
                    path = f"{prefix}.{name}."
                    found.values[path + "v_proj"] = index
                    found.outputs[path + "o_proj"] = index
                    found.head_dims.add(int(getattr(module, "head_dim", 0)))
                    found.norm_weights |= {f"{path}{norm}.weight" for norm in ("q_norm", "k_norm")}
        return found

    def checked_head_dim(self, readers: Mapping[str, str]) -> int:
        """The one head_dim. LLQError unless values read the stream and outputs do not."""
        for path in (*self.values, *self.outputs):
            if (path in readers) is not (path in self.values) or len(self.head_dims) != 1:
                raise LLQError(
                    f"{path} does not stand where the value and output projections of a Llama do"
                )
        return next(iter(self.head_dims))


def _check_others(model: nn.Module, known: set[str]) -> None:
    """LLQError for a parameter that is neither known nor apart from the stream."""
    for name, parameter in model.named_parameters():
        if name not in known and not _apart(name) and parameter.ndim > 0:
            raise LLQError(
                f"{name} is not known to leave the residual stream alone: "
                "the model cannot be rotated"
            )


class _Flow:
    """Record of one forward pass through the decoder: which norm's output each linear reads."""

    def __init__(self, norms: list[nn.Module]) -> None:
        self.norms = norms
        # The list keeps the tensors alive: a freed one's identity could be reused.
        self.results: list[tuple[Tensor, nn.Module]] = []
        self.inputs: dict[str, Tensor] = {}  # by name of the linear
        self.end: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def record(cls, decoder: nn.Module, width: int, linears: Mapping[str, nn.Linear]) -> _Flow:
        """Run the decoder on a few tokens and record its norms and linears."""
        flow = cls([m for m in decoder.modules() if _is_norm(m, width)])
        device = next(decoder.parameters()).device
        dtype = next(decoder.parameters()).dtype
        # With a ready-made mask no code reads values, of which the meta device has none.
        inputs = {
            "input_ids": torch.zeros(1, _TOKENS, dtype=torch.long, device=device),
            "attention_mask": torch.zeros(1, 1, _TOKENS, _TOKENS, device=device, dtype=dtype),
            "position_ids": torch.arange(_TOKENS, device=device)[None],
        }
        try:
            with ExitStack() as hooks:
                for norm in flow.norms:
                    hooks.enter_context(norm.register_forward_hook(flow._add_result))
                hooks.enter_context(watch_inputs(linears, flow.inputs.__setitem__))
                flow.end = decoder(**inputs, use_cache=False)[0]
        except (RuntimeError, NotImplementedError) as error:
            raise LLQError(
                f"the decoder cannot be run to find its residual stream ({error})"
            ) from error
        return flow

    def _add_result(self, norm: nn.Module, args: Any, out: Tensor) -> None:
        self.results.append((out, norm))

    def norm_before(self, linear: str) -> nn.Module | None:
        """The norm whose output the linear of this name reads, or None."""
        x = self.inputs.get(linear)
        return next((norm for out, norm in self.results if out is x), None)

    @property
    def ends_in_norm(self) -> bool:
        return self.results[-1][0] is self.end if self.results else False

    @property
    def last_norm(self) -> nn.Module:
        return self.results[-1][1]


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether it is a module without children whose weight is a vector of the stream's width."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,) and not list(module.children())


@torch.no_grad()
def _unit_weight(norm: nn.Module, name: str) -> float:
    """The weight (1 or 0) with which the norm commutes with rotations, tried on one rotation.

    LLQError if neither does.
    """
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    # What spreads a model over GPUs would send the probe's input to the norm's.
    probe._forward_pre_hooks.clear()
    probe.__dict__.pop("forward", None)
    weight: Any = probe.weight
    rotate = hadamard(len(weight), torch.device("cpu")).apply
    # The mean of 1 exposes a LayerNorm, which would subtract it.
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)) + 1
    for unit in (1.0, 0.0):
        weight.fill_(unit)
        plain, rotated = probe(x), probe(rotate(x))
        weight.fill_(unit + 1)
        doubled = torch.allclose(probe(x), 2 * plain)
        commutes = torch.allclose(rotated, rotate(plain), atol=1e-4)
        if plain.any() and doubled and commutes and _has_weight_only(probe):
            return unit
    raise LLQError(
        f"{name} ({type(norm).__name__}) is no RMSNorm without bias: "
        "rotations do not pass through it"
    )


def _has_weight_only(norm: nn.Module) -> bool:
    """Whether a norm has no parameter but its weight."""
    return len(list(norm.parameters())) == 1


def _image_inputs(
    model: nn.Module, decoder: str, head: str, width: int
) -> tuple[set[str], set[str]]:
    """(linears, vectors) outside the text decoder whose values go into its stream."""
    linears, vectors = set(), set()
    for name, module in model.named_modules():
        if name.split(".")[-1] == "multi_modal_projector":
            inside = {
                f"{name}.{inner}": m for inner, m in module.named_modules() if type(m) is nn.Linear
            }
            if (
                not inside
                or next(reversed(inside.values())).out_features != width
                or not _ends_linear(module)
            ):
                raise LLQError(
                    f"{name} does not end in a linear: "
                    "what it feeds into the text decoder stays unrotated"
                )
            linears.add(next(reversed(inside)))
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] == "image_newline" and parameter.shape == (width,):
            vectors.add(name)
    return linears, vectors


@torch.no_grad()
def _ends_linear(projector: nn.Module) -> bool:
    """Whether the projector returns the output of its last linear."""
    linears = [module for module in projector.modules() if type(module) is nn.Linear]
    results: list[Tensor] = []
    weight = linears[0].weight
    zeros = torch.zeros(1, 2, linears[0].in_features, dtype=weight.dtype, device=weight.device)
    try:
        with linears[-1].register_forward_hook(lambda m, args, out: results.append(out)):
            out = projector(zeros)
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool(results) and out is results[-1]


def _apart(name: str) -> bool:
    """Whether a parameter belongs to the images' side: a vision tower or a projector."""
    return "vision_tower" in name.split(".") or "multi_modal_projector" in name.split(".")


# --- rotating the stream --------------------------------------------------------------------------


def random_rotations(residual: Residual, seed: int) -> tuple[Rotate, list[Rotate]]:
    """R1 of the stream, and R2 of the heads of each block: Hadamards with random signs."""
    blocks = 1 + max(residual.values.values())
    heads = [_signed(seed, f"r2.{block}", residual.head_dim) for block in range(blocks)]
    return _signed(seed, "r1", residual.width), heads


def _signed(seed: int, part: str, n: int) -> Rotate:
    """x -> x diag(signs) H, with random signs that follow from `seed` and `part`."""
    random = np.random.RandomState(zlib.crc32(f"{seed}:{part}".encode()))
    signs = torch.from_numpy(random.randint(0, 2, n) * 2.0 - 1)

    def rotate(x: Tensor) -> Tensor:
        return hadamard(n, x.device).apply(x * signs.to(x))

    return rotate


@dataclass(frozen=True)
class RotatedStream:
    """A `Rewrite` of the dense model: folds the norms' gains, then rotates stream (R1) and heads
    (R2).

    stream: x [..., D] -> x R1. heads: for each block, x [..., d] -> x R2. Either may be None: then
    it is not rotated. Computed in `dtype` (fp64) and cast once.
    """

    residual: Residual
    stream: Rotate | None = None
    heads: list[Rotate] | None = None
    dtype: torch.dtype = torch.float64
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def untied(self) -> dict[str, str]:
        """A tied head gets a matrix of its own, because the final norm's gain is folded into it."""
        return (
            {f"{self.residual.head}.weight": f"{self.residual.embedding}.weight"}
            if self.residual.tied
            else {}
        )

    def __call__(self, name: str, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The changed tensor of this name, in its dtype. `read` gives the original weights of the
        norms.
        """
        residual, (module, _, kind) = self.residual, name.rpartition(".")
        if module in residual.norms:
            return torch.full_like(tensor, residual.norms[module])
        inputs: list[Rotate] = []  # applied along the last axis
        outputs: list[Rotate] = []  # applied along the first axis
        if module in residual.readers and kind == "weight":
            norm = residual.readers[module]
            gain_D = read(f"{norm}.weight").to(tensor.device, self.dtype) + (
                1 - residual.norms[norm]
            )
            inputs.append(lambda x: x * gain_D)
        if self.stream is not None:
            if module in residual.writers:
                outputs.append(self.stream)
            elif (module in residual.readers and kind == "weight") or name in self._in_stream:
                inputs.append(self.stream)
        if self.heads is not None:
            if module in residual.values:
                outputs.append(self._each_head(self.heads[residual.values[module]]))
            elif module in residual.outputs and kind == "weight":
                inputs.append(self._each_head(self.heads[residual.outputs[module]]))
        return self._rotated(tensor, inputs, outputs)

    @property
    def _in_stream(self) -> set[str]:
        """Parameters whose rows are vectors of the stream."""
        return {f"{self.residual.embedding}.weight", *self.residual.vectors}

    def _each_head(self, rotate: Rotate) -> Rotate:
        return lambda x: rotate(x.reshape(*x.shape[:-1], -1, self.residual.head_dim)).flatten(-2)

    def _rotated(self, tensor: Tensor, inputs: list[Rotate], outputs: list[Rotate]) -> Tensor:
        """A matrix changed along both axes, or a vector along its only one."""
        if tensor.ndim == 1:
            return next(self._parts([tensor], [*inputs, *outputs])).to(tensor.dtype)
        rotated = tensor
        if inputs:
            dtype = self.dtype if outputs else tensor.dtype
            parts = self._parts(torch.split(rotated, CHUNK_ROWS), inputs)
            rotated = torch.cat([part.to(dtype) for part in parts])
        if outputs:
            parts = self._parts(torch.split(rotated.T, CHUNK_ROWS), outputs)
            rotated = torch.cat([part.to(tensor.dtype) for part in parts]).T.contiguous()
        return rotated

    def _parts(self, parts: Iterable[Tensor], rotations: list[Rotate]) -> Iterator[Tensor]:
        """Each part in fp64, with all `rotations` applied to its last axis."""
        for part in parts:
            rotated = part.to(self.dtype)
            for rotate in rotations:
                rotated = rotate(rotated)
            yield rotated
