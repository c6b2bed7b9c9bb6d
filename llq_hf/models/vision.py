"""Generates answers to questions about images with a vision-language model and its processor.

What cannot be answered is an error; nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..common.errors import LLQError
from ..common.words import one_line
from .load import auto_class, load_processor, takes_images

# Control characters: a broken model writes them, and no spreadsheet accepts them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class Prompt(NamedTuple):
    """A question about images (PIL). where: its name in errors, as in "mme/test row 7"."""

    text: str
    images: Sequence[Any]
    where: str


@dataclass(frozen=True)
class VisionModel:
    """A vision-language model, on its device and in eval mode, and its processor."""

    model: Any
    processor: Any

    @classmethod
    def load(
        cls, path: str, revision: str = "main", device: str = "cpu", dtype: Any = "auto"
    ) -> VisionModel:
        """Load a packed or dense checkpoint.

        LLQError if its model takes no images or has no processor.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not takes_images(config):
            raise LLQError(
                f"{path} takes no images ({config.model_type}); score it with lm_eval --model llq"
            )
        processor = load_processor(path, revision)
        model = auto_class(config).from_pretrained(
            path, revision=revision, dtype=dtype, device_map={"": device}
        )
        return cls(model.eval(), processor)

    @property
    def longest(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs for these prompts, padded on the left.

        LLQError that names the prompts if the processor refuses them.
        """
        texts = [render_chat(self.processor, prompt.text, len(prompt.images)) for prompt in prompts]
        images = [image for prompt in prompts for image in prompt.images]
        try:
            inputs = tokenize_chats(self.processor, texts, images)
        except (ValueError, TypeError, IndexError, OSError) as error:
            where = ", ".join(prompt.where for prompt in prompts)
            raise LLQError(f"{where}: the processor refuses it ({one_line(error)})") from error
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 64, **generation: Any
    ) -> list[str]:
        """One answer for each prompt, without control characters.

        Decoding is greedy unless `generation` (options of `generate`) says otherwise. LLQError if a
        prompt with its answer is longer than the model takes.
        """
        inputs = self.inputs(prompts)
        for prompt, length in zip(prompts, inputs["attention_mask"].sum(1).tolist(), strict=True):
            if length + max_new_tokens > self.longest:
                raise LLQError(
                    f"{prompt.where}: its prompt has {length} tokens, and with {max_new_tokens} "
                    f"of the answer that is more than the {self.longest} the model takes; "
                    "give a shorter question, fewer images, or a smaller max_new_tokens"
                )
        options = {"do_sample": False, **generation}
        pad = self.processor.tokenizer.pad_token_id
        ids_BS = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **options
        )
        new_BS = ids_BS[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new_BS, skip_special_tokens=True)
        return [_CONTROL.sub("", text) for text in texts]


@contextmanager
def truncated_images_refused() -> Iterator[None]:
    """A context in which reading a truncated image is an error.

    Importing lmms-eval sets a flag by which Pillow fills in the missing part without a warning.
    """
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def render_chat(processor: Any, text: str, images: int, answer: str | None = None) -> str:
    """The text of a chat: `images` images, the question and, if given, the answer, in the chat
    template.

    Image tokens inside question and answer are removed, because each would count as an image.
    """
    token = getattr(processor, "image_token", "<image>")
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    if text.strip():
        content.append({"type": "text", "text": text.replace(token, "").strip()})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append(
            {"role": "assistant", "content": [{"type": "text", "text": answer.replace(token, "")}]}
        )
    text_of: str = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    return text_of


def tokenize_chats(processor: Any, texts: Sequence[str], images: Sequence[Any]) -> Any:
    """The processor's tensors for these texts and images, padded on the left.

    If the template has written a BOS token, none is added.
    """
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    bos = tokenizer.bos_token
    return processor(
        text=list(texts),
        images=list(images) or None,
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )
