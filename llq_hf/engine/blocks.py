"""Decoder blocks, one at a time: of a model in memory, or of a checkpoint on disk."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..checkpoints.dense import Checkpoint
from ..common.errors import LLQError
from ..models.decoder import block_prefixes, decoder_of


class Blocks(ABC):
    """The decoder blocks of a model, and the modules that compute the first block's input."""

    prefixes: list[str]  # full module names of the blocks
    device: torch.device

    @abstractmethod
    def load(self, index: int) -> nn.Module:
        """The block with real tensors, ready to run.

        The caller drops it before it asks for the next one.
        """

    @abstractmethod
    def decoder(self) -> nn.Module:
        """The decoder with real embeddings and rotary tables.

        It turns token ids into the first block's input. Its blocks are not run.
        """

    @abstractmethod
    def around(self) -> nn.Module:
        """The whole model except its blocks and its head.

        It turns images and text into the first block's input.
        """


class LiveBlocks(Blocks):
    """The blocks of a model in memory, which are changed in place."""

    def __init__(self, model: nn.Module) -> None:
        check_in_memory(model)
        self.model = model
        self.prefixes = block_prefixes(model)
        self.device = next(model.parameters()).device

    def load(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.prefixes[index])

    def decoder(self) -> nn.Module:
        return decoder_of(self.model)[1]

    def around(self) -> nn.Module:
        return self.model


def check_in_memory(model: nn.Module) -> None:
    """LLQError where weights of a model lie on no CPU or GPU: accelerate offloaded them."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise LLQError(
            f"{len(away)} tensors of the model are offloaded, {away[0]} first: it is too large to "
            "be quantized in memory with this device_map; give another one, or quantize it to a "
            "folder with `llq quantize`, which holds one block at a time"
        )


class StreamedBlocks(Blocks):
    """Blocks that are read from a checkpoint when they are asked for.

    skeleton: the whole model on the meta device. dtype: of the forward passes.
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.skeleton = with_computed(copy.deepcopy(skeleton), device)
        self.dtype = dtype
        self.device = device
        self.prefixes = block_prefixes(skeleton)

    def load(self, index: int) -> nn.Module:
        prefix = self.prefixes[index]
        block = copy.deepcopy(self.skeleton.get_submodule(prefix))
        return self._filled(block, prefix)

    def decoder(self) -> nn.Module:
        name, skeleton = decoder_of(self.skeleton)
        return self._filled(self._without_blocks(skeleton), name)

    def around(self) -> nn.Module:
        model: Any = self._without_blocks(self.skeleton)
        # The head is never run, and it is as large as the embeddings.
        model.set_output_embeddings(nn.Identity())
        return self._filled(model, "")

    def _without_blocks(self, module: nn.Module) -> nn.Module:
        """A copy of the skeleton, or of its decoder, without the blocks."""
        decoder = decoder_of(self.skeleton)[1]
        blocks = decoder.layers
        assert isinstance(blocks, nn.ModuleList)
        decoder.layers = nn.ModuleList([_Unloaded(block) for block in blocks])
        try:
            return copy.deepcopy(module)
        finally:
            decoder.layers = blocks

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module` with the checkpoint's tensors, in the run's dtype, as its parameters."""
        names = {
            f"{prefix}.{n}" if prefix else n: n
            for n, t in module.state_dict(keep_vars=True).items()
            if t.is_meta
        }
        tensors = self.checkpoint.read(names)
        own = {names[key]: tensor.to(self.device, self.dtype) for key, tensor in tensors.items()}
        module.load_state_dict(own, strict=False, assign=True)
        return module.requires_grad_(False).eval()


class _Unloaded(nn.Module):
    """In the place of a block: it has the attributes, which decoders read, and no tensors."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Past nn.Module, which would take it for a part of this one.
        self.__dict__.update(block=block, forward=block.forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unloaded:
        return _Unloaded(self.__dict__["block"])


def with_computed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, whose parameters lie on meta, with the buffers that no file holds (rotary tables,
    position ids) on `device`.

    transformers computes them, as from_pretrained does.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for parameter in model.parameters():
        # This mark makes transformers leave a tensor as it is.
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (mypy: no such attribute)
    initialize: Any = model.initialize_weights
    initialize()
    return model
