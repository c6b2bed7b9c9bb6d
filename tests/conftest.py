"""What all tests share: where the shared data lies, and checkpoints of tiny random Llamas of odd
sizes.

Helpers that are not fixtures live in namespace packages beside this file (`contract`, `reference`):
pytest puts the folder of this conftest on sys.path.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the Hub client
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test on every core: what they start gets no more than one either
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

VOCAB = 320
SEQUENCES, LENGTH = 8, 32
TEXT = (
    "the old king of the hill had a small red fox and the fox had a secret name. "
    "every day the fox ran over the hill to see the river, and every night the king asked: "
    "where were you, small fox? at the river, said the fox.\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

SIZES: dict[str, object] = {  # grouped queries, widths that no group size divides
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Tensors here are tiny: on a busy machine a second thread makes them 10 times slower
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """torch.compile's cache: in the user's, what a killed process left half written fails tests for
    ever.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder beside the repository (or $LLQ_SHARED): models and golden numbers that are
    too big for git.
    """
    folder = Path(os.environ.get("LLQ_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"no golden data in {folder}; set LLQ_SHARED to the folder of models/ and golden/"
        )
    return folder


def make_llama(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> Path:
    """A random Llama in `folder`: grouped queries, sizes that no group size divides, untied, with a
    tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"vocab_size": VOCAB, "max_position_embeddings": 128, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **own, **overrides}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms: near one, each channel different
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=random))
            else:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=random) * parameter.shape[-1] ** -0.5
                )
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def make_llava(folder: Path, tied: bool = False, **sizes: object) -> Path:
    """A random LLaVA-Next in `folder`: sizes of `make_llama`, a CLIP tower of 28 pixels, tokenizer,
    processor. sizes: of the text decoder.
    """
    import transformers

    make_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **tower),
        text_config=transformers.LlamaConfig(
            **{**SIZES, **sizes}, vocab_size=len(tokenizer), max_position_embeddings=2048
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1)
            )
    model.save_pretrained(folder)
    pictures = transformers.LlavaNextImageProcessor(
        image_grid_pinpoints=config.image_grid_pinpoints,
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
    )
    transformers.LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA-Next checkpoint in fp32, under the Hub's tensor names."""
    return make_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama checkpoint in fp32. Read-only by agreement: copy it to change
    it.
    """
    return make_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny_llama_bf16"), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one matrix for embeddings and head."""
    return make_llama(tmp_path_factory.mktemp("tiny_llama_tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_llama_biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with biases in attention and MLP."""
    return make_llama(
        tmp_path_factory.mktemp("tiny_llama_biased"), attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama into a fresh folder: make_checkpoint(hidden_size=64, ...)."""
    return lambda **options: make_llama(tmp_path_factory.mktemp("llama"), **options)


@pytest.fixture(scope="session")
def calibration_ids() -> Tensor:
    """Token ids [8, 32] for calibration."""
    return torch.randint(2, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def calibration_npy(calibration_ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ids as a file, int64."""
    path = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(path, calibration_ids.numpy().astype(np.int64))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """README's commands first: they are one test that takes minutes, and would else run alone at
    the end.
    """
    items.sort(key=lambda item: item.path.name != "test_readme.py")
