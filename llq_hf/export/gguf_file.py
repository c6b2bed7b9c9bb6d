"""llama.cpp's format: one GGUF file of the model, its tokenizer and our codes.

    type   bits  grids       a block of 32 weights
    Q4_0   4     symmetric   fp16 scale d; 16 bytes       weight = d * (code - 8)
    Q4_1   4     asymmetric  d; fp16 minimum m; 16 bytes  weight = d * code + m
    Q5_0   5     symmetric   d; 4 bytes; 16 bytes         weight = d * (code - 16)
    Q5_1   5     asymmetric  d; m; 4 bytes; 16 bytes      weight = d * code + m
    Q8_0   8     symmetric   d; 32 bytes, signed          weight = d * (code - 128)

Groups of more columns than 32 are several blocks with the same scale. Byte j of the 16 holds the
low bits of codes j and j + 16; bit j of the 4 bytes is the fifth bit of code j. m = -d * zero point
is rounded to fp16, which is all that is rounded: weights on symmetric grids are ours bit for bit.

Linears may be of different types. Vectors are fp32, all else is of `dtype`. Names and keys are
those of llama.cpp's converter for Llama, which also turns the rows of q and k: transformers rotates
a head's first half with its second, llama.cpp even rows with odd ones.

llama.cpp cuts text by rules in its own code, which a file names in one word. That word is found by
comparing the tokenizer's rules with those known here, never guessed: a wrong one makes a wrong
model without an error.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.carried import carried, is_licence, own_file
from ..checkpoints.dense import header, provenance
from ..common.errors import LLQError
from ..common.files import copy
from ..common.spec import Spec
from ..models.load import load_tokenizer
from ..numerics.grids import Affine
from .base import AffineFormat, Grid, Model

BLOCK = 32  # weights
FILE, ROPE = "model.gguf", "rope_freqs.weight"
CURE = "give --format gguf-f16, for llama.cpp's own convert_hf_to_gguf.py"
# Bytes of a block -> its type.
TYPES = {18: "Q4_0", 20: "Q4_1", 22: "Q5_0", 24: "Q5_1", 34: "Q8_0"}
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# --- how text is cut: llama.cpp's word for it, and the tokenizer's own rules ----------------------

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (what splits text, one after the other; whether a word in the vocabulary skips the merges)
CUTS: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": (["bytes by GPT-2's rule"], False),
    "smollm": (["single digits", "bytes by GPT-2's rule"], False),
    "llama-bpe": ([_LLAMA3, "bytes"], True),
}


@dataclass(frozen=True)
class GGUFFormat(AffineFormat):
    name: ClassVar[str] = "gguf"
    widths: ClassVar[tuple[int, ...]] = (4, 5, 8)
    file: ClassVar[str | None] = FILE
    one_grid: ClassVar[bool] = False
    keeps_names: ClassVar[bool] = False

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        return torch.float32 if tensor.ndim == 1 else self.dtype

    # --- linears ----------------------------------------------------------------------------------

    def check(self, affine: Affine) -> None:
        super().check(affine)
        columns, size = affine.codes_OI.shape[1], affine.group_size
        if not affine.in_order:
            raise LLQError(
                "its groups are of scattered columns (act_order), and this format has no index "
                "for them"
            )
        if (columns if size == -1 else size) % BLOCK:
            raise LLQError(
                f"its groups of {columns if size == -1 else size} columns are no whole blocks of "
                f"{BLOCK}; quantize with group_size={BLOCK} or a multiple of it"
            )
        if affine.bits == 8 and not affine.sym:
            raise LLQError("its 8-bit grids have zero points, and Q8_0 has none; quantize with sym")

    def pack(self, affine: Affine) -> dict[str, Tensor]:
        rows, columns = affine.codes_OI.shape
        codes_OB32 = affine.codes_OI.view(rows, columns // BLOCK, BLOCK)
        scale_OB, zero_OB = (
            part.repeat_interleave(columns // BLOCK // part.shape[1], dim=1)
            for part in (affine.scale_OG.half(), affine.zero_OG)
        )
        parts = [_bytes(scale_OB)]
        if not affine.sym:
            least_OB = (-scale_OB.float() * zero_OB).half()
            if not torch.isfinite(least_OB).all():
                raise LLQError("the least weight of a group does not fit float16")
            parts.append(_bytes(least_OB))
        parts += _codes(codes_OB32, affine.bits)
        return {"weight": torch.cat(parts, dim=-1).flatten(1)}

    # --- the file ---------------------------------------------------------------------------------

    def check_model(self, model: Model) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise LLQError(
                "to write GGUF files the package gguf is needed: pip install 'llq-hf[gguf]'"
            )
        _describe(_writer(), model)
        _names(model)

    def finish(self, parts: Sequence[Path], folder: Path, model: Model, grid: Grid | None) -> int:
        names, config = _names(model), model.skeleton.config
        specs = [{n: s for n, s in header(part).items() if n in names} for part in parts]
        kinds = _kinds({name: spec for each in specs for name, spec in each.items()}, model)
        factors = _rope_factors(config)
        writer = _writer()
        _describe(writer, model)
        _add_file_type(writer, kinds)
        if factors is not None:
            _announce(writer, ROPE, Spec(tuple(factors.shape), factors.dtype), None)
        for each in specs:
            for name, spec in each.items():
                _announce(writer, names[name], spec, kinds.get(name))
        writer.write_header_to_file(folder / FILE)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for part, each in zip(parts, specs, strict=True):
            tensors = load_file(part)
            for name in each:
                writer.write_tensor_data(_as_numpy(_turned(name, tensors[name], config)))
            part.unlink()
        writer.close()
        for name in filter(is_licence, carried(model.path)):
            copy(own_file(model.path, name) or model.path / name, folder / name)
        return sum(spec.nbytes for each in specs for spec in each.values())


def _writer() -> Any:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    return GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])


# --- blocks ---------------------------------------------------------------------------------------


def _bytes(scale_OB: Tensor) -> Tensor:
    """fp16 [O, B] -> uint8 [O, B, 2]."""
    return scale_OB.contiguous()[..., None].view(torch.uint8)


def _codes(codes_OB32: Tensor, bits: int) -> list[Tensor]:
    """The bytes of codes, uint8 [O, B, ...]."""
    if bits == 8:
        return [codes_OB32 ^ 128]  # code - 128, signed
    low = (codes_OB32[..., :16] & 15) | ((codes_OB32[..., 16:] & 15) << 4)
    if bits == 4:
        return [low]
    fifth = (codes_OB32 >> 4).view(*codes_OB32.shape[:2], 4, 8)
    weights = torch.arange(8, dtype=torch.uint8)
    return [(fifth << weights).sum(-1, dtype=torch.uint8), low]


# --- tensors --------------------------------------------------------------------------------------


def _names(model: Model) -> dict[str, str]:
    """llama.cpp's name of every tensor, by the model's."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, model.skeleton.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in model.skeleton.state_dict():
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LLQError(f"llama.cpp's Llama has no tensor like {name}; {CURE}")
        names[name] = found
    return names


