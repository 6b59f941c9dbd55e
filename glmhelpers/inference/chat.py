"""A conversation with the model: what it remembers, how it is asked, how fast it answers.

    ChatSession
      history   [(question, answer), ...] ─┐ cut from the front where 2048 tokens do not hold it, with a notice
      template  "chatglm"                 ─┼─► prompt ─► Decoder ─► token ─► token ─► ... ─► <eop>
      settings  temperature, top-p, seed  ─┘      adapter on/off            │
                                                                            └─► Answer, growing: text, tokens, seconds

One model in memory serves base and tuned: the adapter is switched, never reloaded.
"""

import contextlib
import threading
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from peft import PeftModel

from glmhelpers.inference.decoder import Decoder
from glmhelpers.inference.model_state import held_alone, is_merged
from glmhelpers.tokens.prompts import TEMPLATES, build_prompt
from glmhelpers.tokens.texts import clean_text
from thuglm.prompt import as_turns, process_response

LEAST_ROOM = 16
"""A question that leaves fewer tokens than this for its answer is refused, unless a shorter answer is asked for."""


@dataclass(frozen=True)
class Generation:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 always takes the likeliest token; the published default is 0.95.
        top_p: keep the likeliest tokens that reach this share, 1 keeps all.
        seed: repeats an answer on the same machine; None: different every time.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.95
    top_p: float = 0.7
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("max_new_tokens", Integral), ("temperature", Real), ("top_p", Real)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is {value!r}: it must be a {'whole ' * (kind is Integral)}number")
        if self.seed is not None and not (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}: it must be a whole number of at most 64 bits, or None")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (always the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be more than 0, and at most 1")


@dataclass(frozen=True)
class Answer:
    """An answer, finished or still growing.

    Attributes:
        question: what was asked.
        text: the answer so far.
        adapter: True if the adapter was on.
        prompt_tokens: tokens of the whole prompt, history included.
        new_tokens: tokens written so far, `<eop>` included.
        first_seconds: from the question to the first token.
        seconds: from the question to the latest token.
        ended: "" while it grows; "eop" (the model ended it), "length" or "stopped".
        notices: what the reader should know, such as turns that no longer fit.
    """

    question: str
    text: str = ""
    adapter: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    ended: str = ""
    notices: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first; 0 if there was only one."""
        return (self.new_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9) if self.new_tokens > 1 else 0.0

    @property
    def figures(self) -> str:
        """Tokens, time to the first one and speed, in one line."""
        rate = f", then {self.tokens_per_s:.1f} tokens/s" if self.new_tokens > 1 else ""
        end = {"length": ", cut at the limit", "stopped": ", stopped"}.get(self.ended, "")
        return (
            f"{self.prompt_tokens} tokens read, {self.new_tokens} written, "
            f"the first after {self.first_seconds:.2f} s{rate}{end}"
        )

    def __str__(self) -> str:
        return self.text


def plain_text(text: str, tokenizer: Any, indent: bool = False) -> str:
    """Text as the model can read it, and only as text: cleaned as the rows of a training are, see `clean_text`.

    A spelled-out `<sop>` or `[MASK]` would become that token and move the start of the answer; with a full-width
    bracket it is read as the same letters.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is a {type(text).__name__}: expected text")
    text = clean_text(text, indent=indent)
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, {"<": "＜", "[": "［"}.get(token[0], token[0]) + token[1:])
    return text


def plain_turns(history: Sequence[Any], tokenizer: Any) -> list[tuple[str, str]]:
    """`plain_text` of every turn; a history as `as_turns` reads it, with its errors."""
    return [
        (plain_text(asked, tokenizer), plain_text(said, tokenizer, indent=True)) for asked, said in as_turns(history)
    ]


