"""Text as it is generated, and the clock beside it."""

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

# decoding starts a few tokens early: many tokenizers join the space before a word to the token after it
CONTEXT_TOKENS = 6


class TimedTextStreamer(BaseStreamer):
    """Passes on new text as soon as it is whole characters, and remembers when tokens came.

    Unlike transformers' `TextStreamer` it does not wait for the end of a word, and it keeps ids, text and times. For one
    sequence.

    Args:
        tokenizer: decodes; special tokens are left out of the text.
        write: gets each new piece of the completion.

    Attributes:
        text: the completion so far.
        token_ids: its tokens.
        first_at, last_at: `time.perf_counter()` of the first and the newest token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.text = ""
        self.token_ids: list[int] = []
        self.first_at = self.last_at = 0.0
        self._recent: list[int] | None = None
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt [1, seq_len] first, then one token after another."""
        ids = value.flatten().tolist()
        if self._recent is None:
            self._recent = ids[-CONTEXT_TOKENS:]
            self._shown = len(self._recent)
            return
        self.last_at = time.perf_counter()
        if not self.token_ids:
            self.first_at = self.last_at
        self.token_ids += ids
        self._recent += ids
        self._write_new(self._recent, whole=True)

    def end(self) -> None:
        """Passes on what was held back; further calls do nothing."""
        if self._recent is not None:
            self._write_new(self._recent, whole=False)

    def _write_new(self, recent: list[int], whole: bool) -> None:
        before, after = (str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in (recent[: self._shown], recent))
        if whole and after.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # the next token may complete this character
        self._recent = recent[-CONTEXT_TOKENS:]
        self._shown = len(self._recent)
        if piece := after[len(before) :]:
            self.text += piece
            self.write(piece)
