"""Checks that the peak memory of `llq quantize` does not grow with the number of blocks.

    python tests/bench/streaming_memory.py                       RTN and GPTQ, 4 and 8 blocks
    python tests/bench/streaming_memory.py --method gptq --hidden 2048 --ffn 7168 --blocks 4 8

It makes random checkpoints in the shape of LLaMA-3-8B with different numbers of blocks (436 MB a
block in bf16), quantizes each in a process of its own, and prints the peak resident memory that
the kernel reports. It exits with 1 where the deepest model took more than 1.1 times the memory of
the shallowest. The checkpoints are deleted again.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 1.1
HEAD = 128
DEMO = Path(__file__).resolve().parents[2] / "llq_hf" / "demo" / "llama"
METHOD_OPTIONS = {"rtn": ["--bits", "4"], "gptq": ["--bits", "3"], "quip": ["--bits", "2"]}


def shapes_of_block(hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    keys = hidden // 4  # 8 of 32 heads
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def make_checkpoint(folder: Path, blocks: int, hidden: int, ffn: int, vocab: int) -> None:
    """A LLaMA-3 folder with random weights, a file per block; no more than a block is in memory
    here either.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for index in range(blocks + 1):
        shapes = {
            f"model.layers.{index}.{name}": shape
            for name, shape in shapes_of_block(hidden, ffn).items()
        }
        if index == blocks:
            shapes = {
                "model.embed_tokens.weight": (vocab, hidden),
                "lm_head.weight": (vocab, hidden),
            }
            shapes["model.norm.weight"] = (hidden,)
        file = f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(
            {
                name: torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
                for name, shape in shapes.items()
            },
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map.update(dict.fromkeys(shapes, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = json.loads((DEMO / "config.json").read_text())
    config.update(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        vocab_size=vocab,
        head_dim=HEAD,
    )
    config.update(num_attention_heads=hidden // HEAD, num_key_value_heads=hidden // HEAD // 4)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    np.save(folder.parent / "ids.npy", np.random.default_rng(0).integers(0, vocab, (4, 256)))


def measure(command: list[str]) -> tuple[int, float]:
    """(peak resident bytes, seconds) of a command; its output is shown where it fails.

    A child inherits its parent's peak at fork, so this process must stay small: torch is never
    imported here.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-3000:]}")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints go; default: a temporary folder"
    )
    arguments = parser.parse_args()

    block_bytes = 2 * sum(map(math.prod, shapes_of_block(arguments.hidden, arguments.ffn).values()))
    needed = 2 * max(arguments.blocks) * block_bytes
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="llq-streaming-") as name:
        if shutil.disk_usage(name).free < needed:
            sys.exit(f"{name} has no {needed / 2**30:.1f} GiB free; give another --folder")
        peaks: dict[str, dict[int, int]] = {method: {} for method in arguments.method}
        print(
            f"hidden {arguments.hidden}, ffn {arguments.ffn}, vocabulary {arguments.vocab}, "
            "bf16, CPU"
        )
        print(
            f"{'method':8} {'blocks':>6} {'base GiB':>9} {'peak RSS MiB':>13} "
            f"{'ratio':>6} {'s':>6}",
            flush=True,
        )
        for blocks in arguments.blocks:
            root = Path(name) / str(blocks)
            root.mkdir()
            model = root / "model"
            maker = multiprocessing.get_context("spawn").Process(
                target=make_checkpoint,
                args=(model, blocks, arguments.hidden, arguments.ffn, arguments.vocab),
            )
            maker.start()
            maker.join()
            if maker.exitcode != 0:
                sys.exit("the checkpoint could not be made")
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            for method in arguments.method:
                command = [
                    sys.executable,
                    "-m",
                    "llq_hf",
                    "quantize",
                    str(model),
                    str(root / method),
                ]
                command += ["--method", method, *METHOD_OPTIONS.get(method, []), "--device", "cpu"]
                command += ["--no-speak"]  # that loads the packed model
                command += ["--calibration", str(root / "ids.npy"), "--calibration-samples", "4"]
                peak, seconds = measure(command)
                peaks[method][blocks] = peak
                ratio = peak / peaks[method][min(peaks[method])]
                row = f"{method:8} {blocks:6d} {size / 2**30:9.2f} {peak / 2**20:13.0f} "
                row += f"{ratio:6.3f} {seconds:6.0f}"
                print(row, flush=True)
                shutil.rmtree(root / method)
            shutil.rmtree(root)
    worst = max(found[max(found)] / found[min(found)] for found in peaks.values())
    print(
        f"largest ratio {worst:.3f}, target at most {TARGET}: "
        f"{'met' if worst <= TARGET else 'MISSED'}"
    )
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
