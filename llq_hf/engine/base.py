"""The base model as transformers would load and run it, and the proof that it is taken so.

Blocks are read from the files one at a time, and run without the model around them. Both could
differ from what `from_pretrained` and `forward` do, and nobody would see it: the packed model would
be calibrated on other activations, or be another model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints.carried import carried
from ..checkpoints.dense import Checkpoint
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.format import CONFIG
from ..common.errors import LLQError
from ..common.files import sha256_file
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..models.decoder import decoder_of, hidden_of
from ..models.load import load_dense
from .blocks import StreamedBlocks
from .entrance import Entrance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights of a model that is loaded as a whole only to be compared.
LARGEST_COMPARED = 2**30
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_compared: set[str] = set()  # a study quantizes a base many times in one process


def file_digests(folder: Path) -> dict[str, str]:
    """The first 16 hex digits of the sha256 of each file that decides what a base model is, beside
    its tensors: config.json, and what comes along into its packed checkpoints.
    """
    return {name: sha256_file(folder / name)[:16] for name in (CONFIG, *carried(folder))}


def check_as_loaded(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    data: Tensor | Pairs | None,
    identity: dict[str, Any],
    progress: Progress,
) -> None:
    """LLQError unless the tensors are those that `from_pretrained` loads, and the activations those
    that its model computes, on the first sequence of token ids (without any: on a few tokens).

    identity: the run's, by which a base is known that was compared before in this process. A model
    of more than 1 GiB is not loaded for this.
    """
    ids_NS = data if isinstance(data, Tensor) else None
    size = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    base = {key: identity[key] for key in ("base_sha256", "base_files", "dtype", "device")}
    key = fingerprint({**base, "on_data": ids_NS is not None})
    if size > LARGEST_COMPARED or key in _compared:
        return
    progress.stage("comparing with transformers' model")
    model = load_dense(checkpoint.path, skeleton.config, dtype, device)
    _check_tensors(checkpoint, model)
    ids_BS = torch.arange(8)[None] if ids_NS is None else ids_NS[:1]
    own_BSD = _last_states(model, ids_BS.to(device))
    walked_BSD = _walked(StreamedBlocks(checkpoint, skeleton, dtype, device), ids_BS)
    error = (own_BSD - walked_BSD).abs().max() / own_BSD.abs().max()
    if not error <= TOLERANCE[dtype]:
        raise LLQError(
            f"{type(model).__name__} computes other activations than its blocks one by one "
            f"(by {error:.1%} of the largest): it cannot be quantized block by block"
        )
    _compared.add(key)


def _check_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """LLQError for a tensor of `model` that is not the checkpoint's."""
    for name, tensor in model.state_dict().items():
        if name not in checkpoint.files:  # a tied one: all else was missed before
            continue
        if not torch.equal(checkpoint.read([name])[name].to(tensor.dtype), tensor.cpu()):
            raise LLQError(
                f"transformers loads another {name} than {checkpoint.files[name]} holds; "
                "save the model again with save_pretrained, into an empty folder"
            )


@torch.no_grad()
def _last_states(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """The output [B, S, D] of the last block in the model's own forward pass, fp32."""
    decoder, states = decoder_of(model)[1], []
    assert isinstance(decoder.layers, nn.ModuleList)
    hook = decoder.layers[-1].register_forward_hook(
        lambda block, args, out: states.append(hidden_of(out).float())
    )
    with hook:
        decoder(input_ids=ids_BS, use_cache=False)
    return states[0]


@torch.no_grad()
def _walked(blocks: StreamedBlocks, ids_BS: Tensor) -> Tensor:
    """The same by the blocks, one at a time."""
    hidden_BSD, arguments = Entrance(blocks, ids_BS).calls(slice(None))
    for index in range(len(blocks.prefixes)):
        hidden_BSD = hidden_of(blocks.load(index)(hidden_BSD, **arguments.of(index)))
    return hidden_BSD.float()
