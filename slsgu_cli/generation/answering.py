"""A vision-language model that answers questions, with its CLIP vision tower at hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from slsgu_cli.batches import spans
from slsgu_cli.generation.live import LiveEncoder
from slsgu_cli.generation.loading import explained, library, quiet, require_family
from slsgu_cli.models import pick_device

BATCH = 32
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image."""

    image: Image.Image
    text: str


@dataclass(frozen=True, slots=True)
class Respondent:
    """A LLaVA in memory, and its vision tower."""

    model: Any
    processor: Any
    encoder: LiveEncoder
    device: str

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "Respondent":
        """Load the model in a folder: fp16 on a GPU, fp32 elsewhere.

        Raises MissingError, InputError, and UsageError where it is no LLaVA.
        """
        target = require_family(path, answers=True)
        device = pick_device(device)
        transformers = library("transformers")
        half = device.startswith("cuda")
        with quiet(), explained(path):
            processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                path, local_files_only=True, dtype=torch.float16 if half else torch.float32
            )
        model = model.to(device).eval()
        return cls(model, processor, LiveEncoder.find(model, target.encoders[0]), device)

    def answers(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield the answer to each question, in order, always the likeliest next word."""
        tokens = self.processor.tokenizer
        for start, stop in spans(len(questions), BATCH):
            inputs = self.inputs(questions[start:stop], padding_side="left")
            with torch.no_grad(), quiet():
                said = self.model.generate(
                    **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, use_cache=True
                )
            new = said[:, inputs["input_ids"].shape[1] :]
            yield from (text.strip() for text in tokens.batch_decode(new, skip_special_tokens=True))

    def inputs(
        self,
        questions: Sequence[Question],
        *,
        padding_side: str,
        answers: Sequence[str] | None = None,
    ) -> Any:
        """Return model inputs for questions, each with its answer where there are answers."""
        texts = [self._prompt(question.text) for question in questions]
        if answers is not None:
            texts = [f"{text} {answer}" for text, answer in zip(texts, answers, strict=True)]
        self.processor.tokenizer.padding_side = padding_side
        with quiet():
            made = self.processor(
                images=[question.image.convert("RGB") for question in questions],
                text=texts,
                return_tensors="pt",
                padding=True,
            )
        return made.to(self.device, self.model.dtype)

    def _prompt(self, question: str) -> str:
        """Return the conversation as the model was trained on it."""
        if getattr(self.processor, "chat_template", None) is None:
            return f"USER: <image>\n{question} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(conversation, add_generation_prompt=True))
