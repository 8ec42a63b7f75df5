"""The tokenizer: pictures to codes at any scale, and back."""

from flexvar.tokenizer.model import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
