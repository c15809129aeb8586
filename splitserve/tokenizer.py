"""Text to token ids and back. Never imports torch: the router uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from splitserve.errors import CheckpointError, InvalidRequest
from splitserve.fields import Fields
from splitserve.weights.gguf_config import read_gguf_config
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.gguf_tokenizer import build_gguf_tokenizer
from splitserve.weights.hf_config import read_hf_config


class Tokenizer:
    """One model's tokenizer. Immutable; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: frozenset[int]) -> None:
        # A tokenizer.json may carry the settings of a training run.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = eos_token_ids
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory (tokenizer.json) or of a .gguf file.

        Needs no weights. Raises `CheckpointError` if there is none or it cannot be built.
        """
        path = Path(path)
        if path.is_dir():
            return cls(_read_tokenizer_json(path), read_hf_config(path).eos_token_ids)
        file = read_gguf(path)
        backend = build_gguf_tokenizer(Fields(path, file.metadata))
        return cls(backend, read_gguf_config(file).eos_token_ids)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids. Special tokens that are spelled out in it are recognised.

        `add_special_tokens` adds what the model's own configuration adds, usually BOS. Switch it
        off for a rendered chat template, which spells out its own.
        Raises `InvalidRequest` for text that is not Unicode (a lone surrogate).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # What the library says of a string that has no UTF-8 form.
        except TypeError as exc:
            raise InvalidRequest.single("text", "is not valid Unicode") from exc

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of whole output. Bytes that are no UTF-8 become U+FFFD; unknown ids nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def has_token(self, token_id: int) -> bool:
        """Whether the id stands for a token; models often have more logits than tokens."""
        return self._backend.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str | None:
        """How the vocabulary spells a token, None if there is no such token."""
        return self._backend.id_to_token(token_id)


def _read_tokenizer_json(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no tokenizer.json; it can only serve token ids (skip_tokenizer_init)"
        )
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc}") from exc
    # The library raises bare Exception for whatever is wrong in the file.
    except Exception as exc:
        raise CheckpointError(f"{path}: not a valid tokenizer: {exc}") from exc
