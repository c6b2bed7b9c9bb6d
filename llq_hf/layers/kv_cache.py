"""A cache of keys and values in 2 to 8 bits a number, on transformers' interface of quantized
caches. It takes that much memory; nothing is simulated.

Legend: B sequences, H heads, S tokens, R of them recent, D head_dim, C = H D channels of a token, g
channels that share a range, G = C / g ranges, W int32 words.

Storage, for keys and for values: one int32 tensor [B, S, W + G]; a token holds
    codes   W int32    bits a number (kernels/bitpack.py)
    low     G fp16     16 / g
    scale   G fp16     16 / g

    Each token has a range of its own for every g channels of a head, from the least number to the
    largest: x^ = low + scale * code. Codes are chosen for low and scale as they are stored.

    A few channels of keys are far larger than the others, in every token. So each head of a key is
    turned by a Hadamard transform first, which spreads them, and turned back when it is read.

Window
    The newest tokens stay as they are, as in transformers' `QuantizedLayer`: a prompt is quantized
    at once (and read in full precision by its own tokens), later tokens when there are
    `residual_length` of them. What is quantized stays so: new codes are put behind the old ones,
    which are never decoded to be rounded again, and beams are reordered among codes.

When attention reads a layer, that layer alone is decoded into the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedLayer

from ..common.errors import LLQError
from ..kernels.bitpack import pack, packed_words, unpack
from ..numerics.rotations import hadamard

BACKEND = "llq"  # its name in a `cache_config` of transformers
OPTIONS = ("nbits", "q_group_size", "residual_length")  # by transformers' names
WIDTHS = range(2, 9)
KEYS, VALUES = 0, 1  # what transformers' interface calls `axis`: which of the two is packed
AT_ONCE = {False: 2**17, True: 2**22}  # numbers that are decoded at once: on a CPU, on a GPU
_TINY_SCALE = 2.0**-24  # the smallest fp16 above zero


@dataclass(frozen=True)
class Packing:
    """How the tokens of H heads of D channels are packed; see the head of the file.

    group: channels that share a range, a divisor of D. turned: by a Hadamard transform.
    """

    bits: int
    heads: int
    width: int
    group: int
    turned: bool

    @classmethod
    def of(cls, x_BHSD: Tensor, bits: int, most: int, turned: bool) -> Packing:
        """For tokens like these, with at most `most` channels in a group."""
        _, heads, _, width = x_BHSD.shape
        sizes = (size for size in range(1, min(most, width) + 1) if width % size == 0)
        return cls(bits, heads, width, max(sizes), turned)

    @property
    def channels(self) -> int:
        """Of all heads together."""
        return self.heads * self.width

    def encode(self, x_BHSD: Tensor) -> Tensor:
        """int32 [B, S, W + G] of tokens, rounded in fp32."""
        B, _, S, _ = x_BHSD.shape
        shape = (B, S, self.channels // self.group, self.group)
        x_BSHD = x_BHSD.transpose(1, 2).float()
        if self.turned:
            x_BSHD = x_BSHD @ _turn(self.width, x_BSHD.device)
        x_BSGg = x_BSHD.reshape(shape)
        low_BSG, high_BSG = x_BSGg.aminmax(dim=-1)
        levels = 2**self.bits - 1
        low_BSG = low_BSG.half()
        scale_BSG = ((high_BSG - low_BSG.float()) / levels).half().clamp_min(_TINY_SCALE)
        codes_BSGg = ((x_BSGg - low_BSG[..., None].float()) / scale_BSG[..., None].float()).round()
        # What is not a number stays so by its range.
        codes_BSC = codes_BSGg.nan_to_num(0).clamp(0, levels).flatten(2).to(torch.uint8)
        ranges_BSG = torch.cat([low_BSG, scale_BSG], dim=-1).view(torch.int32)
        return torch.cat([pack(codes_BSC, self.bits), ranges_BSG], dim=-1)

    def decode(self, packed_BSW: Tensor, recent_BHRD: Tensor) -> Tensor:
        """All tokens [B, H, S + R, D] in the dtype of the R recent ones, which are as they are; the
        S packed ones are computed in fp32.
        """
        B, S, _ = packed_BSW.shape
        all_BTHD = recent_BHRD.new_empty(B, S + recent_BHRD.shape[2], self.heads, self.width)
        all_BTHD[:, S:] = recent_BHRD.transpose(1, 2)
        # A part at a time, so that there is no second layer of numbers in fp32.
        size = max(1, AT_ONCE[recent_BHRD.is_cuda] // (B * self.channels))
        for start in range(0, S, size):
            part_BSHD = self._numbers(packed_BSW[:, start : start + size])
            all_BTHD[:, start : start + part_BSHD.shape[1]] = part_BSHD
        return all_BTHD.transpose(1, 2)

    def _numbers(self, packed_BSW: Tensor) -> Tensor:
        """fp32 [B, S, H, D]."""
        B, S, _ = packed_BSW.shape
        words = packed_words(self.channels, self.bits)
        low_BSG, scale_BSG = packed_BSW[..., words:].view(torch.float16).chunk(2, dim=-1)
        codes_BSC = unpack(packed_BSW[..., :words], self.bits, self.channels)
        x_BSGg = codes_BSC.float().view(B, S, -1, self.group)
        x_BSGg.mul_(scale_BSG[..., None]).add_(low_BSG[..., None])
        x_BSHD = x_BSGg.view(B, S, self.heads, self.width)
        return x_BSHD @ _turn(self.width, x_BSHD.device).T if self.turned else x_BSHD


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _turn(width: int, device: torch.device) -> Tensor:
    """The transform of a head as a matrix, fp32 [D, D]: one product is faster than its steps."""
    return hadamard(width, device).apply(torch.eye(width, device=device))


class PackedLayer(QuantizedLayer):  # type: ignore[misc]
    """Keys and values of one attention layer.

    nbits: 2 to 8. q_group_size: the most channels that share a range; those of a head are divided
    evenly. residual_length: how many tokens stay as they are before they are quantized together.
    """

    keys: Any  # [B, H, R, D], the newest tokens
    values: Any
    _quantized_keys: Any  # int32 [B, S, W + G], those before
    _quantized_values: Any
    cumulative_length: int

    def __init__(self, nbits: int = 4, q_group_size: int = 64, residual_length: int = 128) -> None:
        if nbits not in WIDTHS:
            raise LLQError(f"a cache of {nbits!r} bits is outside {WIDTHS[0]}..{WIDTHS[-1]}")
        for name, value in (("q_group_size", q_group_size), ("residual_length", residual_length)):
            if not isinstance(value, int) or value < 1:
                raise LLQError(f"{name}={value!r} of the cache must be at least 1")
        super().__init__(nbits=nbits, q_group_size=q_group_size, residual_length=residual_length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = _none_of(key_states), _none_of(value_states)
        self._quantized_keys = self._quantize(self.keys, KEYS)
        self._quantized_values = self._quantize(self.values, VALUES)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; all keys and all values [B, H, S, D], as attention should read them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_prompt = self.cumulative_length == 0
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        read = (
            self._dequantize(self._quantized_keys, self.keys, KEYS),
            self._dequantize(self._quantized_values, self.values, VALUES),
        )
        if is_prompt or self.keys.shape[-2] >= self.residual_length:
            self._quantized_keys = self._moved(self._quantized_keys, self.keys, KEYS)
            self._quantized_values = self._moved(self._quantized_values, self.values, VALUES)
            self.keys, self.values = _none_of(self.keys), _none_of(self.values)
        return read

    def _packing(self, like_BHSD: Tensor, axis: int) -> Packing:
        return Packing.of(like_BHSD, self.nbits, self.q_group_size, turned=axis == KEYS)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return self._packing(tensor, axis).encode(tensor)

    def _dequantize(self, packed_BSW: Tensor, recent_BHRD: Tensor, axis: int) -> Tensor:
        """All tokens that a layer holds, as attention should read them."""
        if packed_BSW.shape[1] == 0:
            return recent_BHRD
        return self._packing(recent_BHRD, axis).decode(packed_BSW, recent_BHRD)

    def _moved(self, packed_BSW: Tensor, recent_BHRD: Tensor, axis: int) -> Tensor:
        """The packed tokens, and the recent ones packed behind them."""
        return torch.cat([packed_BSW, self._quantize(recent_BHRD, axis)], dim=1)

    # --- sequences and tokens that change places, or go -------------------------------------------

    def _change(
        self, of_packed: Callable[[Tensor], Tensor], of_recent: Callable[[Tensor], Tensor]
    ) -> None:
        """Change the packed tokens [B, S, W + G] and the recent ones [B, H, R, D]."""
        if self.is_initialized:
            self._quantized_keys = of_packed(self._quantized_keys)
            self._quantized_values = of_packed(self._quantized_values)
            self.keys, self.values = of_recent(self.keys), of_recent(self.values)

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change(change, change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. A number above zero is, as in older versions of
        transformers, how many tokens stay.
        """
        length = self.cumulative_length
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        kept = max(kept, 0)
        if not self.is_initialized or kept == length:
            return
        packed = min(kept, self._quantized_keys.shape[1])
        # Copies, so that the memory of what goes is free.
        self._change(lambda t: t[:, :packed].clone(), lambda t: t[..., : kept - packed, :].clone())
        self.cumulative_length = kept

    def reset(self) -> None:
        self.keys = self.values = self._quantized_keys = self._quantized_values = None
        self.is_initialized = False
        self.cumulative_length = 0

    # --- where it lies, and how much it is --------------------------------------------------------

    def offload(self) -> None:
        self._change_batch(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change_batch(lambda t: t.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        if not self.is_initialized:
            return 0
        held = (self._quantized_keys, self._quantized_values, self.keys, self.values)
        return sum(tensor.nbytes for tensor in held)


def _none_of(x_BHSD: Tensor) -> Tensor:
    """A tensor of no tokens that keeps none of the memory of `x_BHSD`."""
    return x_BHSD[..., :0, :].clone()


def packed_layers(config: Any, **options: Any) -> list[Any]:
    """The layers of a cache for the model of `config`: those that grow with every token are packed.
    Layers that hold a window or a state of fixed size stay transformers' own.

    options: of `PackedLayer`; None stands for its default. LLQError for others.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise LLQError(
            f"the cache {BACKEND!r} has no {', '.join(unknown)}; it has {', '.join(OPTIONS)}"
        )
    layers = DynamicCache(config=config).layers
    packed = [PackedLayer(**given) if type(each) is DynamicLayer else each for each in layers]
    if not any(isinstance(each, PackedLayer) for each in packed):
        raise LLQError(
            f"{type(config).__name__} has no attention layer whose cache grows with every token, so"
            " there is nothing to pack"
        )
    return packed


def generate_packed(model: Any, bits: int) -> None:
    """Let `model.generate` use a packed cache, unless it is called with another one.

    LLQError where the model, or the width, cannot have one.
    """
    packed_layers(model.config, nbits=bits)
    model.generation_config.update(
        cache_implementation="quantized", cache_config={"backend": BACKEND, "nbits": bits}
    )


def described(model: Any) -> dict[str, Any] | None:
    """What results say about the packed cache that `model.generate` uses; None: it uses none."""
    generation: Any = getattr(model, "generation_config", None)
    asked = dict(getattr(generation, "cache_config", None) or {})
    if asked.pop("backend", None) != BACKEND:
        return None
    layers = packed_layers(model.config, **asked)
    layer = next(each for each in layers if isinstance(each, PackedLayer))
    return {name: getattr(layer, name) for name in OPTIONS}