def _kinds(specs: Mapping[str, Spec], model: Model) -> dict[str, str]:
    """The type of each tensor of blocks; others are left out."""
    kinds = {}
    for name, spec in specs.items():
        if spec.dtype == torch.uint8:
            columns = model.skeleton.get_submodule(name.removesuffix(".weight")).in_features
            kinds[name] = TYPES[spec.shape[1] * BLOCK // columns]
    return kinds


def _announce(writer: Any, name: str, spec: Spec, kind: str | None) -> None:
    """Add a tensor to the header. kind: of blocks, whose spec counts bytes; None: floats."""
    import numpy as np
    from gguf import GGMLQuantizationType

    raw = GGMLQuantizationType[kind or FLOATS[spec.dtype]]
    element = np.dtype(np.uint8 if kind else np.float32)
    writer.add_tensor_info(name, spec.shape, element, spec.nbytes, raw)


def _turned(name: str, tensor: Tensor, config: Any) -> Tensor:
    """q and k, weights and biases, with the rows of each head in llama.cpp's order."""
    module = name.rpartition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.rpartition(".")[2])
    if count is None:
        return tensor
    rows_H2d = torch.arange(len(tensor)).view(count, 2, -1)
    return tensor[rows_H2d.transpose(1, 2).flatten()]


