"""The pretended GPU itself: it raises what CUDA raises, and counts what CUDA does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from device.pretended import Far, PretendedGPU, near, needs_cuda_build
from torch import Tensor, nn

pytestmark = needs_cuda_build


def far(*shape: int, device: str = "cuda:0") -> Tensor:
    """Numbers 0, 1, ... of this shape."""
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to(device)


def drawn() -> Tensor:
    return torch.randn(2, device="cuda:0", generator=torch.Generator())


FAULTS: dict[str, Callable[[], object]] = {
    "a GPU and the CPU": lambda: far(2, 2) @ torch.ones(2, 2),
    "two GPUs": lambda: far(2) + far(2, device="cuda:1"),
    "the CPU by an index of the GPU": lambda: torch.ones(3)[far(2).long()],
    "a value of the CPU": lambda: far(3).__setitem__(far(2).long(), torch.ones(2)),
    "in place": lambda: torch.ones(2).add_(far(2)),
    "an out of the CPU": lambda: torch.mul(far(2), 2, out=torch.empty(2)),
    "a generator of the CPU": drawn,
    "integers in a product": lambda: far(2, 2).int() @ far(2, 2).int(),
    "few rows of int8": lambda: torch._int_mm(far(8, 8).to(torch.int8), far(8, 8).to(torch.int8)),
    "index_add_": lambda: far(3).index_add_(0, far(2).long() * 0, far(2)),
    "scatter_add_": lambda: far(3).scatter_add_(0, far(2).long(), far(2)),
    "put_": lambda: far(3).put_(far(2).long() * 0, far(2), accumulate=True),
    "the gradient of gather": lambda: (
        far(3).requires_grad_().gather(0, far(2).long()).sum().backward()
    ),
    "no kernel": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
        far(4, 32), far(4, 16).to(torch.uint8), 32, far(1, 4, 2)
    ),
    "numpy": lambda: far(2).numpy(),
}


@pytest.mark.parametrize("run", FAULTS.values(), ids=FAULTS)
def test_what_cuda_refuses_is_refused(run: Callable[[], object]):
    with PretendedGPU(), pytest.raises((RuntimeError, TypeError)):
        run()


def test_a_fault_that_somebody_catches_is_kept():
    with PretendedGPU() as gpu:
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            far(2) + torch.ones(2)
        far(2) + 1
    assert len(gpu.faults) == 1


ALLOWED: dict[str, Callable[[], Tensor]] = {
    "a number of the CPU": lambda: far(3) * torch.tensor(2.0),
    "atomics that do not meet": lambda: far(3).index_add_(0, far(2).long(), far(2)),
    "integers added by atomics": lambda: (
        far(3).int().index_add_(0, far(2).long() * 0, far(2).int())
    ),
    "index_put_, which sorts": lambda: far(3).index_put_((far(2).long(),), far(2), accumulate=True),
    "numbers of the CPU, moved": lambda: torch.randn(3, generator=torch.Generator()).to("cuda:0"),
    "a new tensor like one": lambda: torch.zeros_like(far(3)),
    "a new tensor like one elsewhere": lambda: far(3).new_ones(2, device="cpu").to("cuda:0"),
}


@pytest.mark.parametrize("run", ALLOWED.values(), ids=ALLOWED)
def test_what_cuda_allows_is_allowed(run: Callable[[], Tensor]):
    with PretendedGPU() as gpu:
        found = run()
    assert str(found.device) == "cuda:0"
    assert isinstance(found, Far)
    assert gpu.faults == []


# What the host does: syncs, uploads
HOST: dict[str, tuple[Callable[[Tensor], object], int, int]] = {
    "item": (lambda x: x.sum().item(), 1, 0),
    "bool": (lambda x: bool(x.sum() > 1), 1, 0),
    "tolist": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "nonzero": (lambda x: x.nonzero(), 1, 0),
    "reading by a mask": (lambda x: x[x > 1], 1, 0),
    "writing by a mask": (lambda x: x.__setitem__(x > 1, x[2:] * 2), 1, 0),
    "filling by a mask": (lambda x: x.__setitem__(x > 1, 0.0), 0, 0),
    "indices of the host": (lambda x: x[[0, 2]], 0, 1),
    "a table": (lambda x: x * torch.tensor([1.0, 2, 3, 4], device="cuda:0"), 0, 1),
    "from the GPU's own": (lambda x: torch.where(x > 1, x, 0.0)[x.argsort()].cumprod(0), 0, 0),
}


@pytest.mark.parametrize(("run", "syncs", "uploads"), HOST.values(), ids=HOST)
def test_the_hosts_part_is_counted(run: Callable[[Tensor], object], syncs: int, uploads: int):
    with PretendedGPU() as gpu:
        x = far(4)
        gpu.reset()
        run(x)
    assert (gpu.syncs.total(), gpu.uploads.total()) == (syncs, uploads)


def test_launches_and_bytes():
    with PretendedGPU() as gpu:
        x = far(4, 8)
        gpu.reset()
        x.T[2:].reshape(-1)  # a copy, as it is transposed: 24 numbers read and written
        y = torch.empty_like(x).view(-1)  # neither a launch nor bytes
        torch.mul(x[0, :1].expand(8), 2.0, out=y[:8])  # reads one number
        x[:, 0].to("cuda:1")  # over the bus
    assert gpu.launches.total() == 2
    assert gpu.moved == 4 * (24 + 24 + 1 + 8 + 8)
    assert gpu.transfers.total() == 1


def test_a_kernel_of_triton_is_one_launch():
    triton = pytest.importorskip("triton")

    @triton.jit
    def doubled(x_ptr, y_ptr, size):
        pass

    def double(x: Tensor, y: Tensor, size: int, num_warps: int) -> None:
        y.copy_(2 * x)

    with PretendedGPU({"doubled": double}) as gpu:
        x, y = far(4), torch.zeros(4, device="cuda:0")
        gpu.reset()
        doubled[(1,)](x, y, 4, num_warps=1)
        assert gpu.launches.total() == 1
        assert gpu.moved == 2 * 4 * 4
        with pytest.raises(RuntimeError, match="doubled: pointers to cuda:0 and cpu"):
            doubled[(1,)](x, torch.zeros(4), 4, num_warps=1)
    assert near(y).tolist() == [0, 2, 4, 6]


def test_random_numbers_of_the_gpu_are_counted():
    with PretendedGPU() as gpu:
        torch.rand(3, device="cuda:0")
        torch.rand(3)
    assert gpu.random.total() == 1


def test_a_module_moves_and_is_copied_and_trained():
    model = nn.Linear(4, 4)
    weight = model.weight.detach().clone()
    with PretendedGPU() as gpu:
        twin = copy.deepcopy(model.to("cuda:0"))
        twin(far(2, 4)).sum().backward()
        torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert str(twin.weight.device) == str(twin.weight.grad.device) == "cuda:0"
    assert isinstance(twin.weight, nn.Parameter)
    expected = weight - far_sum(4)
    assert torch.equal(near(twin.weight), expected)
    assert torch.equal(near(model.weight), weight)
    assert gpu.uploads.total() == 3  # weight, bias, input


def far_sum(columns: int) -> Tensor:
    """The gradient of a sum over outputs: the sum of two rows of inputs."""
    return torch.arange(2.0 * columns).view(2, columns).sum(0).expand(columns, columns)


def test_outside_of_it_there_is_no_gpu():
    with PretendedGPU():
        x = far(2)
    with pytest.raises(AssertionError, match="outside"):
        x + 1
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2).to("cuda:0")
