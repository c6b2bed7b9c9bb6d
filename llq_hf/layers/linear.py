"""QuantLinear replaces an nn.Linear: it holds the tensors of a method's layout, and the method
multiplies with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import cached_tensors
from ..method import Method, Packed
from .ops import node, register

DAMAGED = "which no run of llq-hf writes: the file is damaged (`llq verify` finds where)"


class QuantLinear(nn.Linear):
    """A linear over packed weights [O, I]. It is a subclass of nn.Linear, so that peft and its
    target "all-linear" find it without registration.

    The packed codes are a frozen int32 Parameter named `weight`, in their packed shape. A loader
    without this plugin therefore fails on the shape, instead of warning and running random weights.
    Everything else that the method stores are buffers.
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
        self._key = register(method)
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
        """The replacement of `linear`, with the tensors `packed`. LLQError if their names, shapes
        and dtypes are not those of the method's layout.
        """
        self = cls(method, linear.in_features, linear.out_features, bias=False, device="meta")
        got = {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}
        want = {name: (spec.shape, spec.dtype) for name, spec in self.layout.items()}
        if got != want:
            raise LLQError(f"{method.name} packed {got}, but its layout says {want}")
        for name, tensor in packed.items():
            self.put(name, tensor)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return self.train(linear.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_linears({prefix.removesuffix("."): self})

    def put(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` the stored tensor of this name. Its shape and dtype are those of the
        layout.
        """
        setattr(
            self, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor
        )

    def packed(self) -> Packed:
        """The stored tensors by name: views, not copies."""
        return {name: getattr(self, name).data for name in self.layout}

    def dequantized(self) -> Tensor:
        """The weight that the stored tensors mean, fp32 [O, I]."""
        return self.method.dequantize(self.packed(), self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., O] of x [..., I], with a bias that a host may keep elsewhere."""
        stored = [getattr(self, name) for name in self.layout]
        if torch.compiler.is_compiling():
            return node(x, stored, ",".join(self.layout), bias, self._key, self.out_features)
        return self.method.linear(x, cached_tensors(self.layout, stored), bias, self.out_features)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register(self.method)  # a copy may have been sent to another process

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move the stored tensors but never cast them, whatever `.to(dtype)` or `.half()` ask for:
        a scale in bf16 is another scale.
        """
        before = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                # `new` went through the lossy cast, so the values come from `old`. Tensors on meta
                # have none.
                value = (
                    torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
                )
                self.put(name, value)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.method}"
        )


def checked_layout(method: Method, out_features: int, in_features: int) -> dict[str, Spec]:
    """The method's layout. LLQError if its codes would have the shape of the dense weight."""
    layout = method.layout(out_features, in_features)
    if layout["weight"].shape == (out_features, in_features):
        raise LLQError(
            f"{method.name}: {method.bits}-bit codes of a {out_features} x {in_features} linear "
            "would be stored in the shape of its dense weight, which a loader without llq-hf would "
            "mistake for weights; it is too small"
        )
    return layout


def check_linears(linears: Mapping[str, QuantLinear]) -> None:
    """LLQError, with the tensor's name, where a number in packed linears that came from a file
    cannot be what it is: a scale that is not finite, an index outside of its range.

    Shapes are known to be right. Linears on the meta device are left out: they have no numbers.
    """
    here = {name: linear for name, linear in linears.items() if not linear.weight.is_meta}
    floats = {
        f"{name}.{key}": tensor
        for name, linear in here.items()
        for key, tensor in linear.named_buffers(recurse=False)
        if tensor.is_floating_point()
    }
    check_finite(floats)
    for name, linear in here.items():
        packed = linear.packed()
        if "in_scale" in packed and not (packed["in_scale"] > 0).all():
            raise LLQError(f"{name}.in_scale holds a number that is not above zero, {DAMAGED}")
        try:
            linear.method.check_packed(packed, linear.out_features, linear.in_features)
        except LLQError as error:
            raise LLQError(f"{name}.{error}, {DAMAGED}") from None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """LLQError with the name of the first tensor that holds NaN or infinity."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(name)
    for names in by_kind.values():  # all of a kind at once: a GPU is waited for once
        most = torch._foreach_norm([tensors[name].detach() for name in names], float("inf"))
        finite = torch.stack(most).isfinite()
        if not finite.all():
            name = names[finite.tolist().index(False)]
            raise LLQError(f"{name} holds NaN or infinity, {DAMAGED}")
