"""A text in, whether it speaks well or ill of what it is about.

The network reads word pieces, as BERT's tokenizer cuts them. Treebank spelling ("does n't",
``quotes``) becomes ordinary prose first, and line breaks in HTML become spaces, so that a
text is read alike however it reached us.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from service.errors import BadInput
from service.models.spec import Array, Classification, Inputs, Room, Sample, Tensor

LABELS = ("negative", "positive")

TOKENIZER: Final = "tokenizer.json"
"""The asset that says how a text is cut into word pieces."""

PADDING: Final = 0
"""The token that fills the shorter texts of a batch up; the network looks past it."""

MAX_TOKENS: Final = 512
"""As many positions as the network has."""

HEAD_SHARE: Final = 0.25
"""Of a text that is too long this much is kept of its beginning, and the rest of its end, where
reviewers come to their verdict (Sun et al., *How to Fine-Tune BERT for Text Classification?*, 2019)."""

HEAD_CHARACTERS: Final = 8_000
TAIL_CHARACTERS: Final = 24_000
"""No more of a text is cut into word pieces than could be kept: that bounds the work."""

QUICK_BYTES: Final = 2_000
"""A text up to this long is cut into pieces in about a millisecond."""

Tokens = npt.NDArray[np.int64]

_HTML_BREAK: Final = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TREEBANK: Final = ((" n't", "n't"), ("``", '"'), ("''", '"'), ("-lrb-", "("), ("-rrb-", ")"))


def read_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, set to cut nothing off and to fill nothing up.

    Raises:
        ValueError: it is no tokenizer, or its padding is not token 0.
    """
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{TOKENIZER} is not a tokenizer: {error}") from error
    if tokenizer.token_to_id("[PAD]") != PADDING:
        raise ValueError(f"{TOKENIZER} does not call token {PADDING} [PAD]")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Else a text that says [PAD] or [SEP] would be taken at its word.
    tokenizer.encode_special_tokens = True
    return tokenizer


def as_prose(text: str) -> str:
    """A text without HTML's line breaks and without the treebank's spelling."""
    if "<" in text:
        text = _HTML_BREAK.sub(" ", text)
    for treebank, prose in _TREEBANK:
        text = text.replace(treebank, prose)
    return text


def to_tokens(tokenizer: Tokenizer, text: str, limit: int = MAX_TOKENS) -> Tokens:
    """A text to its word pieces, int64 [at most limit], between the tokens for beginning and end."""
    text = text.strip()
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        text = f"{text[:HEAD_CHARACTERS]} {text[-TAIL_CHARACTERS:]}"
    return shorten(np.array(tokenizer.encode(as_prose(text)).ids, np.int64), limit)


def shorten(tokens: Tokens, limit: int) -> Tokens:
    """The beginning and the end of what is longer than `limit` tokens; all of what is not."""
    if len(tokens) <= limit:
        return tokens
    head = int(limit * HEAD_SHARE)
    return np.concatenate([tokens[:head], tokens[head - limit :]])


def to_tensor(tokenizer: Tokenizer, inputs: Inputs) -> Sample:
    """A text in UTF-8 to the network's input.

    Raises:
        BadInput: it is not UTF-8, or holds nothing to read.
    """
    try:
        text = bytes(inputs["text"]).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"The text is not UTF-8 at byte {error.start}; send it encoded as UTF-8.") from None
    tokens = to_tokens(tokenizer, text)
    # The tokens for beginning and end are always there.
    if len(tokens) <= 2:
        raise BadInput("The text is empty; send at least one word.")
    return Sample((tokens,))


def furnished(assets: Mapping[str, bytes]) -> Callable[[Inputs], Sample]:
    """`to_tensor` with the tokenizer of one version.

    Raises:
        ValueError: the tokenizer is none, or another model's.
    """
    return functools.partial(to_tensor, read_tokenizer(assets[TOKENIZER]))


def to_answer(row: Sequence[Array], sample: Sample) -> Classification:
    """Two probabilities to the label they point at."""
    return Classification(LABELS, row[0])


def is_quick(inputs: Inputs) -> bool:
    """Short texts are."""
    return len(inputs["text"]) <= QUICK_BYTES


def _unfurnished(inputs: Inputs) -> Sample:
    """Stands in until a version's tokenizer is there."""
    raise RuntimeError(f"furnish the room with {TOKENIZER} first")


SENTIMENT = Room(
    name="sentiment",
    task="Says whether a text in English speaks well or ill of its subject.",
    takes="texts",
    labels=LABELS,
    inputs=((Tensor("text", "BYTES"),),),
    outputs=(Tensor("label", "BYTES"), Tensor("probabilities", "FP32", (len(LABELS),))),
    network_inputs=(Tensor("tokens", "INT64", (-1,)),),
    network_outputs=(Tensor("probabilities", "FP32", (len(LABELS),)),),
    to_tensor=_unfurnished,
    to_answer=to_answer,
    example={"text": b"A warm, funny film, and better than it needed to be."},
    is_quick=is_quick,
    assets=(TOKENIZER,),
    to_tensor_with=furnished,
)
