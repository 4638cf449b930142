# Generated from book/tokenizer.md: edit the chapter, not this file.
"""Byte-level byte-pair encoding: Python text to integers and back, losslessly.

Notable:
- Every one of the 256 bytes is a token, so any text can be encoded and comes back
  exactly: tabs, CRLF, NUL, half a megabyte of spaces.
- The seven control tokens own ids 0 to 6, and no text can produce them: characters
  `</s>` in a file are data, spelled with ordinary tokens.
- Training is deterministic, and a tokenizer is named by the SHA-256 of its file.
- The saved folder loads in `transformers.AutoTokenizer`, which gives the same ids.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from albor.artifacts import atomic_path, sha256_text, write_json

__all__ = [
    "BOS",
    "EOS",
    "FIM_MIDDLE",
    "FIM_PREFIX",
    "FIM_SUFFIX",
    "GPT2_PATTERN",
    "PAD",
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "UNK",
    "Tokenizer",
    "TokenizerError",
    "bytes_per_token",
    "check_text",
    "find_fault",
    "pipeline",
]


# The position in this tuple is the id: 0 to 6.
SPECIAL_TOKENS = (
    "<unk>",  # never produced: with all 256 bytes present, nothing is unknown
    "<s>",
    "</s>",  # after every document, and before every prompt
    "<pad>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)
UNK, BOS, EOS, PAD, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = range(7)

# The split pattern of OpenAI's cl100k_base, from tiktoken_ext/openai_public.py of
# github.com/openai/tiktoken (MIT licence), in its first published form. Later
# releases write possessive quantifiers; one, `{1,3}+`, means "one or more times" to
# Oniguruma, the regex engine of `tokenizers`, and would join longer runs of digits.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word and one character before it: " x"
        r"\p{N}{1,3}",  # digits, at most three at a time
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation and line ends after it
        r"\s*[\r\n]+",  # blank lines, up to the last line end
        r"\s+(?!\S)",  # indentation, all but its last space
        r"\s+",
    )
)

# GPT-2's rule, from src/encoder.py of github.com/openai/gpt-2 (MIT licence). It was
# the original's: `Tokenizer.train(texts, pattern=GPT2_PATTERN)` makes one like it.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def pipeline(pattern: str = SPLIT_PATTERN) -> tokenizers.Tokenizer:
    """An untrained tokenizer: cut at `pattern`, then write a byte as one letter."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


class TokenizerError(ValueError):
    """A text, an id or a file that a tokenizer cannot take; the text says why."""


