"""A cache of keys and values in 2 to 8 bits a number, on transformers' interface of quantized
caches. It takes that much memory; nothing is simulated.

Legend: B sequences, H heads, S tokens, D head_dim, g channels that share a range, G ranges of a
token (of all its heads), W int32 words.

Storage, for keys and for values
    name    shape      dtype   bits per number
    words   [B, S, W]  int32   bits (kernels/bitpack.py)
    low     [B, S, G]  fp16    16 / g
    scale   [B, S, G]  fp16    16 / g

    Each token has a range of its own for every g channels of a head, from the least number to the
    largest: x^ = low + scale * code. Codes are chosen for low and scale as they are stored.

Window
    The newest tokens stay as they are, as in transformers' `QuantizedLayer`: a prompt is quantized
    at once (and read in full precision by its own tokens), later tokens when there are
    `residual_length` of them. What is quantized stays so: new codes are put behind the old ones,
    which are never decoded to be rounded again, and beams are reordered among codes.

When attention reads a layer, that layer alone is decoded into the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedLayer

from ..common.errors import LLQError
from ..kernels.bitpack import pack, unpack

BACKEND = "llq"  # its name in a `cache_config` of transformers
OPTIONS = ("nbits", "q_group_size", "residual_length")  # by transformers' names
WIDTHS = range(2, 9)
_TINY_SCALE = 2.0**-24  # the smallest fp16 above zero


class Codes(NamedTuple):
    """Tokens in few bits; see the head of the file."""

    words: Tensor
    low: Tensor
    scale: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same change of all three tensors, which begin with the axes [B, S]."""
        return Codes(*map(change, self))

    def then(self, later: Codes) -> Codes:
        """These tokens, and later ones behind them."""
        return Codes(*(torch.cat(pair, dim=1) for pair in zip(self, later, strict=True)))


def encode(x_BHSD: Tensor, bits: int, group: int) -> Codes:
    """Round to codes, in fp32."""
    B, H, S, D = x_BHSD.shape
    x_BSGg = x_BHSD.transpose(1, 2).float().reshape(B, S, H * D // group, group)
    low_BSG, high_BSG = x_BSGg.aminmax(dim=-1)
    levels = 2**bits - 1
    low_BSG = low_BSG.half()
    scale_BSG = ((high_BSG - low_BSG.float()) / levels).half().clamp_min(_TINY_SCALE)
    codes_BSGg = ((x_BSGg - low_BSG[..., None].float()) / scale_BSG[..., None].float()).round()
    # What is not a number stays so by its range.
    bytes_BSC = codes_BSGg.nan_to_num(0).clamp(0, levels).flatten(2).to(torch.uint8)
    return Codes(pack(bytes_BSC, bits), low_BSG, scale_BSG)


def decode(codes: Codes, bits: int, recent_BHRD: Tensor) -> Tensor:
    """All tokens [B, H, S + R, D]: S that the codes stand for, computed in fp32, and R recent ones
    as they are, in whose dtype it is.
    """
    B, S, ranges = codes.low.shape
    _, H, R, D = recent_BHRD.shape
    all_BTHD = recent_BHRD.new_empty(B, S + R, H, D)
    all_BTHD[:, S:] = recent_BHRD.transpose(1, 2)
    codes_BSGg = unpack(codes.words, bits, H * D).view(B, S, ranges, H * D // ranges)
    all_BTHD[:, :S] = torch.addcmul(
        codes.low[..., None].float(), codes.scale[..., None].float(), codes_BSGg.float()
    ).view(B, S, H, D)
    return all_BTHD.transpose(1, 2)


class PackedLayer(QuantizedLayer):  # type: ignore[misc]
    """Keys and values of one attention layer.

    nbits: 2 to 8. q_group_size: the most channels that share a range; those of a head are divided
    evenly. residual_length: how many tokens stay as they are before they are quantized together.
    """

    keys: Any  # [B, H, R, D], the newest tokens
    values: Any
    _quantized_keys: Any  # `Codes` of those before
    _quantized_values: Any
    cumulative_length: int

    def __init__(self, nbits: int = 4, q_group_size: int = 32, residual_length: int = 128) -> None:
        if nbits not in WIDTHS:
            raise LLQError(f"a cache of {nbits!r} bits is outside {WIDTHS[0]}..{WIDTHS[-1]}")
        for name, value in (("q_group_size", q_group_size), ("residual_length", residual_length)):
            if not isinstance(value, int) or value < 1:
                raise LLQError(f"{name}={value!r} of the cache must be at least 1")
        super().__init__(nbits=nbits, q_group_size=q_group_size, residual_length=residual_length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = _none_of(key_states), _none_of(value_states)
        self._quantized_keys = self._quantize(self.keys)
        self._quantized_values = self._quantize(self.values)
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
            self._read(self._quantized_keys, self.keys),
            self._read(self._quantized_values, self.values),
        )
        if is_prompt or self.keys.shape[-2] >= self.residual_length:
            self._quantized_keys = self._quantized_keys.then(self._quantize(self.keys))
            self._quantized_values = self._quantized_values.then(self._quantize(self.values))
            self.keys, self.values = _none_of(self.keys), _none_of(self.values)
        return read

    def _read(self, codes: Codes, recent_BHSD: Tensor) -> Tensor:
        return self._dequantize(codes, recent_BHSD) if codes.low.shape[1] else recent_BHSD

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Codes:
        width = tensor.shape[-1]
        fitting = [size for size in range(1, width + 1) if width % size == 0]
        group = max(size for size in fitting if size <= self.q_group_size)
        return encode(tensor, self.nbits, group)

    def _dequantize(self, codes: Codes, recent_BHSD: Tensor) -> Tensor:
        return decode(codes, self.nbits, recent_BHSD)

    # --- sequences and tokens that change places, or go -------------------------------------------

    def _change(
        self, of_codes: Callable[[Tensor], Tensor], of_states: Callable[[Tensor], Tensor]
    ) -> None:
        """Change the codes [B, S, ...] and the newest tokens [B, H, S, D]."""
        if not self.is_initialized:
            return
        self._quantized_keys = self._quantized_keys.each(of_codes)
        self._quantized_values = self._quantized_values.each(of_codes)
        self.keys, self.values = of_states(self.keys), of_states(self.values)

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
        coded = min(kept, self._quantized_keys.low.shape[1])
        # Copies, so that the memory of what goes is free.
        self._change(lambda t: t[:, :coded].clone(), lambda t: t[..., : kept - coded, :].clone())
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
        held = (*self._quantized_keys, *self._quantized_values, self.keys, self.values)
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
