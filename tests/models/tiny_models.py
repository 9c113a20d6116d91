"""Random models of two layers, a byte-pair tokenizer trained on a paragraph, and the naive oracle."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prefsel.models.chat import EncodedGroup

TEXT = """the cat sat on the mat. a dog saw the cat, and the cat saw the dog! who sat where?
please write a short story about a cat that can bake bread, and then explain why bread rises."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def bpe_tokenizer(*, chat_template: str | None = CHATML, bos: bool = False, **tokens: str) -> Any:
    """A byte-level BPE with whole words as tokens, so that merges across a boundary would show."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>"} | ({"bos_token": "<s>"} if bos else {}) | tokens
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        **{name: token for name, token in names.items() if token},
    )


def tiny_config(model_type: str, **options: Any) -> Any:
    """Two layers of width 32, four heads; two key heads where the architecture groups them."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type not in ("gpt_neox", "gpt2"):
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    if model_type in ("mistral", "phi3", "starcoder2"):
        sizes["sliding_window"] = None
    return transformers.AutoConfig.for_model(model_type, **(sizes | options))


def randomize(model: Any, scale: float = 0.3) -> Any:
    """Weights large enough that every token's context matters: initial ones give nearly uniform predictions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def tiny_causal(model_type: str = "llama", *, scale: float = 0.3, **options: Any) -> Any:
    return randomize(transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **options)), scale)


def tiny_reward(model_type: str = "llama", *, num_labels: int = 1, **options: Any) -> Any:
    config = tiny_config(model_type, num_labels=num_labels, **options)
    return randomize(transformers.AutoModelForSequenceClassification.from_config(config))


def random_groups(nums_completions: list[int], *, longest: int = 60, seed: int = 0) -> list[EncodedGroup]:
    """Groups of random lengths from one token up, so that blocks of 64 queries are partly, just and over-filled."""
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [rng.randrange(5, 400) for _ in range(rng.randint(1, longest))]

    return [EncodedGroup(tokens(), [tokens() for _ in range(k)], ["ok"] * k, 0) for k in nums_completions]


def related_groups(*, seed: int = 0, num_completions: int = 2) -> list[EncodedGroup]:
    """Groups under one system prompt, prompts that continue an earlier response, and responses that begin alike."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, 400) for _ in range(count)]

    system, groups = tokens(70), []
    prompt = system
    for turn in (3, 40, 5, 20):
        prompt = prompt + tokens(turn)
        begun = tokens(30)
        responses = [begun + tokens(size) for size in (7, 25, 1)[:num_completions]]
        groups.append(EncodedGroup(prompt, responses, ["ok"] * num_completions, 0))
        prompt = prompt + responses[0]
    other = EncodedGroup(system + tokens(9), [tokens(4), tokens(50)], ["ok"] * 2, 0)
    return [*groups, EncodedGroup(tokens(12), [tokens(20), tokens(3)], ["ok"] * 2, 0), other]


def naive_logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log_softmax + gather of one sequence, with attention that transformers ships."""
    implementation = model.config._attn_implementation
    # Eager attention takes its softmax in fp32 even for fp64 models, but it is the only one with soft-capping.
    model.set_attn_implementation("eager" if hasattr(model.config, "attn_logit_softcapping") else "sdpa")
    logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0]
    model.set_attn_implementation(implementation)
    logps_RV = logits_TV[len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps_RV.gather(1, torch.tensor(response)[:, None]).sum()
