"""A tiny LLaVA with a processor, and pictures and conversations on the disk, in LLaVA's own layouts."""

import copy
import json

import numpy as np
import torch
from models import make_config
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaProcessor

SIDE, PATCH = 8, 4  # of what the vision tower sees, in pixels
TOKENS_PER_IMAGE = (SIDE // PATCH) ** 2

# As LLaVA 1.5's: images are parts of a message.
PARTS_TEMPLATE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# As Phi-3's: text alone, and an end of text after the last answer only.
TEXT_TEMPLATE = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""


def make_processor(tokenizer, template=None):
    """A LlavaProcessor with a copy of the tokenizer, which gets a token for images."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = template if template == TEXT_TEMPLATE else None
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if template == PARTS_TEMPLATE else None,
    )


def make_model(processor, family="olmoe", *, seed=0, **text):
    """A LLaVA for a processor, with random weights."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text_config = make_config(family, vocab_size=len(processor.tokenizer), **text)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text_config, image_token_index=image_id)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        # Routers far from ties, so that one rounding does not change who is chosen.
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)
    return model


def picture(seed, size=(12, 9)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def entry(number, images=1, *, turns=1, image_key="image"):
    """One entry of LLaVA's JSON, with as many images and exchanges."""
    conversations = []
    for turn in range(turns):
        placeholders = "<image>\n" * images if turn == 0 else ""
        conversations.append({"from": "human", "value": f"{placeholders}What about {number}, {turn}?"})
        conversations.append({"from": "gpt", "value": f"Answer {number} of turn {turn}."})
    names = [f"coco/train2017/{number:06d}_{image}.jpg" for image in range(images)]
    found = {"id": number if number % 2 else f"{number:09d}", "conversations": conversations}
    return found | ({image_key: names[0] if images == 1 else names} if images else {})


def write_llava(folder, entries, *, leave_out=()):
    """The JSON and its images, all in one folder; returns the JSON's path."""
    for row in entries:
        names = row.get("image", [])
        for name in [names] if isinstance(names, str) else names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name not in leave_out:
                picture(len(name) + int(name[15:21])).save(path)
    (folder / "llava.json").write_text(json.dumps(entries))
    return folder / "llava.json"
