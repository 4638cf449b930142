# Generated from book/texts.md: edit the chapter, not this file.
"""From a recipe to batches: corpus, tokenizer and token files, made or found.

Notable here:
- tokenizers and token files lie under names made from what they were made from;
- a resumed run opens the data that it was started on, or makes it again, equal;
- how the stream is cut into rows is decided once, for who writes and who reads.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import albor
from albor.artifacts import digest, read_json, sha256_file
from albor.batches import Batches
from albor.config import ConfigError, Recipe, project_path
from albor.corpus import Corpus, build_corpus
from albor.data import prepare
from albor.parquet import import_parquet
from albor.provenance import record as record_provenance
from albor.shards import DataError, TokenStream
from albor.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "TOKENIZER_BYTES",
    "Stage",
    "Texts",
    "find_home",
    "find_texts",
    "keep_tokenizer",
    "open_batches",
    "prepare_rows",
    "prepare_texts",
    "refuse_other_texts",
    "restore_texts",
    "row_plan",
    "told",
]


Texts = tuple[dict[str, Any], Tokenizer, Path]  # corpus record, its tokens' folder
Stage = Callable[[str], AbstractContextManager[Any]]  # times what is in its block
TOKENIZER_BYTES = 60_000_000  # of text: more would hardly change the merges


def find_home() -> Path:
    """The folder of recipes, data/ and models/: our project, or the package's."""
    here, package = project_path("."), Path(albor.__file__).resolve().parent.parent
    ours = (here / "_toc.yml").exists() or not (package / "_toc.yml").exists()
    return here if ours else package


def row_plan(recipe: Recipe) -> tuple[str, int]:
    """How the stream is cut, and the tokens in a row of it.

    The original kept the head of rows of 2,048 tokens. Infilling samples fill rows
    of their own: one token longer than a sequence, so no target lies in another.
    """
    rows = "truncate" if recipe.data.fim_rate else recipe.data.rows
    return rows, 2048 if recipe.data.rows == "truncate" else recipe.data.seq_len + 1


def keep_tokenizer(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    """The recipe's tokenizer, or one trained on the corpus and kept for later."""
    if recipe.data.tokenizer:
        return Tokenizer.load(project_path(recipe.data.tokenizer))
    size = recipe.model.vocab_size
    name = digest([corpus.digest, size, version("tokenizers")])[:16]
    cached = find_home() / "models" / f"tokenizer-{name}"
    try:
        return Tokenizer.load(cached)
    except TokenizerError:
        every = -(-sum(one.size for one in corpus.train) // TOKENIZER_BYTES)
        texts = (one.text for one in corpus.train[::every])
        tokenizer = Tokenizer.train(texts, size)
        tokenizer.save(cached)
        return tokenizer


def told(done: int, total: int) -> None:
    """Say how far the tokens are, if it takes long enough to wonder."""
    if total > 50_000_000:
        print(f"tokens: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)


def prepare_texts(
    recipe: Recipe, before: dict[str, Any] | None = None, stage: Stage = nullcontext
) -> Texts:
    """Corpus record, tokenizer and folder of token files, all made or found."""
    data = recipe.data
    if data.train.endswith(".parquet"):
        return prepare_rows(recipe, stage)
    with stage("corpus"):
        found = build_corpus(
            data.train,
            max_bytes=data.max_bytes,
            val_bytes=data.val_bytes,
            licences=data.licences,
            benchmarks=project_path(data.benchmarks) if data.benchmarks else None,
        )
    if before and found.digest != before["corpus"]:
        raise ConfigError(
            f"resume = True: the run was started on the corpus "
            f"{before['corpus'][:16]}, whose token files are gone; the text found "
            f"now is {found.digest[:16]}. Restore data/{before['data']}, or restart"
        )
    with stage("tokenizer"):
        tokenizer = keep_tokenizer(recipe, found)
    with stage("tokens"):
        tokens = prepare(
            found,
            tokenizer,
            find_home() / "data",
            row_tokens=row_plan(recipe)[1],
            fim_rate=data.fim_rate,
            fim_style=data.fim_style,
            upsample=data.upsample,
            on_progress=told,
        )
    about = {"digest": found.digest, "report": found.report}
    about["record"] = record_provenance(found, tokenizer, tokens)
    return about, tokenizer, tokens


def prepare_rows(recipe: Recipe, stage: Stage = nullcontext) -> Texts:
    """The same from Parquet files of token rows: nothing to find or to learn."""
    with stage("tokens"):
        data, folder = recipe.data, find_home() / "data"
        tokenizer = Tokenizer.load(project_path(data.tokenizer))
        files, held_out = project_path(data.train), project_path(data.val)
        tokens = import_parquet(
            files, tokenizer, folder, val=held_out, column=data.input_column
        )
    hashes = {"train": sha256_file(files), "val": sha256_file(held_out)}
    note = "rows of tokens from Parquet: what is held out, their maker has decided"
    report = {"splits": {}, "files": hashes, "notes": [note]}
    return {"digest": digest(hashes), "report": report}, tokenizer, tokens


def restore_texts(state: Path, before: dict[str, Any]) -> Texts:
    """The same as the run had them, although the machine may have changed."""
    origin = state.parent.parent
    about = read_json(origin / "provenance.json")["corpus"]
    tokenizer = Tokenizer.load(origin)
    tokens = find_home() / "data" / before["data"]
    for part in ("train", "val"):
        TokenStream.open(tokens, part, verify=True)
    recorded = (before["corpus"], before["tokenizer"])
    if (about["digest"], tokenizer.digest) != recorded:
        raise DataError(f"{origin} holds another corpus record or tokenizer")
    return about, tokenizer, tokens


def refuse_other_texts(texts: Texts, before: dict[str, Any]) -> None:
    """Refuse to go on with another corpus or tokenizer than the run had."""
    now = {"corpus": texts[0]["digest"], "tokenizer": texts[1].digest}
    for key, digest_now in now.items():
        if digest_now != before[key]:
            raise ConfigError(
                f"resume = True: the run was started with the {key} "
                f"{before[key][:16]}, and what is found now is {digest_now[:16]}. "
                "Restore it, or start anew in another output_dir"
            )


def find_texts(
    recipe: Recipe,
    state: Path | None = None,
    before: dict[str, Any] | None = None,
    stage: Stage = nullcontext,
) -> Texts:
    """What a new run trains on, or what a resumed one was started with."""
    if state is None or before is None:
        return prepare_texts(recipe, None, stage)
    try:
        return restore_texts(state, before)
    except (DataError, TokenizerError, OSError, KeyError) as error:
        print(f"the run's data: {error}; they are made again", flush=True)
        texts = prepare_texts(recipe, before, stage)
        refuse_other_texts(texts, before)
        return texts


def open_batches(
    recipe: Recipe,
    tokens: TokenStream,
    target: torch.device,
    *,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Batches:
    """The batches of a run: all of them, or one rank's part of every one."""
    rows, row_tokens = row_plan(recipe)
    return Batches(
        tokens,
        recipe.data.seq_len,
        recipe.data.batch_size * recipe.training.gradient_accumulation,
        seed=seed,
        rows=rows,
        row_tokens=row_tokens,
        device=target,
        rank=rank,
        ranks=ranks,
    )
