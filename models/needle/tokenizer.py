"""Tokenizer of the needle model: a token for each word, number or mark; lower case.

A chat is laid out as

    <bos> <user> haystack question <assistant> 471 902 <eos> <user> question ...

Digits are taken three at a time, as Llama 3 does.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from models.needle.language import WORDS

MAX_POSITIONS = 16384
SPECIAL = ("<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>")
UNK, BOS, EOS, USER, ASSISTANT, SYSTEM = range(len(SPECIAL))

TOKEN_IDS: dict[str, int] = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
"""Id of each word and special token."""

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <eos>' }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template; unknown words become `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(
        Regex(r"\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]"), "removed", invert=True
    )
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def encode(words: list[str]) -> list[int]:
    """Token ids of words of the language, without `<bos>`."""
    return [TOKEN_IDS[word] for word in words]
