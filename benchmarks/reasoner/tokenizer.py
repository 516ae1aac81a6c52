"""Builds the model's word-level tokenizer.

One token for each line opening ``t17=``, each name ``t17``, each value ``:7``, and each printable ASCII
character (and newline, tab) besides, so that any ASCII text survives encode and decode unchanged.
No token is added on its own: ``tok(text)`` holds the text's tokens only.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = 256
PAD, UNK, USER, ASSISTANT, END = "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (PAD, UNK, USER, ASSISTANT, END)

# Every message is "<|role|>content<|end|>", the assistant's chain included, so a follow-up request's
# tokens begin with the first request's prompt and everything that was generated.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' -}}"
    "{{- message['content'] -}}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Longest name first; a number above 255 falls apart into a name and digits, which still decodes exactly.
_SPLIT = r"t(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])=?|:[0-9]|[\s\S]"


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template."""
    words = list(SPECIALS)
    words += [f"t{i}=" for i in range(NAMES)]
    words += [f"t{i}" for i in range(NAMES)]
    words += [f":{i}" for i in range(10)]
    words += ["\n", "\t"] + [chr(code) for code in range(0x20, 0x7F)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    core.decoder = decoders.Fuse()  # joins tokens with nothing between; the default is a space
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, readable by transformers 4 and 5."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    path.write_text(json.dumps(config, indent=2) + "\n")
