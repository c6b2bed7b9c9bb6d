"""GPUs that are not there: tensors that say `cuda:0` (or `cuda:1`) and compute on the CPU, under a
mode that raises where CUDA would and counts what costs time on a GPU.

    with PretendedGPU() as gpu:
        model.to("cuda:0")
        gpu.reset()
        model(ids.to("cuda:0"))
    gpu.launches, gpu.syncs     # Counters of (operation, "engine/stream.py:120")

Idea: a `Far` tensor lies on `meta` for C++, which then wants no driver, and on `cuda` for Python.
It holds the CPU tensor that it stands for. The mode sees every operation of ATen, looks at the
devices, and lets the CPU compute. So values, and the bytes of a quantized model, are the CPU's.

Raised, as CUDA would, and also listed in `faults` (in case somebody catches it):
    two devices in one operation; a generator of the CPU for a tensor of the GPU; an operation that
    has no CUDA kernel in this build of torch; a matrix product of integers; a sum of floats by
    atomics, whose last bits differ from run to run (real CUDA raises that where one asks it for
    deterministic results).
Counted:
    launches    operations that start a kernel; sorts and solvers start several, so it is a lower
                bound; memory that is reserved, and views, cost none
    moved       bytes that those operations read and write
    syncs       the host waits for the GPU: `.item()`, `bool(t)`, `nonzero`, `.cpu()`, an index that
                is a mask
    uploads     the host sends a tensor
    transfers   a tensor goes from GPU to GPU
    random      numbers drawn on the GPU, which are others than the CPU draws

A kernel of Triton is counted (its tensors are read or written once) and computes nothing, so that
what it should write stays what the memory held, unless it has a stand-in.

Not noticed: dtypes that a CUDA kernel does not take (but for integers in products), other last bits
of a real GPU, memory. `scaled_dot_product_attention` takes its
plain path, so give the CPU `exact_attention`, too, to compare bytes.

It needs a torch that was built for CUDA, as PyPI's is for Linux, and no driver. Devices need their
number, as torch asks the driver what "cuda" means; `torch.cuda.is_available()` says no.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import llq_hf

CPU = torch.device("cpu")
FOLDERS = {  # of the files that `line` names
    f"{Path(llq_hf.__file__).parent}/": "",
    f"{Path(transformers.__file__).parent}/": "transformers/",
}
FIRST_META = 8  # cuda:0 is meta:8 for C++; meta tensors of others have no index

exact_attention = partial(sdpa_kernel, SDPBackend.MATH)

needs_cuda_build = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "CUDA"),
    reason="this torch was built without CUDA: it does not know which operations a GPU has",
)

# --- what CUDA does -------------------------------------------------------------------------------

COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITS = {  # beside copies to the host, and masks as indices
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "cholesky_inverse",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
ATOMIC_SUMS = {  # of floats
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_backward",
    "bincount",
    "cumsum",
    "cumsum_",
    "histc",
    "nll_loss2d_backward",
    "scatter_add",
    "scatter_add_",
}
INTEGER_PRODUCTS = {"addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv"}
NO_KERNEL = {  # they reserve memory, or only name it
    "_local_scalar_dense",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}
GATHERS = {"embedding", "gather", "index", "index_select", "take"}  # they read what they return
# An operation of one of these keys runs on a GPU, maybe as several others
KEYS = (
    "CUDA",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)


class Operation(NamedTuple):
    """What is to be known about an operation of torch, whatever its arguments."""

    name: str
    is_view: bool
    exists: bool  # on CUDA
    draws: bool  # random numbers


@cache
def operation(func: Any) -> Operation:
    schema = func._schema
    return Operation(
        schema.name.removeprefix("aten::"),
        any(part.alias_info and not part.alias_info.is_write for part in schema.returns),
        any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in KEYS),
        torch.Tag.nondeterministic_seeded in func.tags,
    )


def adds_by_atomics(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the operation adds floats in an order that nobody knows."""
    first = args[0]
    if not (isinstance(first, Tensor) and first.is_floating_point()):
        return False
    if name == "put_" and not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return False
    if name in ("index_add", "index_add_", "put_"):  # whose order is seen where two meet
        index = near(args[1 if name == "put_" else 2])
        return len(index.unique()) < index.numel()
    if name.startswith("scatter_reduce") or func._overloadname in ("reduce", "value_reduce"):
        return True
    return name in ATOMIC_SUMS


def fits_int_mm(left: Tensor, right: Tensor) -> bool:
    """Whether CUDA multiplies int8 matrices of these shapes."""
    return left.shape[0] > 16 and left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0


# --- tensors --------------------------------------------------------------------------------------