@dataclass
class ChatSession:
    """A conversation. Ask with `chat`, `stream` or `say`; `stop` from another thread ends an answer early.

    Args:
        model: a ChatGLM, or a PEFT model on top of one, on its devices.
        tokenizer: its tokenizer.
        template: name of the prompt template that the adapter was trained with.
        settings: how tokens are chosen.
        system: words at the top of every prompt.
        graphs: use CUDA graphs where there are GPUs.

    Attributes:
        history: finished turns, (question, answer), oldest first; may be changed between answers.
        adapter: whether the adapter is used; set it at any time, it counts from the next answer on.
        busy: whether an answer is being written.

    Raises:
        ValueError: unknown template.
    """

    model: Any
    tokenizer: Any
    template: str = "chatglm"
    settings: Generation = field(default_factory=Generation)
    system: str = ""
    graphs: bool = True

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"no template is called {self.template!r}; use one of {sorted(TEMPLATES)}")
        self.history: list[tuple[str, str]] = []
        self.decoder = Decoder(self.model, graphs=self.graphs)
        self._adapter = self.has_adapter
        self._stop = threading.Event()
        self._latest: tuple[weakref.ref, int] | None = None
        self.busy = False

    @property
    def has_adapter(self) -> bool:
        """Whether the model carries an adapter."""
        return isinstance(self.model, PeftModel)

    @property
    def adapter(self) -> bool:
        """See the class."""
        return self._adapter

    @adapter.setter
    def adapter(self, on: bool) -> None:
        if on and not self.has_adapter:
            raise ValueError("this model has no adapter: load one with load_adapter(base, folder)")
        self._adapter = bool(on)

    def clear(self) -> None:
        """Forget the conversation, and an answer that was left halfway."""
        self._leave()
        self.history = []

    def stop(self) -> None:
        """End the answer that is being written, after its next token; it counts as it stands."""
        self._stop.set()

    def change(self, **settings: Any) -> None:
        """Change some of the settings; names as in Generation."""
        self.settings = replace(self.settings, **settings)

    def chat(self, query: str) -> Answer:
        """The finished answer; it and the question are added to the history. Errors as for `stream`."""
        with contextlib.closing(self.stream(query)) as stream:  # a traceback would keep an interrupted one alive
            return deque(stream, maxlen=1).pop()

    def say(self, query: str) -> Answer:
        """As `chat`, printing the answer while it is written, and its figures below."""
        shown = ""
        with contextlib.closing(self.stream(query)) as stream:
            for answer in stream:
                if answer.new_tokens == 1:
                    print(*(f"[{notice}]\n" for notice in answer.notices), sep="", end="")
                text = answer.text if answer.ended else settled(answer.text)
                if text.startswith(shown):
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        if shown != answer.text:  # the last tokens changed what came before them
            print(f"\n{answer.text}", end="")
        print(f"\n[{answer.figures}]" if answer.text else f"[empty answer: {answer.figures}]")
        return answer

    def stream(self, query: str) -> Generator[Answer, None, None]:
        """Yield the growing answer after each token; the last one has `ended`. Leaving the loop early stops the model.

        A loop that an error ended (Ctrl-C, too) is left for good with the next call in the same thread.

        Raises:
            TypeError: the question is no text.
            ValueError: it is empty, or too long for the model.
            RuntimeError: the model is still writing another answer, of this session or of any other; or the base is
                wanted while the adapter is merged.
            FloatingPointError: the logits are NaN.
        """
        question = plain_text(query, self.tokenizer)
        if not question.strip():
            raise ValueError("the question is empty: write something")
        if self.has_adapter and not self.adapter and is_merged(self.model):
            raise RuntimeError("the adapter is merged into the weights now: leave `with merged_in_memory(...)` first")
        self._leave()
        answers = self._stream(question)
        self._latest = weakref.ref(answers), threading.get_ident()
        return answers

    def _leave(self) -> None:
        """Close the latest answer if nobody can be reading it: the frames of an old error may keep it alive."""
        answers, thread = (self._latest[0](), self._latest[1]) if self._latest else (None, 0)
        if answers is not None and thread == threading.get_ident() and not answers.gi_running:
            answers.close()

    def _stream(self, question: str) -> Generator[Answer, None, None]:
        with held_alone(self.model):
            self._stop.clear()
            self.busy = True
            try:
                yield from self._answer(question)
            finally:
                self.busy = False

    def _answer(self, question: str) -> Iterator[Answer]:
        started, settings, adapter = time.perf_counter(), self.settings, self.adapter
        input_ids, room, notices = self._fit(question)
        ends, ids = self.decoder.net.config.ends, []
        answer = Answer(question, adapter=adapter, prompt_tokens=input_ids.shape[1], notices=notices)
        switch = self.model.disable_adapter() if self.has_adapter and not adapter else contextlib.nullcontext()
        tokens = self.decoder.stream(
            input_ids,
            max_new_tokens=room,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            pieces=len(self.tokenizer),
        )
        try:
            with switch, contextlib.closing(tokens):
                for (token,) in tokens:
                    ids.append(token)
                    written = ids[:-1] if token in ends else ids
                    seconds = time.perf_counter() - started
                    first = answer.first_seconds or seconds
                    ended = "eop" if token in ends else "length" if len(ids) == room else ""
                    ended = ended or ("stopped" if self._stop.is_set() else "")
                    text = process_response(self.tokenizer.decode(written))
                    answer = replace(
                        answer, text=text, new_tokens=len(ids), first_seconds=first, seconds=seconds, ended=ended
                    )
                    if ended:
                        break
                    yield answer
        except GeneratorExit:  # the reader left: what was shown is part of the conversation
            self.history = [*self.history, (question, answer.text)]
            raise
        self.history = [*self.history, (question, answer.text)]
        yield answer

    def _fit(self, question: str) -> tuple[Any, int, tuple[str, ...]]:
        """Ids [1, L] of the prompt with as much history as fits, tokens left for the answer, and notices."""
        limit, wanted = self.decoder.net.config.max_sequence_length, self.settings.max_new_tokens
        # An answer, too, may spell a special token, and anybody may have written this list.
        said = plain_turns(self.history, self.tokenizer)
        system, notices, least = plain_text(self.system, self.tokenizer), [], min(LEAST_ROOM, wanted)

        def ids_with(turns: int) -> Any:
            prompt = build_prompt(question, said[len(said) - turns :], self.template, system=system)
            return self.tokenizer([prompt], return_tensors="pt")["input_ids"]

        def too_many(turns: int) -> bool:
            return limit - ids_with(turns).shape[1] < min(wanted, limit // 4)

        # From the last turn on, so that a conversation of any length costs what the model can read of it.
        most = 1
        while most < len(said) and not too_many(most):
            most *= 2
        kept = bisect_left(range(1, min(most, len(said)) + 1), True, key=too_many)
        input_ids = ids_with(kept)
        room = limit - input_ids.shape[1]
        if room < least:
            raise ValueError(
                f"the question has {input_ids.shape[1]} tokens; the model reads and writes {limit} together, and "
                f"{least} are kept for the answer: shorten it by {least - room} tokens or more"
            )
        if left_out := len(said) - kept:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            notices.append(
                f"a model of {limit} tokens cannot see all of this conversation: the oldest {turns} left out"
            )
        if room < wanted:
            notices.append(f"only {room} tokens are left for the answer")
        return input_ids, min(room, wanted), tuple(notices)


def settled(text: str) -> str:
    """The part of a growing answer that the next token cannot change.

    Punctuation becomes full-width when a Chinese character follows, and space at the end is trimmed.
    """
    return text.rstrip(" \n\t,!:;?")
