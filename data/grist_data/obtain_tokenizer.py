"""The tokenizer of a preparation: trained on its training split, exported from tiktoken, or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tqdm import tqdm

from grist_data.chat_template import check_specials, read_template, text_without_specials
from grist_data.document import Document
from grist_data.permutation import hash64
from grist_data.preparation import Preparation
from grist_data.prepare_config import TIKTOKEN, TRAINED, PrepareConfig
from grist_data.tokenizer import Tokenizer, pieces_of


def obtain_tokenizer(preparation: Preparation) -> None:
    """Save the tokenizer in the dataset, unless it is there already.

    Raises ValueError for a tokenizer without the end-of-text token that is to stand after every document, or the special tokens
    of the chat template.
    """
    if preparation.journal.tokenizer_sha256 is not None:
        return
    config = preparation.config
    if config.tokenizer in TRAINED:
        tokenizer = _trained(preparation)
    elif config.tokenizer in TIKTOKEN:
        from grist_data.tiktoken_export import from_tiktoken

        tokenizer = from_tiktoken(config.tokenizer, config.ranks_file)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    _refuse_endless(config, tokenizer)
    if config.holds_conversations:
        check_specials(config.chat_template, tokenizer)
        # Set even where it is its own, so that it lies in the dataset as a file.
        own = tokenizer.chat_template
        tokenizer.chat_template = own if config.chat_template is None else read_template(config.chat_template)
    tokenizer.save(preparation.out)
    preparation.journal.record_tokenizer(tokenizer.sha256, tokenizer.trained_by)


def _trained(preparation: Preparation) -> Tokenizer:
    from grist_data.tokenizer_training import TRAINERS

    config = preparation.config
    tokenizer = TRAINERS[config.tokenizer](_training_texts(preparation), config.vocab_size, config.special_tokens)
    if tokenizer.vocab_size < config.vocab_size:
        print(
            f"the training text has fewer repeated pairs than asked for: vocab_size is {tokenizer.vocab_size}, not"
            f" {config.vocab_size}",
            file=sys.stderr,
        )
    return tokenizer


def _refuse_endless(config: PrepareConfig, tokenizer: Tokenizer) -> None:
    if config.append_eot and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer {config.tokenizer} has no end-of-text token to put after documents: it needs <|endoftext|> among"
            " its special tokens or an eos_token in tokenizer_config.json; or set append_eot to false"
        )


def _written(document: Document, template: str | None, special_tokens: tuple[str, ...]) -> str:
    """The text, or a conversation as it will be encoded, so that what the template writes costs few tokens."""
    if document.messages is None or template is None:
        return document.text
    try:
        return text_without_specials(template, document.messages, special_tokens)
    except ValueError as error:
        raise ValueError(f"{document.id}: {error}") from error


def _training_texts(preparation: Preparation) -> Iterator[str]:
    """Text of the training split in pieces; above `training_bytes`, pieces chosen by hash, evenly over the corpus."""
    config = preparation.config
    template = None if config.chat_template is None else read_template(config.chat_template)
    kept_below = int(min(1.0, config.training_bytes / preparation.plan.text_bytes) * 2**64)
    documents = tqdm(
        preparation.training_documents(), desc="training the tokenizer", unit=" texts", disable=None, leave=False
    )
    for digest, document in documents:
        for number, piece in enumerate(pieces_of(_written(document, template, config.special_tokens))):
            if hash64("tokenizer sample", digest, number) < kept_below:
                yield piece
