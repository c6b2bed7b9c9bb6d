"""QuantLinear takes a Linear's place: it holds the tensors of a method's layout and asks the method what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LLQError
from .grids import Spec
from .kernels import Kept
from .method import Method, Packed


class QuantLinear(nn.Linear):
    """A Linear over packed weights [O, I]; a subclass, so that peft and "all-linear" find it with no registration.

    The packed codes are a frozen int32 Parameter named `weight`, of packed shape: a loader without this plugin then
    fails on the shape instead of warning and running random weights. All else the method stores are buffers beside
    it.
    """

    def __init__(
        self,
        method: Method,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        self.method, self.in_features, self.out_features = method, in_features, out_features
        self.layout = checked_layout(method, out_features, in_features)
        self._number = number_of(method)
        self._held: tuple[list[tuple[Tensor, int]], Kept] | None = None
        for name, spec in self.layout.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_packed(cls, method: Method, linear: nn.Linear, packed: Packed) -> QuantLinear:
        """The stand-in for `linear`, holding `packed` (names, shapes and dtypes as the method's layout says)."""
        self = cls(method, linear.in_features, linear.out_features, bias=False, device="meta")
        got = {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}
        want = {name: (spec.shape, spec.dtype) for name, spec in self.layout.items()}
        if got != want:
            raise LLQError(f"{method.name} packed {got}, but its layout says {want}")
        for name, tensor in packed.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return self.train(linear.training)

    def packed(self) -> Packed:
        """The stored tensors by name: views, not copies."""
        return {name: getattr(self, name).data for name in self.layout}

    def _kept(self) -> Kept:
        """What `packed` gives, kept until a tensor is another one or lies elsewhere."""
        tensors = [getattr(self, name) for name in self.layout]
        if self._held is not None:
            known, found = self._held
            if all(t is old and t.data_ptr() == at for t, (old, at) in zip(tensors, known, strict=True)):
                return found
        found = Kept(zip(self.layout, (t.data for t in tensors), strict=True))
        self._held = [(t, t.data_ptr()) for t in tensors], found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a copy has tensors of its own

    def dequantized(self) -> Tensor:
        """fp32 weight [O, I] that the stored tensors mean."""
        return self.method.dequantize(self.packed(), self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
            stored = [getattr(self, name) for name in self.layout]
            y: Tensor = compiled_linear(x, stored, ",".join(self.layout), self.bias, self._number, self.out_features)
            return y
        return self.method.linear(x, self._kept(), self.bias, self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`.to(dtype)`, `.half()`, ... move stored tensors but never cast them: a scale in bf16 is another scale."""
        before = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                # The values come from `old`: `new` already went through the lossy cast. Empty on meta stays empty.
                value = torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
                setattr(self, name, nn.Parameter(value, requires_grad=False) if name == "weight" else value)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.method}"


# --- one operator for torch.compile --------------------------------------------------------------------------------

_NUMBERED: list[Method] = []  # what the operator's `method` stands for, in this process


@cache
def number_of(method: Method) -> int:
    """An integer for a method: all that an operator can be given."""
    _NUMBERED.append(method)
    return len(_NUMBERED) - 1


@torch.library.custom_op("llq::linear", mutates_args=())
def compiled_linear(
    x: Tensor, stored: Sequence[Tensor], names: str, bias: Tensor | None, method: int, out_features: int
) -> Tensor:
    """`Method.linear` as one node of a graph: whatever a method does with its tensors, nothing breaks the graph."""
    packed = dict(zip(names.split(","), stored, strict=True))
    return _NUMBERED[method].linear(x, packed, bias, out_features).contiguous()


@compiled_linear.register_fake
def _(x: Tensor, stored: Sequence[Tensor], names: str, bias: Tensor | None, method: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def checked_layout(method: Method, out_features: int, in_features: int) -> dict[str, Spec]:
    """The method's layout; LLQError where it would store codes in the very shape of the dense weight."""
    layout = method.layout(out_features, in_features)
    if layout["weight"].shape == (out_features, in_features):
        raise LLQError(
            f"{method.name}: {method.bits}-bit codes of a {out_features} x {in_features} linear would be stored in the "
            "shape of its dense weight, which a loader without llq-hf would mistake for weights; it is too small"
        )
    return layout