def check_text(text: object, name: str) -> None:
    """Refuse what cannot be encoded: anything but a str, and lone surrogates."""
    if not isinstance(text, str):
        raise TokenizerError(
            f"{name} must be a str, got {type(text).__name__}: {text!r:.60}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at "
            f"position {error.start}: half a character, without a UTF-8 form. Read "
            "the file with errors='strict', or mend the text: "
            "text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None


def find_fault(backend: tokenizers.Tokenizer) -> str | None:
    """What stops `backend` from being a tokenizer of this book, or None."""
    for expected, token in enumerate(SPECIAL_TOKENS):
        found = backend.token_to_id(token)
        if found != expected:
            return f"{token!r} has id {found}, not {expected}"
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return f"its {len(vocabulary)} ids are not 0 to {len(vocabulary) - 1}"
    if len(vocabulary) > 65_536:
        return f"{len(vocabulary)} entries; ids are kept in 16 bits, 65536 at most"
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        return f"{len(missing)} of the 256 bytes have no token"
    probe = "def f(x):\n\tif x != 'é':\r\n        return\x00  \U0001f40d </s>\n\n"
    ids = backend.encode(probe, add_special_tokens=False).ids
    if backend.decode(ids, skip_special_tokens=False) != probe:
        return "decode(encode(text)) is not the text"
    return None


class Tokenizer:
    """A trained byte-level BPE tokenizer; make one with `train` or `load`.

    `decode(encode(text)) == text` for every string that has a UTF-8 form.
    `vocab_size` counts the entries; `digest` is the SHA-256 of the `tokenizer.json`
    that `save` writes. `keeps_lines`: it cuts by `SPLIT_PATTERN`, so that no token
    reaches over the beginning of a line that is not blank.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not kept in tokenizer.json, so it is set on every load. Without it, "</s>"
        # inside a text would become the control token with id 2.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        if fault := find_fault(backend):
            raise TokenizerError(f"not a tokenizer of this book: {fault}")
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.digest: str = sha256_text(backend.to_str(pretty=True))
        ours, theirs = pipeline().pre_tokenizer, backend.pre_tokenizer
        self.keeps_lines: bool = ours.__getstate__() == theirs.__getstate__()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 32_768,
        *,
        pattern: str = SPLIT_PATTERN,
    ) -> "Tokenizer":
        """Learn merges from whole documents; the same texts give the same bytes.

        `pattern` is the cutting rule; the file keeps it. Small corpora run out of
        pairs that occur twice; then the vocabulary stays smaller than asked, with a
        warning that says so.
        """
        smallest = len(SPECIAL_TOKENS) + 256
        if type(vocab_size) is not int or not smallest <= vocab_size <= 65_536:
            raise TokenizerError(
                f"vocab_size = {vocab_size!r}: give a whole number from {smallest} "
                "(256 bytes, 7 control tokens) to 65536 (ids are kept in 16 bits)"
            )
        if isinstance(texts, str):
            raise TokenizerError("texts is one str; give a list of texts: [text]")
        seen = 0

        def checked() -> Iterator[str]:
            nonlocal seen
            for index, text in enumerate(texts):
                check_text(text, f"texts[{index}]")
                seen += len(text)
                yield text

        try:
            backend = pipeline(pattern)
        except Exception as error:  # the library raises bare Exception here too
            raise TokenizerError(f"pattern = {pattern!r}: {error}") from None
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(checked(), trainer)
        if not seen:
            raise TokenizerError("no text to train on; give at least one document")
        tokenizer = cls(backend)
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(
                f"{tokenizer.vocab_size:,} of {vocab_size:,} entries came out of "
                f"{seen:,} characters: no further pair occurs twice. The tokenizer "
                "works; more text fills it",
                stacklevel=2,
            )
        return tokenizer

    @classmethod
    def _read(cls, content: str) -> "Tokenizer":
        """A tokenizer from the content of a `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_str(content))

    def __reduce__(self) -> tuple:
        # A worker process gets a pickled copy. The library pickles no more than the
        # file holds, so a copy has to be switched on again like any other load.
        return self._read, (self._backend.to_str(),)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a folder that `save` wrote, or its `tokenizer.json`."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls._read(file.read_text("utf-8"))
        except OSError as error:
            raise TokenizerError(
                f"no tokenizer at {file}: {error.strerror}; train one and `save` it"
            ) from None
        except Exception as error:  # the library raises bare Exception for bad JSON
            raise TokenizerError(
                f"{file}: {error}; copy it again, or train and `save` a new one"
            ) from None

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, and `tokenizer_config.json` for transformers."""
        folder = Path(folder)
        with atomic_path(folder / "tokenizer.json") as file:
            file.write_bytes(self._backend.to_str(pretty=True).encode())
        unk, bos, eos, pad, *infill = SPECIAL_TOKENS
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": unk,
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "additional_special_tokens": infill,
            "split_special_tokens": True,  # sentinels in a text are text there too
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", config)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; no control token is ever among them."""
        check_text(text, "text")
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of every text, computed on all cores."""
        if isinstance(texts, str):
            raise TokenizerError("texts is one str; give a list of texts: [text]")
        texts = list(texts)
        for index, text in enumerate(texts):  # a tuple would be read as two texts
            check_text(text, f"texts[{index}]")
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for the control tokens.

        Their sums over `encode(text)` are the places in `text.encode()` at which a
        token ends.
        """
        control = len(SPECIAL_TOKENS)  # the others are written a letter to a byte
        names = map(self._backend.id_to_token, range(control, self.vocab_size))
        return [0] * control + [len(name or "") for name in names]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: control tokens spelled out, nothing cleaned away.

        Ids that stop inside a character give U+FFFD for the bytes that are there.
        """
        ids = [int(i) for i in ids]
        for position, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(
                    f"id {i} at position {position} is outside 0 to "
                    f"{self.vocab_size - 1}; it comes from another vocabulary"
                )
        return self._backend.decode(ids, skip_special_tokens=False)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of `texts` over their tokens: what an average token carries."""
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    if not tokens:
        raise TokenizerError("bytes_per_token needs at least one non-empty text")
    return sum(len(text.encode()) for text in texts) / tokens
