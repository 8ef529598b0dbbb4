"""Tiny random models and images. Nothing is downloaded."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    Blip2QFormerConfig,
    CLIPConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    OPTConfig,
    T5Config,
)

from mllm.blip2 import (
    AlphaBlip2Config,
    AlphaBlip2ForConditionalGeneration,
    AlphaBlip2Processor,
    AlphaCLIPBlip2VisionConfig,
)
from mllm.llava import build_llava_processor
from mllm.llava_next import build_llava_next_processor
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
    AlphaConv2d,
)


def alpha_of(model):
    """The weight of the one alpha convolution in a model."""
    (weight,) = (module.weight for module in model.modules() if isinstance(module, AlphaConv2d))
    return weight


def save_model(folder, *parts):
    """Save a model and its processor, and return the folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def random_adapter(model, targets=r".*language_model.*\.q_proj"):
    """A model with an adapter of random LoRA matrices and another alpha weight."""
    tuned = get_peft_model(model, LoraConfig(target_modules=targets, r=4, modules_to_save=["patch_embedding.alpha"]))
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned.eval()


def tiny_vision_config(**changes):
    """Config fields of a 3-layer tower: 32 pixels, patch size 8, width 32."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    return {**fields, **changes}


def tiny_clip_config(**text_changes):
    """Config of a CLIP with that tower and a 2-layer text tower."""
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        **text_changes,
    }
    return CLIPConfig(text_config=text, vision_config=tiny_vision_config(), projection_dim=16)


def noise_image(width, height, seed=0):
    """An RGB image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(question):
    """LLaVA's prompt for a question about one image, as `apply_chat_template` returns it."""
    return f"<s>USER: <image>\n{question} ASSISTANT:"


def tiny_tokenizer():
    """A Llama tokenizer with bytes, ASCII characters and LLaVA's <image> and <pad>."""
    alphabet = [chr(code) for code in range(33, 127)]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *alphabet]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


def tiny_clip_tokenizer():
    """A CLIP tokenizer with the letters as vocabulary."""
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def build_tiny_tower(alpha_std=0.3):
    """A random Alpha-CLIP vision tower."""
    torch.manual_seed(0)
    tower = AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**tiny_vision_config())).eval()
    torch.nn.init.normal_(alpha_of(tower), std=alpha_std)
    return tower


def build_tiny_clip(geometry="pad", alpha_std=0.3):
    """A random Alpha-CLIP with both towers (a CLIP if `alpha_std` is 0), and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny_clip_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_clip_config(vocab_size=len(tokenizer), max_position_embeddings=77, **ids).to_dict()
    model = AlphaCLIPModel(AlphaCLIPConfig(**{**config, "model_type": "alpha_clip"})).eval()
    torch.nn.init.normal_(alpha_of(model), std=alpha_std)
    return model, AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(32, geometry), tokenizer)


def tiny_llava_config(tokenizer, vision_config):
    """Config of a LLaVA with a 2-layer Llama and this tower."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )


def build_tiny_llava(geometry="pad", alpha_std=0.0):
    """A random LLaVA with our tower, and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_llava_config(tokenizer, AlphaCLIPVisionConfig(**tiny_vision_config()))
    model = LlavaForConditionalGeneration(config).eval()
    if alpha_std:
        torch.nn.init.normal_(alpha_of(model), std=alpha_std)
    return model, build_llava_processor(AlphaCLIPImageProcessor.for_size(32, geometry), tokenizer, config)


def build_stock_llava():
    """A random LLaVA of Transformers with a CLIP tower."""
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(tiny_llava_config(tiny_tokenizer(), CLIPVisionConfig(**tiny_vision_config())))


def tiny_llava_next_config(tokenizer, vision_config):
    """The LLaVA config as one of LLaVA-NeXT, with one to four tiles in addition to the first."""
    fields = tiny_llava_config(tokenizer, vision_config).to_dict()
    kept = {name: fields[name] for name in ("text_config", "image_token_index", "image_seq_length")}
    grid = [[32, 64], [64, 32], [64, 64], [32, 32]]
    return LlavaNextConfig(vision_config=vision_config, image_grid_pinpoints=grid, **kept)


def build_tiny_llava_next(alpha_std=0.3):
    """A random LLaVA-NeXT with our tower, and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_llava_next_config(tokenizer, AlphaCLIPVisionConfig(**tiny_vision_config()))
    model = LlavaNextForConditionalGeneration(config).eval()
    torch.nn.init.normal_(alpha_of(model), std=alpha_std)
    return model, build_llava_next_processor(tokenizer, config, like=LlavaNextImageProcessorPil())


def tiny_text_config(kind, tokenizer):
    """Config of a 2-layer OPT ("opt") or T5 ("t5"), 64 wide because bitsandbytes packs blocks of 64."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    if kind == "opt":
        sizes = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return OPTConfig(word_embed_proj_dim=64, max_position_embeddings=512, **sizes, **ids)
    return T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **ids)


def tiny_blip2_parts(kind):
    """A tokenizer, and the fields of a BLIP-2 config with a 2-layer OPT or T5, without the tower."""
    tokenizer = tiny_tokenizer()
    qformer = Blip2QFormerConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = tiny_text_config(kind, tokenizer)
    config = {"qformer_config": qformer, "text_config": text, "num_query_tokens": 4}
    return tokenizer, {**config, "image_token_index": image_token}


def build_tiny_blip2(kind):
    """A random BLIP-2 with an Alpha-CLIP tower (nonzero alpha weight), and its processor."""
    tokenizer, config = tiny_blip2_parts(kind)
    torch.manual_seed(0)
    vision = AlphaCLIPBlip2VisionConfig(**tiny_vision_config(initializer_range=0.2))
    model = AlphaBlip2ForConditionalGeneration(AlphaBlip2Config(vision_config=vision, **config, initializer_range=0.2))
    torch.nn.init.normal_(model.query_tokens)  # at zero, all queries are equal
    torch.nn.init.normal_(alpha_of(model), std=0.3)
    images = AlphaCLIPImageProcessor.for_size(32, "stretch")
    return model.eval(), AlphaBlip2Processor(images, tokenizer, num_query_tokens=config["num_query_tokens"])
