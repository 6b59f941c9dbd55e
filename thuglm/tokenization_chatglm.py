"""ChatGLM's tokenizer: a SentencePiece model between two small translations.

    text ──► whitespace ──► SentencePiece ──► ids ──► + [gMASK] <sop>            a prompt
             \\n    -> <n>     (unigram, NFKC,           + [gMASK] <sop> answer <eop>   a prompt and its answer
             \\t    -> <|tab|>  byte fallback)
             80..2 spaces -> <|blank_k|>

    ids    5   74874   130001   130004    ...    130005
           ▁   你好    [gMASK]   <sop>   answer    <eop>
           └─── prompt ────┘     └─── what the model writes ──┘

Only `<sop> <eop> <unk> <pad> [MASK]` written in a text are taken for those tokens. `[gMASK]` in a text is spelled out,
so no user can forge the hole that the answer goes into.

Padding is on the left, as generation needs it: the last token of every row must be the newest one. The attention mask
is the usual 2-D one (1 = real token); the model builds the prefix mask and the two position rows from it.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer

from thuglm.prompt import CHAT_TEMPLATE, check_text

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}
LONGEST_BLANK = 80
_BLANKS = re.compile(f" {{2,{LONGEST_BLANK}}}")
_IMAGE = re.compile(r"<image_\d+>")
# Settings of `prepare_for_model` that change nothing about ids and mask of one text that is not padded.
_NOT_ASKED = {"stride", "pad_to_multiple_of", "padding_side", "return_tensors", "return_attention_mask", "verbose"}
_NOT_ASKED |= {"prepend_batch_axis"}


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of ChatGLM-6B v1.1, equal to the published one id for id.

    Args:
        vocab_file: path of `ice_text.model`.
        padding_side: "left" (the published tokenizer knows no other; "right" is allowed here for training batches).
        num_image_tokens: must be 0; 20000 is the v1.0 tokenizer.

    Raises:
        ValueError: for v1.0 files, no model file, or one that lacks one of the special pieces.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers' own convention
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        padding_side: str = "left",
        num_image_tokens: int = 0,
        clean_up_tokenization_spaces: bool = True,
        **kwargs,
    ):
        if num_image_tokens:
            raise ValueError(
                f"tokenizer_config.json says num_image_tokens={num_image_tokens}: this is the tokenizer of ChatGLM-6B "
                "v1.0. Take ice_text.model and tokenizer_config.json of v1.1 (num_image_tokens 0): see notebook 01."
            )
        if vocab_file is None:
            raise ValueError(f"There is no {VOCAB_FILES_NAMES['vocab_file']} in this folder: download it as well.")
        self.vocab_file = str(vocab_file)
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        except RuntimeError as error:
            raise ValueError(
                f"{vocab_file} is no SentencePiece model ({error}): fetch it again (notebook 01)"
            ) from error
        self._pieces = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.get_piece_size())}
        self._gmask, self._end = gmask_token, end_token
        needed = (
            bos_token,
            eos_token,
            end_token,
            mask_token,
            gmask_token,
            pad_token,
            unk_token,
            "<n>",
            "<|tab|>",
        )
        if missing := [piece for piece in needed if str(piece) not in self._pieces]:
            raise ValueError(
                f"{self.vocab_file} has no piece {', '.join(map(str, missing))}. Either it is not the ice_text.model "
                "of ChatGLM-6B v1.1 (download it again from the revision of the weights: see notebook 01), or a "
                "special token was given another name, which the model does not know: leave that out."
            )
        kwargs.setdefault("special_tokens_pattern", "none")
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        # transformers makes every "..._token" of tokenizer_config.json special, and writes such lists itself when it
        # saves. Only the five below are: otherwise a text that spells "[gMASK]" would become the token.
        # What a user added has an id behind the pieces, and is kept.
        kwargs.pop("model_specific_special_tokens", None)
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {id: token for id, token in added.items() if id >= len(self._pieces)}
        extra = kwargs.pop("extra_special_tokens", None) or ()
        kwargs["extra_special_tokens"] = [token for token in extra if str(token) not in self._pieces]
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.init_kwargs.update(end_token=end_token, gmask_token=gmask_token, num_image_tokens=num_image_tokens)

    # Vocabulary ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, with ~ in a path written out."""
        return super().from_pretrained(os.path.expanduser(pretrained_model_name_or_path), *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pieces (the model's embedding has a few unused rows more)."""
        return len(self._pieces)

    @property
    def gmask_token(self) -> str:
        """The hole at the end of a prompt, `[gMASK]`."""
        return self._gmask

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`."""
        return self._pieces[self._gmask]

    @property
    def end_token(self) -> str:
        """`</s>`, a leftover of the SentencePiece model that ChatGLM does not use."""
        return self._end

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self._pieces[self._end]

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return {**self._pieces, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        # "<image_7>" <-> 7 below the first piece: what is left of the image tokens of v1.0, kept to equal the original.
        if token.startswith("<image_") and _IMAGE.fullmatch(token):
            return int(token[7:-1])
        return self._pieces.get(token, self._pieces[str(self.unk_token)])

    def _convert_id_to_token(self, index: int) -> str:
        if index < 0:
            return f"<image_{index}>"
        if index >= self.vocab_size:
            raise IndexError(
                f"id {index} is no piece: the tokenizer has {self.vocab_size}. Ids from there to the model's vocab_size"
                " are padding rows of the embedding; a trained model never writes them."
            )
        return self.sp_model.id_to_piece(index)

    # Text to ids -----------------------------------------------------------------------------------------------------

    @staticmethod
    def encode_whitespace(text: str) -> str:
        """Newlines, tabs and runs of 2 to 80 spaces become pieces of their own (SentencePiece would lose them)."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        # Most texts have no run of spaces; trying 79 lengths one by one takes longer than SentencePiece does.
        return _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text) if "  " in text else text

    @staticmethod
    def decode_whitespace(text: str) -> str:
        """The way back."""
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        for length in range(2, LONGEST_BLANK + 1):
            text = text.replace(f"<|blank_{length}|>", " " * length)
        return text

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """Text -> pieces. The text around a special token is stripped, as the published tokenizer does; that around an
        ordinary token of `add_tokens` is not.

        Raises:
            TypeError, ValueError: see `check_text`.
        """
        check_text(text, "the text")
        special, added = set(self.all_special_tokens), self.added_tokens_encoder
        parts = self.tokens_trie.split(text)
        pieces: list[str] = []
        for position, part in enumerate(parts):
            if part in special or part in added:
                pieces.append(part)
                continue
            if position > 0 and parts[position - 1] in special:
                part = part.lstrip()
            if position < len(parts) - 1 and parts[position + 1] in special:
                part = part.rstrip()
            if part:
                pieces.extend(self._tokenize(part))
        return pieces

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(self.encode_whitespace(text), out_type=str)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode(text, add_special_tokens=False)` of each text, but faster, and all in one call.

        A text in which no special token is written goes to SentencePiece as a whole and comes back as ids: no pieces
        are made and looked up one by one. Several threads may call it at once; SentencePiece needs no lock of Python.

        Args:
            texts: any texts.

        Raises:
            TypeError, ValueError: one of them is no text, or holds half a character; its number is named.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts is one text: put it in a list")
        try:
            return self._text_ids(texts)
        except (TypeError, AttributeError, RuntimeError):  # SentencePiece's own words for either name no text
            for number, text in enumerate(texts):
                check_text(text, f"text {number}")
            raise

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        # tokens_trie.data: first character of a token -> those behind it, or "" where it ends. To go through a text
        # takes far longer than to look for two characters in it.
        doubtful = {
            place
            for first, behind in self.tokens_trie.data.items()
            for place, text in enumerate(texts)
            if first in text and any(first + second in text for second in behind)
        }
        plain = [
            place not in doubtful or self.tokens_trie.split(f" {text}") == [f" {text}"]
            for place, text in enumerate(texts)
        ]
        whole = [self.encode_whitespace(text) for text, is_plain in zip(texts, plain, strict=True) if is_plain]
        if len(whole) == 1:  # to start a thread takes longer than to encode a text
            ids = iter([self.sp_model.encode(whole[0])])
        else:
            ids = iter(self.sp_model.encode(whole, num_threads=1) if whole else [])
        return [
            next(ids) if is_plain else [*self.convert_tokens_to_ids(self.tokenize(text))]  # type: ignore[misc]
            for text, is_plain in zip(texts, plain, strict=True)
        ]

    def _encode_plus(self, text, text_pair=None, **settings):  # type: ignore[override]
        # What `tokenizer(...)` and `encode` call; it takes ids as well as texts.
        if not settings.get("is_split_into_words") and not settings.get("sanitize_control_tokens"):
            text, text_pair = self._as_ids(text), self._as_ids(text_pair)
        return super()._encode_plus(text, text_pair, **settings)

    def _as_ids(self, text):
        """A text, or each text of a list, as ids; as it is where there are none, or where it is something else."""
        if isinstance(text, str):
            return self.text_ids([text])[0] or text
        if isinstance(text, list) and any(isinstance(each, str) for each in text):
            for number, each in enumerate(text):
                if not isinstance(each, str | list | tuple):
                    check_text(each, f"text {number}")
        if isinstance(text, list) and all(isinstance(each, str) for each in text):
            return [ids or each for ids, each in zip(self.text_ids(text), text, strict=True)]
        return text

    def prepare_for_model(  # type: ignore[override] # what is not named here is given by its name everywhere
        self, ids, pair_ids=None, add_special_tokens=True, padding=False, truncation=False, max_length=None, **settings
    ) -> BatchEncoding:
        """As in transformers, but in a fraction of the time where nothing is padded, cut or asked for beside the ids
        and their mask."""
        as_it_is = padding in (False, "do_not_pad") and truncation in (False, "do_not_truncate")
        if not as_it_is or any(settings[name] for name in settings.keys() - _NOT_ASKED):
            given = {"padding": padding, "truncation": truncation, "max_length": max_length, **settings}
            return super().prepare_for_model(ids, pair_ids, add_special_tokens, **given)
        whole = self.build_inputs_with_special_tokens(ids, pair_ids) if add_special_tokens else ids + (pair_ids or [])
        self._eventual_warn_about_too_long_sequence(whole, max_length, settings.get("verbose", True))
        encoded, with_mask = {"input_ids": whole}, settings.get("return_attention_mask")
        if with_mask or (with_mask is None and "attention_mask" in self.model_input_names):
            encoded["attention_mask"] = [1] * len(whole)
        tensors, axis = settings.get("return_tensors"), settings.get("prepend_batch_axis", False)
        return BatchEncoding(encoded, tensor_type=tensors, prepend_batch_axis=axis)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Prompt ids + `[gMASK] <sop>`, and if there is an answer, its ids + `<eop>`."""
        ids = [*token_ids_0, self.gmask_token_id, self._pieces[str(self.bos_token)]]
        if token_ids_1 is not None:
            ids += [*token_ids_1, self._pieces[str(self.eos_token)]]
        return ids

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for an id that `build_inputs_with_special_tokens` adds, 0 for text."""
        if already_has_special_tokens:
            added = {self.gmask_token_id, *self.all_special_ids}
            return [int(token in added) for token in token_ids_0]
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def apply_chat_template(  # type: ignore[override] # what is not named here is given by its name everywhere
        self, conversation, tools=None, documents=None, chat_template=None, *, tokenize: bool = True, **settings
    ):
        """As in transformers. With the published template the ids are those of `tokenizer(text)`: they end with
        `[gMASK] <sop>`, which no text can spell."""
        render = super().apply_chat_template
        if chat_template is None and self.chat_template == CHAT_TEMPLATE:
            _check_contents(conversation)
        if not tokenize or chat_template is not None or self.chat_template != CHAT_TEMPLATE:
            return render(conversation, tools, documents, chat_template, tokenize=tokenize, **settings)
        names = settings.keys() & {"padding", "truncation", "max_length", "return_tensors"}
        encoding = {name: settings.pop(name) for name in names} | (settings.pop("tokenizer_kwargs", None) or {})
        whole = settings.pop("return_dict", True)
        encoded = self(render(conversation, tools, documents, tokenize=False, **settings), **encoding)
        return encoded if whole else encoded["input_ids"]

    def truncate_sequences(self, ids, pair_ids=None, num_tokens_to_remove=0, truncation_strategy="longest_first", **kw):
        """As in the base class, but a text is left whole where not even its first token would fit: the published
        tokenizer never returns a prompt without a prompt."""
        strategy = getattr(truncation_strategy, "value", truncation_strategy)
        cut = pair_ids or [] if strategy == "only_second" else ids
        if (pair_ids is None or strategy != "longest_first") and num_tokens_to_remove >= len(cut):
            return ids, pair_ids, []
        return super().truncate_sequences(
            ids, pair_ids, num_tokens_to_remove, truncation_strategy=truncation_strategy, **kw
        )

    # Ids to text -----------------------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces -> text; `[gMASK]`, `<sop>` and the other control pieces vanish."""
        return self.decode_whitespace(self.sp_model.decode(tokens))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        ids = [token for token in ids if token != self.pad_token_id]
        return super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) if ids else ""

    # Files -----------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `ice_text.model` into `save_directory`."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def _check_contents(messages) -> None:
    """Refuse what is no text, of a conversation or several: transformers would hand "<bytes>" to the template. None,
    numbers and lists come to the template as they are, which refuses them."""
    for number, message in enumerate(messages):
        if isinstance(message, list | tuple):
            _check_contents(message)
        elif isinstance(message, Mapping) and not isinstance(message.get("content"), int | float | list | None):
            check_text(message["content"], f"the content of message {number}")


__all__ = ["ChatGLMTokenizer"]
