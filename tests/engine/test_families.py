"""Every family of decoders is calibrated on what its own forward pass computes, or refused."""

from pathlib import Path

import pytest
import torch
from families import BY_NAME, make_model, save_model

from llq_hf import Calibration, LLQError, build
from llq_hf.checkpoints.dense import Checkpoint
from llq_hf.common.progress import Progress
from llq_hf.engine.blocks import Blocks, LiveBlocks, StreamedBlocks
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.stream import Stream
from llq_hf.models.decoder import decoder_of, hidden_of
from llq_hf.models.load import build_skeleton, module_names

IDS_NS = torch.randint(3, 384, (3, 64), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
RTN, NO_DATA = build("rtn", bits=2, group_size=32), Calibration("demo", 1, 8)

# One of each kind: one sort of attention, several by the layer or by the config, layers without
# rotary embeddings, blocks that return a tuple, learned positions.
WALKED = [
    "Llama 3",
    "Mistral",
    "Qwen 2, sliding",
    "Gemma 2",
    "Gemma 3",
    "OLMo 3",
    "Cohere 2",
    "EXAONE 4",
    "SmolLM 3",
    "OPT",
    "LFM 2",
]


def streamed(folder: Path) -> StreamedBlocks:
    checkpoint, skeleton = Checkpoint.open(str(folder)), build_skeleton(folder)
    checkpoint = checkpoint.named(module_names(skeleton, checkpoint.files))
    return StreamedBlocks(checkpoint, skeleton, torch.float32, CPU)


def hidden_states(model) -> list[torch.Tensor]:
    """The output of each block in the model's own forward pass."""
    found = []
    layers = decoder_of(model)[1].layers
    hooks = [
        block.register_forward_hook(lambda block, args, out: found.append(hidden_of(out).clone()))
        for block in layers
    ]
    with torch.no_grad():
        model(input_ids=IDS_NS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def walked(blocks: Blocks) -> list[torch.Tensor]:
    """The same in the calibration's stream."""
    stream, found = Stream(blocks, IDS_NS, None, Progress()), []
    for index, prefix in enumerate(blocks.prefixes):
        block = blocks.load(index)
        stream.enter(index, block)
        stream.advance(block, prefix)
        found.append(stream.activations.tensor_NSD.clone())
    return found


@pytest.mark.parametrize("name", WALKED)
def test_every_block_gets_what_its_model_gives_it(name: str, tmp_path: Path) -> None:
    model = make_model(BY_NAME[name])
    truth = hidden_states(model)
    for blocks in (LiveBlocks(model), streamed(save_model(BY_NAME[name], tmp_path))):
        for own, walks in zip(truth, walked(blocks), strict=True):
            assert (own - walks).abs().max() <= 1e-5 * own.abs().max()
    again = hidden_states(model)  # the model is as before
    assert all(map(torch.equal, truth, again))


EXPERTS = ["Mixtral", "GPT-OSS", "Qwen 3 MoE", "DeepSeek V3", "Jamba"]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_not_left_dense_in_silence(name: str, tmp_path: Path) -> None:
    folder = save_model(BY_NAME[name], tmp_path / "base")
    said = r"keeps \d\d% of its blocks' weights outside of linears \(such as .*experts"
    with pytest.raises(LLQError, match=said):
        quantize_checkpoint(str(folder), tmp_path / "out", RTN, NO_DATA)
    with pytest.raises(LLQError, match=said):
        quantize_model(make_model(BY_NAME[name]), RTN, None)


@pytest.mark.parametrize("name", ["Phi 3", "Qwen 2"])
def test_products_in_attention_are_quantized_or_refused(name: str) -> None:
    model = make_model(BY_NAME[name])
    method = build("smoothquant", a_bits=4)
    if name == "Phi 3":  # its queries, keys and values are one linear
        with pytest.raises(LLQError, match="its attention would stay 16 bits"):
            quantize_model(model, method, IDS_NS)
        method = build("smoothquant", a_bits=4, quantize_bmm_input=False)
    quantize_model(model, method, IDS_NS)


def test_the_table_of_families_is_whole() -> None:
    """`tests/bench/family_table.py --write` makes it."""
    page = (Path(__file__).parents[2] / "llq_hf" / "methods" / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "FAILS" not in line]
    assert all(any(row.startswith(f"| {name} | `") for row in rows) for name in BY_NAME)


# --- what a decoder may not do --------------------------------------------------------------------


class Changed(torch.nn.Module):
    """A decoder that changes what it hands from block to block, or gives arguments by content."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.embed = torch.nn.Embedding(384, 8)
        self.layers = torch.nn.ModuleList(Doubling() for _ in range(3))

    def get_decoder(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x_BSD = self.embed(input_ids)
        for block in self.layers:
            if self.fault == "changes":
                x_BSD = x_BSD + 1
            x_BSD = block(x_BSD, by=input_ids if self.fault == "content" else None)
            if self.fault == "again":
                block(x_BSD)
        return x_BSD


class Doubling(torch.nn.Module):
    def forward(self, x_BSD: torch.Tensor, by: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * x_BSD


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("changes", "Changed does more between its blocks than to hand on hidden states"),
        ("again", "Changed does more between its blocks than to hand on hidden states"),
        ("content", "Changed gives its blocks arguments that depend on the tokens"),
    ],
)
def test_what_is_no_stream_from_block_to_block_is_refused(fault: str, said: str) -> None:
    blocks = LiveBlocks(Changed(fault))
    if not said:
        Stream(blocks, IDS_NS, None, Progress())
        return
    with pytest.raises(LLQError, match=said):
        Stream(blocks, IDS_NS, None, Progress())
