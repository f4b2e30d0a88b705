"""Tiny untrained vision-language models, each as transformers saves it with its processor.

The vision tower is that of the tiny CLIP, or of a tiny SigLIP without its attention pool.
"""

from pathlib import Path

import hf_clip
import hf_siglip
import tiny_clip
import torch

KINDS = ("llava_next", "llava_onevision", "paligemma")
WORDS = (
    "USER:",
    "ASSISTANT:",
    "What",
    "is",
    "shown",
    "in",
    "this",
    "image",
    "?",
    "This",
    "a",
    *tiny_clip.COLOURS,
    *tiny_clip.SHAPES,
)
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "ASSISTANT:{% endfor %}"
)
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def tokenizer():
    """Return a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "<s>", "</s>", "[UNK]", "<image>", "<video>", *WORDS]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="[UNK]",
        extra_special_tokens={"image_token": "<image>"},
    )


def tower_of(kind: str):
    """Return a kind's vision tower by transformers, and all of its CLIP's weights by open_clip."""
    if kind == "llava_next":
        state = tiny_clip.fresh_model().state_dict()
        return hf_clip.model(state).vision_model, state
    whole = hf_siglip.model()
    return whole.vision_model, hf_siglip.in_open_clip(whole.state_dict())


def write_vlm(folder: Path, kind: str) -> Path:
    """Write a model of a kind with its processor."""
    import transformers

    words, (tower, _) = tokenizer(), tower_of(kind)
    image = words.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = {"llava_next": _next, "llava_onevision": _onevision, "paligemma": _paligemma}
        model, processor = made[kind](transformers, tower.config, words, image)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _text(transformers, name, words):
    return getattr(transformers, name)(vocab_size=len(words) + 1100, **LANGUAGE)


def _next(transformers, vision, words, image):
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=_text(transformers, "LlamaConfig", words),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=image,
        vision_feature_layer=-2,
    )
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = transformers.LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _onevision(transformers, vision, words, image):
    vision.vision_use_head = False
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(transformers, "Qwen2Config", words),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaOnevisionProcessor(
        images,
        words,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _paligemma(transformers, vision, words, image):
    vision.vision_use_head = False
    text = transformers.GemmaConfig(vocab_size=len(words) + 1100, head_dim=16, **LANGUAGE)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=image, projection_dim=32
    )
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, words)
    return transformers.PaliGemmaForConditionalGeneration(config), processor
