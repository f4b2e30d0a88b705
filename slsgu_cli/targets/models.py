"""Models built on CLIP in memory: pipelines, LLaVAs, and their CLIP layers."""

import importlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.edits import Edit, by_layer
from slsgu_cli.checkpoints.layouts import weight_files
from slsgu_cli.checkpoints.naming_schemes import (
    TensorPlace,
    TowerPlace,
    tensor_places,
    tower_places,
)
from slsgu_cli.checkpoints.number_formats import layer_digests
from slsgu_cli.checkpoints.targets import (
    Encoder,
    Family,
    Target,
    prompt_note,
    read_target,
    with_edits,
)
from slsgu_cli.clip.batches import spans
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.errors import (
    InputError,
    MissingError,
    NotFiniteError,
    StaleError,
    UsageError,
    lacks_memory,
)
from slsgu_cli.records.codec import digest
from slsgu_cli.records.targets import DiffusionOptions
from slsgu_cli.text import first_lines


@dataclass(frozen=True, slots=True)
class LiveEncoder:
    """A CLIP tower inside a loaded model, and the outputs that the model reads."""

    module: nn.Module
    tower_place: TowerPlace
    encoder: Encoder

    @classmethod
    def find(cls, module: nn.Module, encoder: Encoder) -> "LiveEncoder":
        """Return the CLIP tower among a module's parameters. Raises InputError."""
        tower = encoder.read_from.tower
        places = [
            place for place in tower_places(dict(module.named_parameters())) if place.tower is tower
        ]
        if not places:
            raise InputError(f"{encoder.name} as loaded has no CLIP {tower} tower")
        return cls(module, places[0], encoder)

    def places(self, layer: str) -> tuple[TensorPlace, ...]:
        """Return the tensors of a layer. Raises InputError if it is missing or has no influence."""
        if reason := self.encoder.why_not(layer):
            raise InputError(
                f"{layer} cannot influence {self.encoder.name}: {reason}",
                hint="search with --target, which leaves such layers out",
            )
        places = tensor_places(layer, self.tower_place)
        if not places:
            raise InputError(f"{self.encoder.name} has no layer {layer}")
        return places

    def value(self, layer: str) -> Tensor:
        """Return the current values of a layer in open_clip's shape."""
        return joined(self.places(layer), [one.data for one in self.parameters(layer)])

    @contextmanager
    def edited(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace the values of layers within a block."""
        parameters = {id(p): p for layer in values for p in self.parameters(layer)}.values()
        originals = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        try:
            self.put(values)
            yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Replace the values of layers permanently."""
        for layer, value in values.items():
            for place, parameter in zip(self.places(layer), self.parameters(layer), strict=True):
                place.rows(parameter.data).copy_(place.from_layer(value))

    def parameters(self, layer: str) -> list[nn.Parameter]:
        """Return the parameters that hold a layer, in order."""
        return [self.module.get_parameter(place.key) for place in self.places(layer)]

    def gradients(self, loss: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of a loss for each layer, fp32, in open_clip's shape."""
        groups = {layer: self.parameters(layer) for layer in layers}
        flat = [parameter for group in groups.values() for parameter in group]
        found = torch.autograd.grad(loss, flat, allow_unused=True)
        whole = (
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(flat, found, strict=True)
        )
        return {
            layer: joined(self.places(layer), [next(whole).float() for _ in group])
            for layer, group in groups.items()
        }


def joined(places: Sequence[TensorPlace], parts: Sequence[Tensor]) -> Tensor:
    """Return a layer in open_clip's shape from the values of its tensors."""
    converted = [place.to_layer(part) for place, part in zip(places, parts, strict=True)]
    return converted[0] if len(converted) == 1 else torch.cat(converted)


def new_values(live: Sequence[LiveEncoder], edits: Sequence[Edit]) -> list[dict[str, Tensor]]:
    """Return for each encoder the edited values of its layers.

    An edit goes to the encoder with the weights that it was made for. Raises StaleError if
    there is none, InputError if the layer has no influence, and UsageError if one edit
    changes a whole parameter and another a third of it.
    """
    values: list[dict[str, Tensor]] = [{} for _ in live]
    for edit in chain(*by_layer(edits).values()):
        layer, place = edit.header.layer, _encoder_of(live, edit)
        now = values[place].setdefault(layer, live[place].value(layer).float())
        delta = torch.from_numpy(edit.delta()).to(now.device)
        values[place][layer] = now + edit.factor * delta
    return values


def _encoder_of(live: Sequence[LiveEncoder], edit: Edit) -> int:
    header = edit.header
    reached = [n for n, one in enumerate(live) if one.encoder.why_not(header.layer) is None]
    if not reached:
        live[0].places(header.layer)
    for number in reached:
        values = live[number].value(header.layer).float().cpu().numpy()
        if not set(header.digests.values()).isdisjoint(layer_digests(values).values()):
            return number
    raise StaleError(
        f"the target's {header.layer} is not the layer that the edit {header.name} was made for "
        f"({header.model})",
        hint=f"a target built on the model that `slsgu search {quote(header.name)}` edited",
    )


INSTALL = "pip install 'slsgu[targets]'"
PIPELINES = (Family.SD1, Family.SD2, Family.SDXL, Family.SD3, Family.FLUX, Family.OTHER)
# Trained in bf16, and not finite in fp16.
IN_BF16 = (Family.FLUX, Family.PALIGEMMA)
ANSWERING = (Family.LLAVA, Family.PALIGEMMA)


def require_family(path: Path, *, answers: bool) -> Target:
    """Return the target at `path`: a vision-language model, or else a diffusion pipeline.

    Raises MissingError, InputError, and UsageError for a model of the other kind.
    """
    target = read_target(path)
    if answers != (target.family in ANSWERING):
        wanted = "a vision-language model" if answers else "a diffusion pipeline"
        other = "generate" if answers else "ask"
        fits = target.family in (*PIPELINES, *ANSWERING)
        raise UsageError(
            f"{path} is {target.family}, not {wanted}", hint=f"slsgu {other}" if fits else None
        )
    if target.path.is_file():
        raise UsageError(
            f"{path} is a single file of weights without a pipeline's configuration",
            hint="convert it to a folder: diffusers' from_single_file(...).save_pretrained(...)",
        )
    return target


def _placed(path: Path, device: str, *, answers: bool) -> tuple[Target, str, torch.dtype]:
    """Return the target at `path`, its device and its precision: 16 bits on a GPU, else fp32.

    Raises the errors of `require_family`, and UsageError for an unknown device.
    """
    target = require_family(path, answers=answers)
    device = pick_device(device)
    half = torch.bfloat16 if target.family in IN_BF16 else torch.float16
    return target, device, half if device.startswith("cuda") else torch.float32


def library(name: str) -> Any:
    """Import an optional library without its progress bars. Raises ImportError."""
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    return importlib.import_module(name)


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of all the weights in a model's folder and the folders in it."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    files = [path for inner in folders for path in weight_files(inner)]
    return digest(
        {str(path.relative_to(folder)): ClipWeights.of_file(path).fingerprint() for path in files}
    )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise a library's failure to load the model at `path` as one message."""
    try:
        yield
    except ImportError as error:
        raise MissingError(f"{path} needs a package: {error}", hint=INSTALL) from error
    except Exception as error:  # each library raises its own kinds here
        if lacks_memory(error):
            raise
        raise InputError(
            f"cannot load {path}: {first_lines(error)}", hint="check that it is complete"
        ) from error


def _not_finite(what: str, model: str) -> NotFiniteError:
    return NotFiniteError(
        f"{what} is not finite: the {model} or its edit has NaN or infinite values",
        hint="check its weights; in fp16 on a GPU, try --device cpu",
    )


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image to generate: its prompt, the seed of its noise, and the class to show, if known."""

    prompt: str
    seed: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline in memory, and its text encoders."""

    pipeline: Any
    encoders: tuple[LiveEncoder, ...]
    device: str
    target: Target

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "Pipeline":
        """Load the pipeline in a folder: in 16 bits on a GPU, fp32 elsewhere.

        Raises MissingError, InputError, and UsageError if it is not a pipeline.
        """
        target, device, precision = _placed(path, device, answers=False)
        with progress.quiet(), explained(path):
            pipeline = (
                library("diffusers")
                .DiffusionPipeline.from_pretrained(
                    path, local_files_only=True, torch_dtype=precision
                )
                .to(device)
            )
        pipeline.set_progress_bar_config(disable=True)
        encoders = tuple(
            LiveEncoder.find(getattr(pipeline, encoder.name), encoder)
            for encoder in target.encoders
        )
        return cls(pipeline, encoders, device, target)

    def edited_names(self, values: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """Return the names of the encoders with edited layers."""
        pairs = zip(self.encoders, values, strict=True)
        return [live.encoder.name for live, new in pairs if new]

    def put(self, edits: Sequence[Edit], *, searched: str) -> list[str]:
        """Apply edits of other encoders than the `searched` one permanently; return their names.

        Raises UsageError for an edit of it, and StaleError or InputError as `new_values`.
        """
        values = new_values(self.encoders, edits)
        names = self.edited_names(values)
        if searched in names:
            raise UsageError(
                f"--with takes edits of other text encoders, but one of these edits {searched}, "
                "the encoder that is searched",
                hint="`slsgu search NAME --after EDIT` starts from an edit of the same CLIP",
            )
        for live, new in zip(self.encoders, values, strict=True):
            live.put(new)
        return names

    def warn_of_readers(self, edited: Collection[str]) -> None:
        """Note which other encoders read the prompts as well as the `edited` ones."""
        if note := prompt_note(str(self.target.path), with_edits(self.target.readers, edited)):
            progress.note(note)

    @contextmanager
    def edited(self, values: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Replace the values of layers of the text encoders within a block."""
        with ExitStack() as stack:
            for encoder, new in zip(self.encoders, values, strict=bool(values)):
                stack.enter_context(encoder.edited(new))
            yield

    def generate(
        self, jobs: Sequence[ImageJob], options: DiffusionOptions
    ) -> Iterator[Image.Image]:
        """Yield an image for each job, in order. Raises InputError for a prompt that it rejects."""
        extra = {} if options.guidance is None else {"guidance_scale": options.guidance}
        for start, stop in spans(len(jobs), options.batch):
            some = jobs[start:stop]
            noise = [torch.Generator("cpu").manual_seed(job.seed) for job in some]
            with torch.no_grad(), progress.quiet():
                try:
                    made = self.pipeline(
                        [job.prompt for job in some],
                        num_inference_steps=options.steps,
                        generator=noise,
                        output_type="np",
                        **extra,
                    )
                except (ValueError, TypeError) as error:
                    raise InputError(f"the pipeline rejects {some[0].prompt!r}: {error}") from error
            if not hasattr(made, "images"):
                kind = type(self.pipeline).__name__
                raise InputError(f"a {kind} generates no images")
            if not np.isfinite(made.images).all():
                # They would become black images, which show no concept.
                raise _not_finite(f"an image of {some[0].prompt!r}", "pipeline")
            yield from self.pipeline.numpy_to_pil(made.images)

    def generate_missing(
        self, jobs: Sequence[ImageJob], options: DiffusionOptions, done: Sequence[bool]
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield the images that are not `done`, each with the number of its job.

        An interrupted run resumes with whole batches, because the last digits of an image
        depend on the other images in its batch.
        """
        batches = [range(*span) for span in spans(len(jobs), options.batch)]
        missing = [rows for rows in batches if not all(done[number] for number in rows)]
        with progress.bar("generating", sum(map(len, missing))) as ticker:
            for rows in missing:
                images = self.generate([jobs[number] for number in rows], options)
                for number, image in zip(rows, images, strict=True):
                    yield number, image
                    ticker.advance()


def encoded(image: Image.Image, **options: Any) -> bytes:
    """Return an image as PNG, the same bytes for the same pixels, or in another format."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


BATCH = 32
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image, and the class that it shows, if known."""

    image: Image.Image
    text: str
    label: str = ""


def _require_words(ids: Tensor, scores: Tensor) -> Tensor:
    """Return the scores of next words as they are. Raises NotFiniteError unless they are finite."""
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        raise _not_finite("an answer", "model")
    return scores


@dataclass(frozen=True, slots=True)
class Llava:
    """A LLaVA or PaliGemma in memory, and its vision tower.

    A `prefixed` model, PaliGemma, takes questions without a chat template.
    """

    model: Any
    processor: Any
    encoder: LiveEncoder
    device: str
    prefixed: bool = False

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "Llava":
        """Load the model in a folder: in 16 bits on a GPU, fp32 elsewhere.

        Raises MissingError, InputError, and UsageError if it is not a vision-language model.
        """
        target, device, precision = _placed(path, device, answers=True)
        with progress.quiet(), explained(path):
            transformers = library("transformers")
            processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                path, local_files_only=True, dtype=precision
            )
        model = model.to(device).eval()
        encoder = LiveEncoder.find(model, target.encoders[0])
        return cls(model, processor, encoder, device, target.family is Family.PALIGEMMA)

    def answers(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield the answer to each question, in order, by greedy decoding."""
        tokens = self.processor.tokenizer
        for start, stop in spans(len(questions), BATCH):
            inputs = self.inputs(questions[start:stop], padding_side="left")
            with torch.no_grad(), progress.quiet():
                said = self.model.generate(
                    **inputs,
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    logits_processor=[_require_words],
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
        """Return model inputs for questions, each with its answer if `answers` are given."""
        texts = [self._prompt(question.text) for question in questions]
        suffixes = {}
        if answers is not None and self.prefixed:
            suffixes["suffix"] = list(answers)
        elif answers is not None:
            texts = [f"{text} {answer}" for text, answer in zip(texts, answers, strict=True)]
        self.processor.tokenizer.padding_side = padding_side
        with progress.quiet():
            made = self.processor(
                images=[question.image.convert("RGB") for question in questions],
                text=texts,
                return_tensors="pt",
                padding=True,
                **suffixes,
            )
        # The loss is computed elsewhere, so PaliGemma's labels are not needed.
        made.pop("labels", None)
        return made.to(self.device, self.model.dtype)

    def _prompt(self, question: str) -> str:
        """Return the question in the format that the model was trained on."""
        if self.prefixed:
            return f"<image>{question}"
        if getattr(self.processor, "chat_template", None) is None:
            return f"USER: <image>\n{question} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(conversation, add_generation_prompt=True))
