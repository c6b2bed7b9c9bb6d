"""QuantLinear takes a Linear's place: it holds the tensors of a method's layout and asks the method
what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import cached_tensors
from ..method import Method, Packed
from .ops import known, node


class QuantLinear(nn.Linear):
    """A Linear over packed weights [O, I]; a subclass, so that peft and "all-linear" find it with
    no registration.

    The packed codes are a frozen int32 Parameter named `weight`, of packed shape: a loader without
    this plugin then fails on the shape instead of warning and running random weights. All else the
    method stores are buffers beside it.
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
        self._known = known(method)
        for name, spec in self.layout.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_packed(cls, method: Method, linear: nn.Linear, packed: Packed) -> QuantLinear:
        """The stand-in for `linear`, holding `packed` (names, shapes and dtypes as the method's
        layout says).
        """
        self = cls(method, linear.in_features, linear.out_features, bias=False, device="meta")
        got = {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}
        want = {name: (spec.shape, spec.dtype) for name, spec in self.layout.items()}
        if got != want:
            raise LLQError(f"{method.name} packed {got}, but its layout says {want}")
        for name, tensor in packed.items():
            setattr(
                self,
                name,
                nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor,
            )
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return self.train(linear.training)

    def packed(self) -> Packed:
        """The stored tensors by name: views, not copies."""
        return {name: getattr(self, name).data for name in self.layout}

    def dequantized(self) -> Tensor:
        """fp32 weight [O, I] that the stored tensors mean."""
        return self.method.dequantize(self.packed(), self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        stored = [getattr(self, name) for name in self.layout]
        if torch.compiler.is_compiling():
            return node(x, stored, ",".join(self.layout), self.bias, self._known, self.out_features)
        return self.method.linear(
            x, cached_tensors(self.layout, stored), self.bias, self.out_features
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        known(self.method)  # in the process of a copy, too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`.to(dtype)`, `.half()`, ... move stored tensors but never cast them: a scale in bf16 is
        another scale.
        """
        before = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                # The values come from `old`: `new` already went through the lossy cast. Empty on
                # meta stays empty.
                value = (
                    torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
                )
                setattr(
                    self,
                    name,
                    nn.Parameter(value, requires_grad=False) if name == "weight" else value,
                )
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.method}"
        )


def checked_layout(method: Method, out_features: int, in_features: int) -> dict[str, Spec]:
    """The method's layout; LLQError where it would store codes in the very shape of the dense
    weight.
    """
    layout = method.layout(out_features, in_features)
    if layout["weight"].shape == (out_features, in_features):
        raise LLQError(
            f"{method.name}: {method.bits}-bit codes of a {out_features} x {in_features} linear would be stored in the "
            "shape of its dense weight, which a loader without llq-hf would mistake for weights; it is too small"
        )
    return layout
