"""Where decoder blocks come from: a live model, or safetensors on disk, one block at a time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..checkpoints.dense import Checkpoint
from ..models.decoder import block_prefixes, decoder_of


class Blocks(ABC):
    """Decoder blocks, one at a time, and the decoder around them that turns token ids into the
    first block's input.
    """

    prefixes: list[str]
    device: torch.device

    @abstractmethod
    def load(self, index: int) -> nn.Module:
        """The block with real tensors, ready to run. The caller drops it before it asks for the
        next.
        """

    @abstractmethod
    def decoder(self) -> nn.Module:
        """The decoder with real embeddings and rotary tables; its blocks are not run."""

    @abstractmethod
    def around(self) -> nn.Module:
        """The whole model, but for its blocks and its head: what turns images and text into the
        first block's input.
        """


class LiveBlocks(Blocks):
    """The blocks of a model that is in memory already; they are changed in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.prefixes = model, block_prefixes(model)
        self.device = next(model.parameters()).device

    def load(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.prefixes[index])

    def decoder(self) -> nn.Module:
        return decoder_of(self.model)[1]

    def around(self) -> nn.Module:
        return self.model


class StreamedBlocks(Blocks):
    """Blocks read from a checkpoint as they are asked for. `skeleton` is the whole model on the
    meta device.
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint, self.skeleton, self.dtype, self.device = (
            checkpoint,
            skeleton,
            dtype,
            device,
        )
        self.prefixes = block_prefixes(skeleton)

    def load(self, index: int) -> nn.Module:
        prefix = self.prefixes[index]
        block = copy.deepcopy(self.skeleton.get_submodule(prefix))
        return self._filled(block, prefix)

    def decoder(self) -> nn.Module:
        name, skeleton = decoder_of(self.skeleton)
        return with_computed(self._filled(self._hollow(skeleton), name), self.device)

    def around(self) -> nn.Module:
        model: Any = self._hollow(self.skeleton)
        model.set_output_embeddings(nn.Identity())  # never reached, and as large as the embeddings
        return with_computed(self._filled(model, ""), self.device)

    def _hollow(self, module: nn.Module) -> nn.Module:
        """A copy of the skeleton, or of its decoder, without the blocks."""
        decoder = decoder_of(self.skeleton)[1]
        blocks, decoder.layers = (
            decoder.layers,
            nn.ModuleList([nn.Identity() for _ in self.prefixes]),
        )
        try:
            return copy.deepcopy(module)
        finally:
            decoder.layers = blocks

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module` with its meta parameters replaced by the checkpoint's tensors, cast to the run's
        dtype.
        """
        names = {
            f"{prefix}.{n}" if prefix else n: n
            for n, t in module.state_dict(keep_vars=True).items()
            if t.is_meta
        }
        tensors = self.checkpoint.read(names)
        own = {names[key]: tensor.to(self.device, self.dtype) for key, tensor in tensors.items()}
        module.load_state_dict(own, strict=False, assign=True)
        return module.requires_grad_(False).eval()


def with_computed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with the buffers that no file holds (rotary tables, position ids), as from_pretrained
    computes them.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
            elif buffer is not None:
                setattr(buffer, "_is_hf_initialized", True)  # noqa: B010 (transformers' mark: leave it as it is)
    for parameter in model.parameters():
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010
    initialize: Any = model.initialize_weights
    initialize()
    return model
