"""IR-QLoRA's connections: equal to the authors' loops, merged to the last bit, and trained."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from llq_hf.finetune import elastic

WIDTHS = [
    (4, 16, 24),
    (4, 18, 10),
    (6, 9, 21),
    (8, 5, 7),
]  # rank, inputs, outputs: dividing, and not


def random_pair(r: int, i: int, o: int) -> tuple[elastic.ElasticDown, elastic.ElasticUp]:
    torch.manual_seed(0)
    down = elastic.ElasticDown(nn.Linear(i, r, bias=False))
    up = elastic.ElasticUp(nn.Linear(r, o, bias=False))
    for half, beta in ((down, 0.7), (up, -0.4)):
        half.beta.data.fill_(beta)
    return down, up


def literal(x_I: Tensor, A: Tensor, B: Tensor, beta1: float, beta2: float) -> list[float]:
    """Spec 6.2, entry by entry: means of contiguous chunks of x, tiled; means of chunks of u,
    repeated.
    """
    (r, i), o = A.shape, B.shape[0]
    g, h = math.gcd(r, i), math.gcd(r, o)
    pooled = [float(x_I[c * (i // g) : (c + 1) * (i // g)].mean()) for c in range(g)]
    u = [float(A[k] @ x_I) + beta1 * pooled[k % g] for k in range(r)]
    means = [sum(u[c * (r // h) : (c + 1) * (r // h)]) / (r // h) for c in range(h)]
    return [float(B[j] @ torch.tensor(u)) + beta2 * means[j // (o // h)] for j in range(o)]


@pytest.mark.parametrize(("r", "i", "o"), WIDTHS)
def test_equals_the_authors_loops(r: int, i: int, o: int):
    down, up = random_pair(r, i, o)
    x_I = torch.randn(i)
    expected = torch.tensor(literal(x_I, down.weight.detach(), up.weight.detach(), 0.7, -0.4))
    assert torch.allclose(up(down(x_I)), expected, rtol=1e-5, atol=1e-6)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))


def test_connections_start_as_nothing_and_learn():
    model, x = small_model(), torch.randn(5, 12)
    plain = model(x)
    elastic.connect(model)
    assert torch.equal(model(x), plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() == 1 for p in trained) == 4  # two a linear
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    betas = [p.item() for name, p in model.named_parameters() if name.endswith("beta")]
    assert all(betas), betas


def test_merged_equals_unmerged_and_is_plain():
    model, x = small_model(), torch.randn(5, 12)
    elastic.connect(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3)
    connected = model(x)
    elastic.merge(model)
    assert torch.equal(model(x), connected)
    assert not any(name.endswith("beta") for name, _ in model.named_parameters())
    elastic.merge(model)  # nothing left to do
    assert torch.equal(model(x), connected)