class Far(Tensor):
    """A tensor on a pretended GPU. near: the CPU tensor that it stands for."""

    near: Tensor
    place: torch.device
    is_cuda, is_meta, is_cpu = True, False, False  # type: ignore[assignment]
    device = property(lambda self: self.place)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Far], near: Tensor, place: torch.device) -> Far:
        far: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            dtype=near.dtype,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            device=torch.device("meta", FIRST_META + place.index),
        )
        far.near, far.place = near, place
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise AssertionError(f"{func} on a pretended GPU, outside of `with PretendedGPU()`")

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = device is None or located(device) == self.place
        if here and dtype in (None, self.dtype) and memory_format is None and not copy:
            return self  # C++ compares with `meta`, and would copy
        return super().to(*args, copy=copy, **kwargs)

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        if id(self) not in memo:
            twin = self.detach().clone().requires_grad_(self.requires_grad)
            vars(twin).update({k: v for k, v in vars(self).items() if k not in ("near", "place")})
            memo[id(self)] = twin
        found: Far = memo[id(self)]
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def new_tensor(self, data: Any, **options: Any) -> Any:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.place, **options})

    # A meta tensor would make indices and numbers without values
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(on_cpu(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):  # as C++ does it for CUDA
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(on_cpu(index), value)

    def __repr__(self, **options: Any) -> str:
        return f"Far({self.near}, {self.place})"


def located(device: Any) -> torch.device:
    """The device with its number."""
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def on_cpu(index: Any) -> Any:
    """An index whose lists are tensors."""
    if isinstance(index, tuple):
        return tuple(map(on_cpu, index))
    return torch.tensor(index) if isinstance(index, list) else index


def flattened(values: Iterable[Any]) -> list[Any]:
    """Arguments of an operation; of those that are lists, their elements."""
    flat = []
    for value in values:
        if isinstance(value, list | tuple):
            flat += value
        else:
            flat.append(value)
    return flat


def mapped(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """The value, or each element of a list, through `function` where it is of this kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([function(v) if isinstance(v, kind) else v for v in value])
    return value


# The CPU tensor that a tensor on a pretended GPU stands for. The GPU does not notice.
near = partial(mapped, lambda far: far.near, Far)


def is_outer(tensor: Tensor, place: torch.device) -> bool:
    """Whether an operation on `place` refuses this operand; of the CPU it takes single numbers."""
    return tensor.device != place and (tensor.is_cuda or tensor.ndim > 0)


def bytes_of(tensor: Tensor) -> int:
    """What reading or writing it once moves; dimensions that were expanded count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


# --- the mode -------------------------------------------------------------------------------------

Events = Counter[tuple[str, str]]


class PretendedGPU(TorchDispatchMode):
    """Pretends, counts and raises; see the head of the file.

    stand_ins: functions that compute what kernels of Triton do, by their names: they get the same
    arguments, with CPU tensors.
    """

    def __init__(self, stand_ins: Mapping[str, Callable[..., None]] | None = None) -> None:
        super().__init__()
        self.stand_ins = stand_ins or {}
        self.faults: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.moved = 0
        self.launches, self.syncs, self.uploads, self.transfers, self.random = (
            Events() for _ in range(5)
        )

    def __enter__(self) -> Any:
        forget_tables()
        self._patches = pytest.MonkeyPatch()
        self._before = (
            torch._C._only_lift_cpu_tensors(),
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        # torch.tensor(..., device="cuda") becomes a copy of a CPU tensor
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to: a Far cannot become the data of a CPU tensor
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.setattr(torch.cuda, "_lazy_init", lambda: None)
        # A real GPU stays out of this
        self._patches.setattr(torch.cuda, "is_available", lambda: False)
        for kind in triton_kernels():
            own = kind.__getitem__
            self._patches.setattr(
                kind, "__getitem__", lambda kernel, grid, own=own: self._launcher(kernel, grid, own)
            )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        forget_tables()
        self._patches.undo()
        lifted, overwritten = self._before
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = flattened((*args, *kwargs.values()))
        far = [t for t in flat if isinstance(t, Far)]
        place = self._place(func, args, kwargs, far)
        if not far and place.type != "cuda":
            return func(*args, **kwargs)
        op = operation(func)
        self._look(op, func, args, kwargs, flat, place)
        asked = {} if kwargs.get("device") is None else {"device": CPU}
        out = func(*map(near, args), **{key: near(v) for key, v in kwargs.items()} | asked)
        if place.type != "cuda":
            return out
        given = {id(t.near): t for t in far}  # operations in place return what they were given
        out = mapped(lambda t: given[id(t)] if id(t) in given else Far(t, place), Tensor, out)
        self._count(op, flat, far, out, place)
        return out

    def _launcher(self, kernel: Any, grid: Any, own: Callable[..., Any]) -> Callable[..., Any]:
        """What kernel[grid] of Triton is; own: what it was."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            far = [t for t in tensors if isinstance(t, Far)]
            if not far:
                return own(kernel, grid)(*args, **kwargs)
            name, place = kernel.__name__, far[0].place
            others = {str(t.device) for t in tensors if t.device != place}
            if others:
                self._fail(f"{name}: pointers to {place} and {', '.join(sorted(others))}")
            self.launches[name, line()] += 1
            self.moved += sum({id(t): bytes_of(t) for t in far}.values())
            if name in self.stand_ins:
                self.stand_ins[name](*map(near, args), **kwargs)

        return launch

    def _place(self, func: Any, args: Any, kwargs: dict[str, Any], far: list[Far]) -> torch.device:
        """Where the operation's results lie."""
        asked = kwargs.get("device")
        if asked is None:
            if func is torch.ops.aten.copy_.default:
                return args[0].device
            return far[0].place if far else CPU
        if asked.type == "meta" and asked.index is not None:  # C++ makes a tensor like one of ours
            return torch.device("cuda", asked.index - FIRST_META)
        return located(asked)

    def _look(
        self,
        op: Operation,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        flat: list[Any],
        place: torch.device,
    ) -> None:
        """Raise what CUDA would; count syncs, uploads, transfers."""
        tensors = [t for t in flat if isinstance(t, Tensor)]
        if op.name in COPIES:
            self._copy(op.name, (args[1] if op.name == "copy_" else args[0]).device, place)
            return
        if op.name in INDEXING:
            self._index(op.name, args, kwargs)
        elif kwargs.get("device") is None:
            self._check_places(op.name, tensors, place)
        if any(isinstance(g, torch.Generator) and g.device.type == "cpu" for g in flat):
            self._fail(f"{op.name}: a generator of the CPU for a tensor on {place}")
        if not op.exists:
            self._fail(f"{op.name}: no kernel for CUDA")
        if op.name in INTEGER_PRODUCTS and not tensors[0].is_floating_point():
            self._fail(f"{op.name}: no kernel for CUDA and {tensors[0].dtype}")
        if op.name == "_int_mm" and not fits_int_mm(*tensors[:2]):
            self._fail(
                f"_int_mm: CUDA takes no {tuple(tensors[0].shape)} x {tuple(tensors[1].shape)}"
            )
        if adds_by_atomics(op.name, func, args, kwargs):
            self._fail(f"{op.name}: a sum of floats by atomics, which no two runs end alike")
        if op.name in WAITS:
            self.syncs[op.name, line()] += 1
        if op.draws:
            self.random[op.name, line()] += 1

    def _check_places(self, name: str, flat: list[Any], place: torch.device) -> None:
        outer = {str(t.device) for t in flat if isinstance(t, Tensor) and is_outer(t, place)}
        if outer:
            self._fail(f"{name}: tensors on {place} and {', '.join(sorted(outer))}")

    def _copy(self, name: str, source: torch.device, target: torch.device) -> None:
        if source != target:
            both = source.type == target.type
            events = (
                self.transfers if both else self.syncs if source.type == "cuda" else self.uploads
            )
            events[name, line()] += 1

    def _index(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Masks are read by the host, but for x[mask] = number; indices of the CPU are sent."""
        whole, indices, *rest = args
        indices = [t for t in indices if t is not None]
        if any(t.device not in (whole.device, CPU) for t in indices):
            self._fail(f"{name}: a tensor on {whole.device} by indices on {indices[0].device}")
        value: Tensor | None = rest[0] if rest else kwargs.get("values")
        if value is not None and is_outer(value, whole.device):
            self._fail(f"{name}: tensors on {whole.device} and {value.device}")
        masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
        number = value is not None and not value.is_cuda and value.numel() == 1
        if masks and not (number and len(indices) == 1):
            self.syncs[f"{name} by a mask", line()] += 1
        if any(not t.is_cuda for t in indices):
            self.uploads[name, line()] += 1

    def _count(
        self, op: Operation, flat: list[Any], far: list[Far], out: Any, place: torch.device
    ) -> None:
        if op.is_view or op.name in NO_KERNEL:
            return
        if op.name in COPIES and any(t.device != place for t in flat if isinstance(t, Tensor)):
            return  # over the bus
        self.launches[op.name, line()] += 1
        made = [t for t in flattened([out]) if isinstance(t, Far)]
        written = sum(map(bytes_of, made))
        read = {id(t): bytes_of(t) for t in far}
        if op.name in GATHERS:
            read = {key: min(count, written) for key, count in read.items()}
        self.moved += sum(read.values()) + written

    def _fail(self, words: str) -> None:
        self.faults.append(f"{words}, in {line()}")
        raise RuntimeError(self.faults[-1])


def triton_kernels() -> list[Any]:
    """The classes of Triton's kernels: compiled ones, and those in its interpreter."""
    if find_spec("triton") is None:
        return []
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return [JITFunction, InterpretedFunction]


def forget_tables() -> None:
    """Empty llq_hf's caches of matrices and tables: what a run uploads must not depend on runs
    before it, and tensors of a pretended GPU must not come to a real one.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(("llq_hf.methods", "llq_hf.numerics")):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def line() -> str:
    """The nearest line of llq_hf or transformers that led to this operation."""
    frame = sys._getframe(1)
    while frame is not None:
        name = short(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@cache
def short(path: str) -> str | None:
    """engine/stream.py, or transformers/masking_utils.py; None for files of others."""
    for folder, kept in FOLDERS.items():
        if path.startswith(folder):
            return kept + path.removeprefix(folder)
    return None
