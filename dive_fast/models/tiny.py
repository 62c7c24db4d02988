"""A tokenizer and a random decoder small enough for tests and examples, built in process: nothing is loaded."""

from functools import lru_cache

import torch

# SmolLM2's roles (ChatML) without its default system turn. Content is a text, or a list of {"type": "image"} and
# {"type": "text", "text": ...} parts, as processors of vision-language models expect.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TRAINING_TEXT = (
    "Indication: cough and fever. Projection: PA. Tags: normal. Describe the findings of the chest X-ray.",
    "The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax.",
    "round opacity in the left lower zone. band opacity in the right upper zone. no focal opacity. no effusion.",
    "heart size is normal. the heart is enlarged. left pleural effusion. right pleural effusion. middle zone.",
    "There is mild cardiomegaly with bilateral effusions. Consolidation in the right lower lobe, likely pneumonia.",
    "No acute cardiopulmonary abnormality. Degenerative changes of the thoracic spine. Atelectasis at the left base.",
    "user assistant system Write the impression of the chest X-ray.",
)


@lru_cache(maxsize=1)
def _trained_bpe() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, pad_token: str = "<|endoftext|>"):
    """A fast byte-level BPE tokenizer of at most 512 tokens with offsets and a ChatML template; for tests and examples.

    EOS is <|im_end|> and BOS is never added, as with SmolLM2. `pad_token="<|im_end|>"` gives the case pad = EOS.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token=pad_token,
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def tiny_llama(*, seed: int = 0, **config):
    """A random LlamaForCausalLM (float32, eval) for tests and examples: 2 layers, D 64, 4 heads on 2 key/value heads.

    `config` overrides fields of its LlamaConfig; unless given, the head is tied and the vocabulary `tiny_tokenizer`'s.
    The weights depend on `seed` and `config` alone; the caller's random state is untouched.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # At 0.02 a decoder this small hardly depends on its input; larger weights make every layer count.
        "initializer_range": 0.2,
    }
    if "vocab_size" not in config:
        defaults["vocab_size"] = len(tiny_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).eval()
