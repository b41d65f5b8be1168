"""Tokens that make no rows: words of other roles in a conversation, and texts named in a config.

While documents are packed a masked token is its id's complement (~id, below 0), so that a mask goes
wherever its token goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

from activation_cache.language_model.chat_template import ChatTemplate, Message
from activation_cache.language_model.tokenizer import Tokenizer


def encode_chats(
    conversations: Sequence[Sequence[Message]],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    roles: Sequence[str],
) -> list[list[int]]:
    """Token ids of rendered conversations, complemented where no message of `roles` is.

    A token belongs to the message that its first character belongs to.

    Raises:
        UserError: the template refuses a conversation.
    """
    rendered = [template.conversation(messages) for messages in conversations]
    encoded = tokenizer.encode_with_offsets([one.text for one in rendered])
    found = []
    for messages, one, (ids, starts) in zip(conversations, rendered, encoded, strict=True):
        counts = np.zeros(len(ids), bool)
        for message, (begin, end) in zip(messages, one.spans, strict=True):
            if message.role in roles:
                counts |= (starts >= begin) & (starts < end)
        found.append(np.where(counts, ids, ~ids).tolist())
    return found


def split_masks(
    packed: Int32[np.ndarray, "N S"],
) -> tuple[Int32[np.ndarray, "N S"], Bool[np.ndarray, "N S"]]:
    """Ids, and which of them were complemented."""
    masked = packed < 0
    return np.where(masked, ~packed, packed), masked


def masked_tokens(
    tokens_BS: Int[np.ndarray, "B S"], masked: Sequence[Sequence[int]]
) -> Bool[np.ndarray, "B S"]:
    """Which tokens are part of one of the `masked` token sequences, wherever it occurs."""
    masked_BS = np.zeros(tokens_BS.shape, bool)
    for ids in masked:
        if len(ids) > tokens_BS.shape[1]:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens_BS, len(ids), axis=1)
        begins = (windows == np.asarray(ids)).all(axis=-1)
        for offset in range(len(ids)):
            masked_BS[:, offset : offset + begins.shape[1]] |= begins
    return masked_BS