def _as_numpy(tensor: Tensor) -> Any:
    """A view of its numbers; bf16, which numpy does not know, as pairs of bytes."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _rope_factors(config: Any) -> Tensor | None:
    """What each frequency [head_dim / 2] is divided by, where rope is scaled as in Llama 3.1.

    From transformers' own frequencies, scaled and not.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    places = torch.arange(0, 2 * len(scaled), 2, dtype=torch.int64).float() / (2 * len(scaled))
    factors: Tensor = (1.0 / rope["rope_theta"] ** places) / scaled
    return factors


# --- keys -----------------------------------------------------------------------------------------


def _describe(writer: Any, model: Model) -> None:
    """All keys of model and tokenizer. LLQError for what llama.cpp's Llama cannot be."""
    config = model.skeleton.config
    if config.model_type != "llama":
        raise LLQError(
            f"models of type {config.model_type} are not written as GGUF, only llama; {CURE}"
        )
    if config.hidden_act != "silu":
        raise LLQError(f"llama.cpp's Llama has no activation {config.hidden_act}; {CURE}")
    writer.add_name(provenance(model.path)["model"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _describe_rope(writer, config)
    _describe_tokenizer(writer, load_tokenizer(model.path), config.vocab_size)


def _describe_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise LLQError(f"rope of type {kind} is not written as GGUF; {CURE}")


def _add_file_type(writer: Any, kinds: Mapping[str, str]) -> None:
    """What people call the file: the most frequent type of its tensors of blocks."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    most = Counter(kinds.values()).most_common(1)[0][0]
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{most}"])


def _describe_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Tokens, merges, and how text is cut. LLQError where llama.cpp would cut it otherwise."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(rules))
    tokens, types = _tokens(rules, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = rules["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    )
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(rules: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and type of each token id of the model; those that the tokenizer lacks are unused."""
    from gguf import TokenType

    tokens = [f"[PAD{token}]" for token in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    added = [(each["content"], each["id"], each["special"]) for each in rules["added_tokens"]]
    words = [(word, token, None) for word, token in rules["model"]["vocab"].items()]
    for text, token, special in [*words, *added]:
        if token >= vocabulary:
            raise LLQError(
                f"the tokenizer has a token {token} ({text!r}) and the model {vocabulary} rows of "
                "embeddings: they do not belong together"
            )
        kind = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
        tokens[token], types[token] = text, int(kind[special])
    return tokens, types


def cut_of(rules: dict[str, Any]) -> str:
    """llama.cpp's word for how a tokenizer (the JSON of tokenizer.json) cuts text before it merges
    bytes. LLQError where it knows none that does the same.
    """
    model = rules["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or rules.get("normalizer"):
        raise LLQError(
            "its tokenizer is no byte-level BPE without a normalizer, and no other is written as "
            f"GGUF; {CURE}"
        )
    cuts = list(_cuts(rules["pre_tokenizer"]))
    for word, (known, skips_merges) in CUTS.items():
        if cuts == known and bool(model.get("ignore_merges")) == skips_merges:
            return word
    raise LLQError(
        f"its tokenizer cuts text by {' | '.join(map(str, cuts))!r:.160}, which llama.cpp has no "
        f"name for among those known here ({', '.join(CUTS)}): it would read other tokens. Give "
        "--format dense, for engines that take tokenizers as they are"
    )


def _cuts(rule: dict[str, Any] | None) -> Iterator[Any]:
    """The parts of a pre-tokenizer, in words where CUTS has such; else as they are."""
    kind = rule["type"] if rule else None
    if rule is None:
        yield "nothing"
    elif kind == "Sequence":
        for part in rule["pretokenizers"]:
            yield from _cuts(part)
    elif kind == "ByteLevel" and not rule["add_prefix_space"]:
        yield "bytes by GPT-2's rule" if rule.get("use_regex", True) else "bytes"
    elif kind == "Digits" and rule["individual_digits"]:
        yield "single digits"
    elif kind == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        yield rule["pattern"].get("Regex", rule)
    else:
        yield rule
