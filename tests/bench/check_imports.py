"""Takes in checkpoints that GPTQModel and llm-compressor made here: weights beside their own.

    python tests/bench/check_imports.py [--environments /tmp/llq-makers]

uv makes an environment for each library (6 GB) unless it is there. Each library quantizes the demo
model, on the CPU, and says what weights it means, by its own dequantization; `llq convert` takes
the checkpoint in. The script fails where a weight of ours, in the dtype of theirs, is another
number, or where the KL divergence of the converted model from one with their weights is above what
the order of a sum explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from environments import GPTQMODEL, environment, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf.demo import resolve
from llq_hf.layers.linear import QuantLinear

LLMCOMPRESSOR = ["llmcompressor>=0.14"]
# What follows `-c`: makes the checkpoint sys.argv[2] of the model sys.argv[1] by the options
# sys.argv[3] (JSON) and the texts in the file sys.argv[4], and saves its weights to
# sys.argv[2]/theirs.
BY_GPTQMODEL = """
import json, os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # on two cores it takes 1, and refuses that
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
base, out, options, texts = sys.argv[1:]
os.chdir(os.path.dirname(out))  # it writes logs where it stands
model = GPTQModel.load(base, QuantizeConfig(**json.loads(options), device="cpu"))
model.quantize(json.load(open(texts)), batch_size=1)
model.save(out)
awq = json.loads(options).get("method") == "awq"
backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
model = GPTQModel.load(out, backend=backend, device="cpu", dtype=torch.float16).model
def weight(module):
    if not awq:
        return module.dequantize_weight()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    tensors = module.qweight, module.qzeros, module.scales
    return dequantize_gemm(*tensors, module.bits, module.group_size)
weights = {
    name: weight(module).T.contiguous().clone()
    for name, module in model.named_modules()
    if hasattr(module, "qweight")
}
save_file(weights, out + "/theirs")
"""
BY_LLMCOMPRESSOR = """
import json, sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
base, out, options, texts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**json.loads(options)))
recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
plain = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, quantization_config=plain)
weights = {
    name: module.weight.detach().clone()
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and name != "lm_head"
}
save_file(weights, out + "/theirs")
"""
CASES = {
    "gptq-4": ("gptqmodel", {"bits": 4, "group_size": 64, "sym": True}),
    "gptq-4-asymmetric": ("gptqmodel", {"bits": 4, "group_size": 32, "sym": False}),
    "gptq-4-act-order": ("gptqmodel", {"bits": 4, "group_size": 64, "desc_act": True}),
    "gptq-3": ("gptqmodel", {"bits": 3, "group_size": 64}),
    "gptq-8-v2": ("gptqmodel", {"bits": 8, "group_size": 64, "format": "gptq_v2"}),
    "awq-4": ("gptqmodel", {"bits": 4, "group_size": 64, "method": "awq", "format": "gemm"}),
    "compressed-4": (
        "llmcompressor",
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
    ),
    "compressed-4-asymmetric": (
        "llmcompressor",
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64},
    ),
    "compressed-8-rows": (
        "llmcompressor",
        {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    ),
}
MAKERS = {
    "gptqmodel": (GPTQMODEL, BY_GPTQMODEL),
    "llmcompressor": (LLMCOMPRESSOR, BY_LLMCOMPRESSOR),
}
TEXTS = 64  # of the demo's calibration, as texts
TOLERANCE = 1e-6  # nats


def texts(model: str) -> str:
    """What both libraries calibrate on, as JSON."""
    from llq_hf.data.calibration import Calibration

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids_NS = Calibration("demo", samples=TEXTS, seqlen=256).ids(tokenizer, len(tokenizer))
    return json.dumps([tokenizer.decode(row) for row in ids_NS])


@torch.no_grad()
def compared(folder: Path, theirs: dict[str, torch.Tensor]) -> tuple[int, float]:
    """How many weights of a converted checkpoint are other numbers, and the KL divergence (nats a
    token, fp32) from the model that has `theirs`.
    """
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed = {n: m for n, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert packed.keys() == theirs.keys(), sorted(packed.keys() ^ theirs.keys())
    differing = 0
    for name, module in packed.items():
        weight_OI = module.dequantized()
        differing += int((weight_OI.to(theirs[name].dtype) != theirs[name]).sum())
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight.data = theirs[name].float()
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, plain)
    ids = torch.arange(2, 258)[None]
    log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (other, ours))
    return differing, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=Path("/tmp/llq-makers"))
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    arguments, failed = parser.parse_args(), []
    model = resolve("demo")
    for name in arguments.only:
        maker, options = CASES[name]
        packages, code = MAKERS[maker]
        python = environment(arguments.environments / maker, packages)
        with tempfile.TemporaryDirectory() as scratch:
            made, taken = Path(scratch) / "made", Path(scratch) / "taken"
            calibration = Path(scratch) / "texts.json"
            calibration.write_text(texts(model))
            run(python, "-c", code, model, made, json.dumps(options), calibration)
            theirs = load_file(made / "theirs")
            run(sys.executable, "-m", "llq_hf", "convert", made, taken)
            differing, kl = compared(taken, theirs)
        print(f"{name} by {maker}: {differing} other weights, KL {kl:.2e}", flush=True)
        failed += [name] if differing or not abs(kl) < TOLERANCE else []
    sys.exit(f"not theirs: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
