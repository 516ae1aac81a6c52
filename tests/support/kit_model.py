"""A random-weight model with a large vocabulary and a tokenizer, and data sets in the shapes SGLang's kits read.

The kits send token ids up to 31,999, English prompts of thousands of words, and wait for stop strings in what
comes back. None of it needs a model that knows anything, but it needs a tokenizer that encodes every text, keeps
English short, and decodes random tokens to words, line ends and full stops among them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import make_model

VOCAB = 32_000
CONTEXT = 20_480
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 64
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 2 * 2
"""Bytes of K and V that one token takes at 16 bits."""

BOS, EOS = "<s>", "</s>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
)

# Words of the kits' prompts, so that these encode to about as many tokens as with a real tokenizer.
_ENGLISH_TEXT = (
    "the quick brown fox jumps over lazy dog Read following text and then answer or a an of to in is it What "
    "capital France Germany Italy Japan Spain Egypt Russia Australia You are helpful assistant Answer with "
    "single word Question Write short essay about number Today long story magical kingdom Please write "
    "extremely detailed vivid fantasy set world full intricate magic systems political intrigue complex "
    "characters Ensure that you thoroughly describe every scene motivations environment Include engaging "
    "dialogues elaborate inner thoughts Each section should be as comprehensive possible create rich "
    "immersive experience for reader The span multiple events challenges developments time Aim make at least "
    "words Say hi one Make "
)
_ENGLISH = _ENGLISH_TEXT.split()
_ENDINGS = (".\n", " and\n", "\n\n", "\n", ".", "!", "?", ", or ", ", and ")
_ONSETS = tuple("bcdfghklmnprstvw") + ("br", "cl", "dr", "fl", "gr", "pl", "st", "tr")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
_CODAS = ["", "l", "n", "r", "s", "t", "nd"]


def _made_up_words() -> Iterator[str]:
    syllables = ["".join(parts) for parts in product(_ONSETS, _VOWELS, _CODAS)]
    random.Random(0).shuffle(syllables)
    for first, second in product(syllables, syllables):
        yield first + second


def _texts() -> Iterator[str]:
    """What the tokens beyond the single bytes decode to."""
    for word in _ENGLISH:
        yield word
        yield " " + word
    for index, word in enumerate(_made_up_words()):
        # One token in four ends a line or a sentence, so that a kit that waits for a line end sees one soon.
        yield " " + word + (_ENDINGS[index // 4 % len(_ENDINGS)] if index % 4 == 0 else "")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level unigram tokenizer of exactly ``VOCAB`` tokens; every text encodes, without unknown tokens."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {BOS: 0.0, EOS: 0.0}
    pieces.update(dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()), -20.0))
    for text in _texts():
        ((piece, _),) = level.pre_tokenize_str(text)
        pieces.setdefault(piece, -10.0)
        if len(pieces) == VOCAB:
            break
    core = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def make_kit_model(path: Path) -> Path:
    """Write model and tokenizer; the same on every machine with the same torch. Returns ``path``."""
    make_model(path, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, vocab=VOCAB, context=CONTEXT)
    build_tokenizer().save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def filler(words: int, seed: int) -> str:
    """A text of ``words`` English words."""
    rng = random.Random(seed)
    return " ".join(rng.choice(_ENGLISH) for _ in range(words))


def make_sharegpt(path: Path, conversations: int = 64) -> Path:
    """A file of two-turn conversations in ShareGPT's format. Returns ``path``."""
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": filler(40 + 7 * i, 2 * i)},
                {"from": "gpt", "value": filler(60, 2 * i + 1)},
            ],
        }
        for i in range(conversations)
    ]
    path.write_text(json.dumps(rows))
    return path
