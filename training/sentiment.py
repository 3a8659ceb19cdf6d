"""Says whether a text speaks well or ill of its subject.

`transformer`, fine-tuned: 91.5 % of SST-2's dev sentences and 94.1 % of 1,000 long reviews held back from
IMDB: the mean of two runs (91.6 and 91.2 %) that a teacher told what snippets of reviews say, itself the mean
of two runs (90.4 and 90.5 %, their mean 91.2 %); 22,713,986 parameters, some 65 minutes a run on one core.
`gru`, from scratch: 84.5 % and 88.8 % (one run, seed 0); some six minutes on one core.

Rerun: python -m training sentiment --seeds 1 2 --average
       python -m training sentiment --seeds 1 2 --average --teacher runs/sentiment-transformer-average
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import AttentionInterface, BertConfig, BertModel

from service.models.sentiment import (
    LABELS,
    MAX_TOKENS,
    PADDING,
    SENTIMENT,
    TOKENIZER,
    Tokens,
    read_tokenizer,
    shorten,
    to_tokens,
)
from service.models.spec import Array
from training import card, data, fit
from training.calibration import Probabilities, brier_score, expected_calibration_error, fit_temperature
from training.errors import TrainingError
from training.exam import Exam, likeliest, refuse_other_data

# ---------------------------------------------------------------- data

WEIGHTS: Final = "model.safetensors"

_END_OF_FIELD: Final = re.compile(rb"[ \r]+(?=[\t\n])")


def without_blanks(content: bytes) -> bytes:
    """A table without the blanks that GLUE has at the end of its sentences, and some copies have not."""
    return _END_OF_FIELD.sub(b"", content)


SST2: Final = data.Archive(
    name="SST-2",
    folder="SST-2",
    mirrors=("https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",),
    files=("train.tsv", "dev.tsv"),
    file_count=2,
    content_bytes=3_832_790,
    content_sha256="6269f618bab1c60d956abe4f4f68ca96636a27ec7aeb216dbc432cdd35e08e61",
    canonical=without_blanks,
)
IMDB: Final = data.Archive(
    name="IMDB",
    folder="aclImdb",
    mirrors=("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
    files=("train/neg/*.txt", "train/pos/*.txt"),
    file_count=25_000,
    content_bytes=33_132_823,
    content_sha256="6fda854ebfdae8d72f130d898bd6efa555dfbd6fdaa06af822d978979ec69ac6",
)
MINILM: Final = data.Archive(
    name="MiniLM",
    folder="all-MiniLM-L6-v2",
    mirrors=(
        "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
        "c9745ed1d9f207416be6d2e6f8de32d1f16199bf/",
    ),
    files=(WEIGHTS, TOKENIZER),
    file_count=2,
    content_bytes=91_334_623,
    content_sha256="58ecd522351329833b309898800f3d3cb21c28605d402344f4e5adf48cdbd817",
)


@dataclass(frozen=True)
class Texts:
    """Texts and what they say.

    Attributes:
        texts: As they were published.
        labels: 0 negative, 1 positive, int64 [n].
    """

    texts: Sequence[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.texts)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> "Texts":
        """Those at int64 `rows` [n]."""
        return Texts([self.texts[row] for row in rows], self.labels[rows])

    def __add__(self, other: "Texts") -> "Texts":
        """These, then the others."""
        return Texts([*self.texts, *other.texts], np.concatenate([self.labels, other.labels]))

    @property
    def sha256(self) -> str:
        """Of each label and text, in order."""
        rows = zip(self.labels.tolist(), self.texts, strict=True)
        return data.sha256_of("".join(f"{label}{text}\0" for label, text in rows).encode())


def load_sst2(folder: Path | None, split: str, *, verify: bool = True) -> Texts:
    """The Stanford Sentiment Treebank (Socher et al., 2013) with two labels, as GLUE has it.

    Args:
        folder: Holds `SST-2/`; None for `$QUINTET_DATA` or the cache.
        split: `train` (67,349 phrases and sentences) or `dev` (872 sentences).
        verify: Whether it must be GLUE's. False takes anyone's own texts in the same format.

    Raises:
        TrainingError: the file cannot be had, or is not what it should be.
    """
    path = data.find_archive(SST2, folder, verify=verify) / f"{split}.tsv"
    try:
        lines = without_blanks(path.read_bytes()).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read; put a table in UTF-8 there.") from error
    rows = [line.split("\t") for line in lines[1:] if line]
    if not rows or any(len(row) != 2 or row[1] not in ("0", "1") for row in rows):
        raise TrainingError(f"{path} must hold a sentence, a tab and 0 or 1 on each line below the first.")
    return Texts([text for text, _ in rows], np.array([int(label) for _, label in rows]))


def load_imdb(folder: Path | None, *, verify: bool = True) -> Texts:
    """The train half of the Large Movie Review Dataset (Maas et al., 2011): 25,000 reviews.

    Raises:
        TrainingError: the files cannot be had, or are not what they should be.
    """
    home = data.find_archive(IMDB, folder, verify=verify) / "train"
    texts, labels = [], []
    try:
        for label, name in enumerate(("neg", "pos")):
            found = [path.read_text(encoding="utf-8") for path in sorted((home / name).glob("*.txt"))]
            texts += found
            labels += [label] * len(found)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"A review in {home} cannot be read; each is a file of text in UTF-8.") from error
    if len(set(labels)) < 2:
        raise TrainingError(f"{home} must hold reviews, each in a file of its own, in pos and in neg.")
    return Texts(texts, np.array(labels))


def load_minilm(folder: Path | None, name: str, *, verify: bool = True) -> bytes:
    """A file of MiniLM (Wang et al., 2020), six layers deep, as sentence-transformers trained it on.

    Args:
        folder: Holds `all-MiniLM-L6-v2/`; None for `$QUINTET_DATA` or the cache.
        name: `model.safetensors` or `tokenizer.json`.
        verify: Whether it must be the published file.

    Raises:
        TrainingError: it cannot be had, or is not what it should be.
    """
    path = data.find_archive(MINILM, folder, verify=verify) / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"There is no {path}; put it there.") from error


def load_tokenizer(content: bytes) -> Tokenizer:
    """The room's tokenizer, from the bytes of `tokenizer.json`.

    Raises:
        TrainingError: it is none.
    """
    try:
        return read_tokenizer(content)
    except ValueError as error:
        raise TrainingError(f"{error}.") from error


def whole_sentences(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which texts are no part of a longer one, bool [n].

    The treebank's training half has each sentence and the phrases of its parse tree, and
    does not say which is which.
    """
    words = [text.split() for text in texts]
    is_whole = np.zeros(len(texts), np.bool_)
    parts: set[str] = set()
    for row in sorted(range(len(texts)), key=lambda row: -len(words[row])):
        phrase = " ".join(words[row])
        if phrase not in parts:
            is_whole[row] = True
            parts |= _phrases(words[row])
    return is_whole


def _phrases(words: Sequence[str], shortest: int = 1) -> set[str]:
    """Every run of `shortest` or more words, the whole included."""
    count = len(words)
    return {
        " ".join(words[start:stop]) for start in range(count) for stop in range(start + shortest, count + 1)
    }


@dataclass(frozen=True)
class Corpus:
    """All texts of a run, by what they are for.

    Attributes:
        sentences: Of the treebank, to learn from.
        phrases: Parts of such sentences, to learn from.
        reviews: To learn from.
        calibration: Sentences held out for the temperature and the learning curve.
        long_calibration: Reviews held out for the same.
        questions: Sentences that the score is about.
        long_questions: Reviews that the score is about, of `LONG_WORDS` words or more.
    """

    sentences: Texts
    phrases: Texts
    reviews: Texts
    calibration: Texts
    long_calibration: Texts
    questions: Texts
    long_questions: Texts


def load_corpus(folder: Path | None, *, verify: bool = True, holdout: int = 0) -> Corpus:
    """Read and split the data.

    What is held out depends on the texts alone, not on a run's seed, so runs can be
    compared. No phrase of `PHRASE_WORDS` or more words of a held-out sentence is learnt
    from, nor another copy of a held-out review.

    Args:
        folder: Holds the data sets' folders; None for `$QUINTET_DATA` or the cache.
        verify: Whether the data must be the published ones.
        holdout: Ask so many sentences of the train half instead of the dev set.

    Raises:
        TrainingError: the data cannot be had, or are too few.
    """
    treebank = load_sst2(folder, "train", verify=verify)
    films = load_imdb(folder, verify=verify)
    is_whole = whole_sentences(treebank.texts)
    whole, parts = np.flatnonzero(is_whole), np.flatnonzero(~is_whole)
    order = np.random.default_rng(HELD_OUT_SEED).permutation(whole)
    held_out = order[: holdout + min(CALIBRATION_TEXTS, len(order) // 8)]
    hidden = set(treebank[held_out].texts).union(
        *(_phrases(text.split(), PHRASE_WORDS) for text in treebank[held_out].texts)
    )
    is_open = np.array([text not in hidden for text in treebank.texts])
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(films))
    is_long = np.array([len(text.split()) >= LONG_WORDS for text in films.texts])
    asked = order[is_long[order]][: min(LONG_QUESTIONS, len(films) // 8)]
    others = order[~np.isin(order, asked)]
    calibrating, others = np.split(others, [min(CALIBRATION_TEXTS, len(films) // 8)])
    copies = set(films[np.concatenate([asked, calibrating])].texts)
    learnt = np.array([row for row in others if films.texts[row] not in copies], np.int64)
    corpus = Corpus(
        sentences=treebank[whole[is_open[whole]]],
        phrases=treebank[parts[is_open[parts]]],
        reviews=films[learnt],
        calibration=treebank[held_out[holdout:]],
        long_calibration=films[calibrating],
        questions=treebank[held_out[:holdout]] if holdout else load_sst2(folder, "dev", verify=verify),
        long_questions=films[asked],
    )
    if not all(map(len, vars(corpus).values())):
        raise TrainingError(
            f"{len(treebank)} phrases and {len(films)} reviews are too few to hold some out and learn from "
            f"the rest{f'; lower --holdout {holdout}' if holdout else ''}."
        )
    return corpus


_BREAK: Final = re.compile(r"(?:<br\s*/?>|\s)+")
_END_OF_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+")


def snippets(reviews: Texts) -> Texts:
    """Reviews in pieces of a few sentences, each with its review's label.

    Most pieces speak as their review does; some tell the plot, or see the other side.
    """
    texts, labels = [], []
    for text, label in zip(reviews.texts, reviews.labels.tolist(), strict=True):
        piece: list[str] = []
        for sentence in _END_OF_SENTENCE.split(_BREAK.sub(" ", text).strip()):
            piece += sentence.split()
            if len(piece) >= SNIPPET_WORDS[0]:
                if len(piece) <= SNIPPET_WORDS[1]:
                    texts.append(" ".join(piece))
                    labels.append(label)
                piece = []
    return Texts(texts, np.array(labels, np.int64))


def cut_up(tokenizer: Tokenizer, texts: Texts) -> list[Tokens]:
    """Texts in word pieces, as the room makes them: int64 [up to `MAX_TOKENS`] each."""
    return [to_tokens(tokenizer, text) for text in texts.texts]


def padded(tokens: Sequence[Tokens]) -> Tensor:
    """Texts side by side, the shorter ones filled up: int64 [n, longest]."""
    table = np.full((len(tokens), max(map(len, tokens))), PADDING, np.int64)
    for row, text in zip(table, tokens, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(table)


# ---------------------------------------------------------------- batches


def plan(
    lengths: npt.NDArray[np.int64], kinds: Sequence[int], recipe: "Recipe", settings: fit.Settings
) -> list[list[Tensor]]:
    """The batches of a whole run: for each epoch int64 indices into all that is learnt from.

    A round has every sentence, some of the phrases, some of the reviews and, early in the
    run, some of the snippets. Texts of about one length are batched together, so that next
    to nothing is computed for padding; a batch ends at `settings.batch_size` texts or
    `recipe.batch_tokens` tokens, whatever comes first. There are as many rounds as epochs,
    but epochs are equally many batches each, so early rounds may reach into the next epoch.

    Args:
        lengths: In tokens, of sentences, phrases, reviews and snippets in this order, int64 [n].
        kinds: How many there are of each.
        recipe: Says how many, and how long.
        settings: Epochs, batch size and seed.
    """
    random = np.random.default_rng(settings.seed)
    sentences, phrases, reviews, pieces = np.split(np.arange(len(lengths)), np.cumsum(kinds)[:-1])
    some_phrases = _portions(phrases, recipe.phrase_share, settings.epochs, random)
    some_reviews = _portions(reviews, recipe.review_share, settings.epochs, random)
    some_pieces = _portions(pieces, recipe.snippet_share, settings.epochs, random)
    plan: list[Tensor] = []
    for epoch in range(settings.epochs):
        progress = (epoch + 1) / settings.epochs
        rows = np.concatenate([sentences, some_phrases[epoch], some_reviews[epoch]])
        if progress <= recipe.snippets_until:
            rows = np.concatenate([rows, some_pieces[epoch]])
        batches = _by_length(
            rows,
            np.minimum(lengths[rows], recipe.limit(progress)),
            settings.batch_size,
            recipe.batch_tokens,
            random,
        )
        plan += [batches[number] for number in random.permutation(len(batches))]
    # As many in every epoch: a batch more or less of hundreds is no loss.
    steps = len(plan) // settings.epochs
    return [plan[epoch * steps : (epoch + 1) * steps] for epoch in range(settings.epochs)]


def _portions(
    rows: npt.NDArray[np.int64], share: float, epochs: int, random: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """A share of the rows for each epoch; no row comes up again before all others have."""
    size = max(min(1, len(rows)), round(len(rows) * share))
    rounds = -(-size * epochs // max(1, len(rows)))
    order = np.concatenate([rows[:0], *(random.permutation(rows) for _ in range(rounds))])
    return np.split(order[: size * epochs], epochs)


def _by_length(
    rows: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    most_texts: int,
    most_tokens: int,
    random: np.random.Generator,
) -> list[Tensor]:
    """Rows with their like in length, in a random order among equals."""
    order = np.lexsort((random.random(len(rows)), lengths))
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        is_last = stop == len(order)
        if is_last or stop - start == most_texts or (stop + 1 - start) * lengths[order[stop]] > most_tokens:
            batches.append(torch.from_numpy(rows[order[start:stop]]))
            start = stop
    return batches


# ---------------------------------------------------------------- networks


def quick_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' "eager" attention does, with the mask added inside the product.

    On a CPU in bfloat16 a step on long texts takes a third less time than with "eager", and
    less than with "sdpa", whose backward pass is slow there.

    Args:
        module: Not needed.
        query: [n, heads, length, width], as are key and value.
        key: See query.
        value: See query.
        attention_mask: Added to the scores, [n, 1, 1, length].
        scaling: What the scores are multiplied by.

    Returns:
        Float [n, length, heads, width], and no weights.
    """
    count, heads, length, width = query.shape
    rows = (count * heads, length, width)
    mask = attention_mask.expand(count, heads, 1, length).reshape(count * heads, 1, length)
    scores = torch.baddbmm(mask, (query * scaling).reshape(rows), key.reshape(rows).transpose(1, 2))
    read = torch.bmm(scores.softmax(2), value.reshape(rows)).view(query.shape)
    return read.transpose(1, 2).contiguous(), None


AttentionInterface.register("quick", quick_attention)

MINILM_CONFIG: Final = BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=MAX_TOKENS,
    # Dropping attention weights would cost as many random numbers as all other dropout together.
    attention_probs_dropout_prob=0.0,
)


def is_word(tokens: Tensor) -> Tensor:
    """Which tokens are no padding: bool, like `tokens`."""
    return tokens != PADDING


def mean_over_words(values: Tensor, tokens: Tensor) -> Tensor:
    """The mean over a text's own tokens: [n, length, width] to [n, width]."""
    weights = is_word(tokens).unsqueeze(2).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)


class Transformer(nn.Module):
    """BERT (Devlin et al., 2018) without its pooler; the mean over the text goes through one hidden layer."""

    def __init__(self, config: BertConfig = MINILM_CONFIG) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.set_attn_implementation("quick")
        self.classify = nn.Sequential(
            nn.Dropout(0.1),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(0.1),
            nn.Linear(config.hidden_size, len(LABELS)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [n, length] to logits [n, 2]."""
        bias = (~is_word(tokens))[:, None, None, :].float() * -1e4
        if torch.is_autocast_enabled(tokens.device.type):
            # Added in fp32, it would carry scores and softmax into fp32 with it: thrice the time.
            bias = bias.to(torch.get_autocast_dtype(tokens.device.type))
        read = self.bert(input_ids=tokens, attention_mask=bias).last_hidden_state
        logits: Tensor = self.classify(mean_over_words(read, tokens))
        return logits

    def start_from(self, weights: bytes) -> None:
        """Take over pretrained weights, from the bytes of a safetensors file.

        Raises:
            TrainingError: they are not this network's.
        """
        try:
            found = safetensors.torch.load(weights)
            self.bert.load_state_dict(
                {
                    name: value
                    for name, value in found.items()
                    if not name.startswith("pooler.") and name != "embeddings.position_ids"
                }
            )
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise TrainingError(f"{WEIGHTS} of {MINILM.name} is damaged or another network's.") from error

    def rates(self, decay: float) -> list[tuple[nn.Module, float]]:
        """Parts and their shares of the learning rate: less for each layer further down.

        The lower a layer, the more general what it knows (Howard & Ruder, *Universal Language
        Model Fine-tuning for Text Classification*, 2018).
        """
        layers = [self.bert.embeddings, *self.bert.encoder.layer]
        below = [(layer, decay**depth) for depth, layer in enumerate(reversed(layers))]
        return [(self.classify, CLASSIFY_RATE), *below]


class Gru(nn.Module):
    """Two gated recurrent layers side by side (Cho et al., 2014), one from each end of the text."""

    def __init__(self, vocabulary: int = 30_522, width: int = 128, hidden: int = 160) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.forwards = nn.GRU(width, hidden, batch_first=True)
        self.backwards = nn.GRU(width, hidden, batch_first=True)
        self.drop_words = nn.Dropout(0.3)
        self.classify = nn.Sequential(nn.Dropout(0.4), nn.Linear(4 * hidden, len(LABELS)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [n, length] to logits [n, 2]."""
        # Each row turned round within its own words: padding stays behind them both ways, so it
        # never passes through a state that is looked at.
        length = is_word(tokens).sum(1, keepdim=True)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        turned = tokens.gather(1, torch.where(place < length, length - 1 - place, place))
        views = []
        for layer, order in ((self.forwards, tokens), (self.backwards, turned)):
            states = _states(layer, self.drop_words(self.embed(order)))
            hidden = states.masked_fill(~is_word(order).unsqueeze(2), -1.0)
            views += [mean_over_words(states, order), hidden.amax(1)]
        logits: Tensor = self.classify(torch.cat(views, 1))
        return logits

    def rates(self, decay: float) -> list[tuple[nn.Module, float]]:
        """All of it learns at one rate."""
        return [(self, 1.0)]


def _states(layer: nn.GRU, words: Tensor) -> Tensor:
    """What a layer remembers after each word: float [n, length, width] to [n, length, hidden]."""
    if not torch.onnx.is_in_onnx_export():
        states: Tensor = layer(words)[0]
        return states
    # torch's exporter writes out each step of its example; ONNX has an operator for any length.
    weights = [_onnx_gates(layer.weight_ih_l0), _onnx_gates(layer.weight_hh_l0)]
    biases = torch.cat([_onnx_gates(layer.bias_ih_l0), _onnx_gates(layer.bias_hh_l0)], 1)
    count, length, _ = words.shape
    steps = torch.onnx.ops.symbolic(
        "GRU",
        (words.transpose(0, 1), *weights, biases),
        {"hidden_size": layer.hidden_size, "linear_before_reset": 1},
        dtype=words.dtype,
        shape=(length, 1, count, layer.hidden_size),
    )
    return steps.squeeze(1).transpose(0, 1)


def _onnx_gates(parameter: Tensor) -> Tensor:
    """From torch's reset, update and new gates to ONNX's order, after an axis for the direction."""
    reset, update, new = parameter.chunk(3)
    return torch.cat([update, reset, new]).unsqueeze(0)


ARCHITECTURES: dict[str, Callable[[], Transformer | Gru]] = {"transformer": Transformer, "gru": Gru}
"""Each takes tokens int64 [n, length] and gives logits [n, 2]."""

WITH_A_MEAN: Final = ("transformer",)
"""Architectures whose runs start from the same pretrained weights, so that their mean is a network, too."""

WITH_A_TEACHER: Final = ("transformer",)
"""Architectures that learn from snippets, of which a teacher can say more than their label."""


# ---------------------------------------------------------------- loss


def hide_words(tokens: Tensor, hidden_by: int) -> Tensor:
    """Texts with some of their words hidden, others each time: int64 [n, length].

    Token cutoff: Shen et al., *A Simple but Tough-to-Beat Data Augmentation Approach for
    Natural Language Understanding*, 2020.

    Args:
        tokens: Texts side by side.
        hidden_by: The token that stands for a hidden word.
    """
    hidden = (torch.rand(tokens.shape, device=tokens.device) < HIDDEN_SHARE) & is_word(tokens)
    # What begins a text is no word of it; what ends it stands elsewhere in each, and may be hidden like one.
    hidden[:, 0] = False
    return tokens.masked_fill(hidden, hidden_by)


def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross entropy, with what is told of a text believed as far as it is trusted.

    What it is not trusted with, the network says itself (Reed et al., *Training Deep Neural
    Networks on Noisy Labels with Bootstrapping*, 2015).

    Args:
        network: Takes tokens.
        batch: Tokens, int64 [n, length]; how likely each text has each label, float32 [n, 2];
            how far that is trusted, float32 [n] in 0..1.
    """
    tokens, told, trust = batch
    said = network(tokens).float().log_softmax(1)
    own = said.exp().detach()
    truth = own + trust[:, None] * (told - own)
    return -(truth * said).sum(1).mean()


@dataclass(frozen=True)
class Teacher:
    """A trained network, asked what a snippet says, which its review's label often does not tell.

    A pupil that hears its answers with words hidden gets past it (Xie et al., *Self-training
    with Noisy Student*, 2020).

    Attributes:
        network: Takes tokens, gives probabilities float32 [n, 2].
        card: As its training left it.
    """

    network: nn.Module
    card: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "Teacher":
        """From the folder of a finished run.

        Raises:
            TrainingError: it holds none of this story's networks, or is damaged.
        """
        network, facts = card.read_checkpoint(folder)
        if facts["model"] != SENTIMENT.name:
            raise TrainingError(f"{folder} holds a {facts['model']} network, which reads no texts.")
        return cls(Probabilities(network, float(facts.get("temperature", 1.0))).to(device), facts)

    @torch.no_grad()
    def answers(self, tokens: Tensor, precision: str) -> Tensor:
        """What it says of texts int64 [n, length]: float32 [n, 2]."""
        with fit.autocasting(precision, tokens.device):
            return self.network(tokens).float()


# ---------------------------------------------------------------- score


@torch.inference_mode()
def answers(network: nn.Module, tokens: Sequence[Tokens], device: torch.device | None = None) -> Tensor:
    """What the network says of each text: float32 [n, 2], on the CPU."""
    network.eval()
    lengths = np.array([len(text) for text in tokens])
    rows = np.arange(len(tokens))
    found = torch.empty(len(tokens), len(LABELS))
    for part in _by_length(rows, lengths, len(rows), 16_384, np.random.default_rng(0)):
        found[part] = network(padded([tokens[row] for row in part]).to(device)).float().cpu()
    return found


def head(network: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """The trained network with the room's outputs: probabilities float32 [n, 2]."""
    if isinstance(network, Transformer):
        # The form that ONNX Runtime's optimiser knows.
        network.bert.set_attn_implementation("eager")
    return Probabilities(network, float(card.get("temperature", 1.0)))


def scores(outputs: Sequence[Array], truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """How often sentences and reviews are told right, and how well the probabilities say so.

    Args:
        outputs: Probabilities float32 [n, 2], alone.
        truth: A row for each text: its label, and 1 where it is a review; int64 [n, 2].
    """
    labels, is_review = truth[:, 0], truth[:, 1] == 1
    is_right = likeliest(outputs) == labels
    return {
        "accuracy": float(np.mean(is_right[~is_review])),
        "imdb_accuracy": float(np.mean(is_right[is_review])),
        "expected_calibration_error": expected_calibration_error(outputs[0], labels),
        "brier_score": brier_score(outputs[0], labels),
    }


def truth_of(corpus: Corpus) -> npt.NDArray[np.int64]:
    """What `scores` compares with, for the questions and then the long ones."""
    labels = np.concatenate([corpus.questions.labels, corpus.long_questions.labels])
    is_review = np.repeat([0, 1], [len(corpus.questions), len(corpus.long_questions)])
    return np.stack([labels, is_review], axis=1)


def trim(inputs: Sequence[Array]) -> list[Array]:
    """A batch without the columns that are padding in every row."""
    (tokens,) = inputs
    longest = int((tokens != PADDING).sum(axis=1).max(initial=1))
    return [tokens[:, :longest]]


def exam(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """The dev sentences of SST-2 and the held-back reviews, or one's own instead.

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card; its `data` say which texts its scores are about.

    Raises:
        TrainingError: the texts cannot be had, or are not those of the card.
    """
    named = card["data"]
    verify = named["name"] == DATA
    corpus = load_corpus(folder, verify=verify)
    questions = corpus.questions + corpus.long_questions
    refuse_other_data(card, questions.sha256)
    tokens = padded(cut_up(_tokenizer(folder, verify), questions)).numpy()
    return Exam(
        f"{named['name']}, {named['split']}",
        (tokens,),
        truth_of(corpus),
        likeliest,
        scores,
        trim=trim,
        batch_size=EXAM_TEXTS,
    )


def _tokenizer(folder: Path | None, verify: bool) -> Tokenizer:
    """MiniLM's."""
    return load_tokenizer(load_minilm(folder, TOKENIZER, verify=verify))


def calibration(folder: Path | None, card: Mapping[str, Any]) -> tuple[Array]:
    """Sentences and reviews that were held out of training and are no part of the exam: int64 [n, length].

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card.

    Raises:
        TrainingError: the texts cannot be had.
    """
    verify = card["data"]["name"] == DATA
    corpus = load_corpus(folder, verify=verify)
    sentences = corpus.calibration[np.arange(min(QUANTISATION_SENTENCES, len(corpus.calibration)))]
    reviews = corpus.long_calibration[np.arange(min(QUANTISATION_REVIEWS, len(corpus.long_calibration)))]
    return (padded(cut_up(_tokenizer(folder, verify), sentences + reviews)).numpy(),)


# ---------------------------------------------------------------- settings

QUANTISATION_SENTENCES: Final = 256
QUANTISATION_REVIEWS: Final = 64
DATA: Final = "SST-2 and IMDB"
HELD_OUT_SEED: Final = 20_130_801
CALIBRATION_TEXTS: Final = 400
CURVE_REVIEWS: Final = 300
"""So many held-out reviews are read after every epoch, for the curve."""
LONG_QUESTIONS: Final = 1_000
LONG_WORDS: Final = 200
EXAM_TEXTS: Final = 32
"""So many are examined at a time: attention scores of long texts take a gigabyte for a hundred."""
PHRASE_WORDS: Final = 4
"""Shorter phrases ("a good film") are anybody's."""

HIDDEN_SHARE: Final = 0.08
"""Of a text's words, each time that it is read."""
SNIPPET_WORDS: Final = (12, 50)
"""A snippet ends with the sentence that makes it so long, or is left out where that is too long."""
SNIPPET_TRUST: Final = 0.6
"""How far a snippet's label, which is its review's, is believed; what a teacher says of it is, wholly."""
AVERAGE_DECAY: Final = 0.998
CLASSIFY_RATE: Final = 5.0
"""The new layers start from nothing, so they learn faster than the pretrained ones."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with, unless the command line says otherwise.

    Attributes:
        epochs: One has every sentence, and the shares below.
        batch_size: Texts per step at most.
        batch_tokens: Tokens per step at most, padding included.
        learning_rate: At its highest, after `warm_up` of the run.
        layer_decay: A layer's rate over that of the layer above it.
        weight_decay: Of matrices.
        phrase_share: Of the phrases, in an epoch.
        review_share: Of the reviews, in an epoch.
        snippet_share: Of the snippets, in an epoch.
        snippets_until: From this part of the run on there are no snippets.
        short_tokens: Reviews are cut to this length at first.
        long_from: From this part of the run on they are as long as the room lets them be.
        precision: Where the command line leaves it open.
        warm_up: Part of the run in which the learning rate rises.
    """

    epochs: int
    batch_size: int
    batch_tokens: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    phrase_share: float
    review_share: float
    snippet_share: float
    snippets_until: float
    short_tokens: int
    long_from: float
    precision: str
    warm_up: float = 0.06

    def limit(self, progress: float) -> int:
        """Tokens of a text that are learnt from, at a `progress` in 0..1 of the run."""
        return MAX_TOKENS if progress > self.long_from else self.short_tokens

    def rate(self, progress: float) -> float:
        """The learning rate's share of its highest: up in a line, and down to 0 in another."""
        return min(progress / self.warm_up, max(0.0, (1 - progress) / (1 - self.warm_up)))


RECIPES = {
    "transformer": Recipe(8, 64, 8_192, 1e-4, 0.9, 0.01, 0.4, 0.06, 0.15, 0.65, 256, 0.75, "auto"),
    "gru": Recipe(4, 96, 16_384, 2e-3, 1.0, 0.01, 1.0, 0.25, 0.1, 0.0, 256, 0.7, "fp32"),
}


def train(run: fit.Run) -> dict[str, Any]:
    """Train one network, score it on texts that it did not see, and leave both in `run.out`.

    Returns:
        The card.

    Raises:
        TrainingError: data, settings or resume point are not in order.
    """
    recipe = RECIPES[run.arch]
    tokenizer_file = load_minilm(run.data, TOKENIZER, verify=run.verify)
    tokenizer = load_tokenizer(tokenizer_file)
    corpus = load_corpus(run.data, verify=run.verify, holdout=run.holdout)
    nothing = Texts([], np.zeros(0, np.int64))
    pieces = snippets(corpus.reviews) if recipe.snippets_until else nothing
    material = corpus.sentences + corpus.phrases + corpus.reviews + pieces
    settings = _settings(run)
    with fit.processes(run.device) as device:
        teacher = Teacher.read(run.teacher, device) if run.teacher else None
        fit.sow(run.seed)
        network = ARCHITECTURES[run.arch]()
        if isinstance(network, Transformer):
            network.start_from(load_minilm(run.data, WEIGHTS, verify=run.verify))
        network.to(device)
        tokens = cut_up(tokenizer, material)
        truth = one_hot(torch.from_numpy(material.labels), len(LABELS)).float()
        hidden_by = tokenizer.token_to_id("[MASK]") or tokenizer.token_to_id("[UNK]")
        kinds = [len(corpus.sentences), len(corpus.phrases), len(corpus.reviews), len(pieces)]
        is_piece = torch.arange(len(tokens)) >= len(tokens) - len(pieces)
        trust = torch.ones(len(tokens)).masked_fill(is_piece, 1.0 if teacher else SNIPPET_TRUST)
        batches = plan(np.array([len(text) for text in tokens]), kinds, recipe, settings)
        steps = settings.epochs * len(batches[0])
        optimizer = torch.optim.AdamW(
            _groups(network.rates(recipe.layer_decay), recipe), lr=recipe.learning_rate, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.rate((step + 1) / (steps + 1))
        )
        reader = fit.Player("sentiment", network, loss, optimizer, schedule, AVERAGE_DECAY)

        def batch_of(indices: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
            limit = recipe.limit(progress)
            chosen = padded([shorten(tokens[row], limit) for row in indices]).to(device)
            told, asked = truth[indices].to(device), is_piece[indices].to(device)
            if teacher and asked.any():
                told[asked] = teacher.answers(chosen[asked], settings.precision)
            return hide_words(chosen, hidden_by), told, trust[indices].to(device)

        curve = cut_up(tokenizer, corpus.calibration), cut_up(tokenizer, corpus.long_calibration)

        def score() -> dict[str, float]:
            with fit.autocasting(settings.precision, device):
                said = answers(reader.averaged, curve[0], device).argmax(1).numpy()
                long_said = answers(reader.averaged, curve[1][:CURVE_REVIEWS], device).argmax(1).numpy()
            return {
                "accuracy": float(np.mean(said == corpus.calibration.labels)),
                "imdb_accuracy": float(np.mean(long_said == corpus.long_calibration.labels[:CURVE_REVIEWS])),
            }

        story = fit.fit(
            [reader],
            examples=len(tokens),
            batch_of=batch_of,
            score=score,
            settings=settings,
            out=run.out,
            identity={
                **run.identity(settings, recipe),
                "teacher": teacher.card["weights"]["sha256"] if teacher else None,
            },
            resume=run.resume,
            batches=batches,
        )
        if fit.process_rank() != 0:
            return {}
        training = card.training_facts(run, settings, story, network)
        if teacher:
            training["teacher"] = teacher.card["training"]["command"]
        facts = _write_up(run, reader.averaged, corpus, tokenizer_file, training)
        card.draw_curve(story.epochs, "accuracy", run.out / "learning_curve.png")
        return facts


def average(run: fit.Run, folders: Sequence[Path]) -> dict[str, Any]:
    """Keep the mean of finished runs' weights, score it, and leave both in `run.out`.

    Runs that start from the same pretrained weights, if not from the same new layers, end in
    one valley, and its middle tells more texts right than its slopes do (Wortsman et al.,
    *Model soups*, 2022).

    Args:
        run: As the runs were, but for `out`; `averaged` has their seeds.
        folders: Of the runs, which differ in nothing but their seed.

    Returns:
        The card.

    Raises:
        TrainingError: a run is missing or damaged.
    """
    networks, cards = zip(*map(card.read_checkpoint, folders), strict=True)
    corpus = load_corpus(run.data, verify=run.verify, holdout=run.holdout)
    mean: nn.Module = ARCHITECTURES[run.arch]()
    states = [network.state_dict() for network in networks]
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    minutes = sum(facts["training"]["minutes"] for facts in cards)
    training = card.training_facts(run, _settings(run), fit.Story(minutes=minutes), mean)
    training["seeds"] = list(run.averaged)
    training |= {name: told for name, told in cards[0]["training"].items() if name == "teacher"}
    tokenizer_file = load_minilm(run.data, TOKENIZER, verify=run.verify)
    return _write_up(run, mean.to(run.device), corpus, tokenizer_file, training)


def _settings(run: fit.Run) -> fit.Settings:
    """The recipe's, unless the command line says otherwise."""
    recipe = RECIPES[run.arch]
    return fit.Settings(
        epochs=run.epochs or recipe.epochs,
        batch_size=run.batch_size or recipe.batch_size,
        seed=run.seed,
        device=run.device,
        precision=recipe.precision if run.precision == "auto" else run.precision,
    )


def _write_up(
    run: fit.Run, network: nn.Module, corpus: Corpus, tokenizer_file: bytes, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Find the temperature, score the network, and leave it, its card and a picture in `run.out`.

    Returns:
        The card.
    """
    device = next(network.parameters()).device
    tokenizer = load_tokenizer(tokenizer_file)
    calibrating = corpus.calibration + corpus.long_calibration
    heat = fit_temperature(answers(network, cut_up(tokenizer, calibrating), device), calibrating.labels)
    questions = corpus.questions + corpus.long_questions
    probabilities = answers(head(network, {"temperature": heat}), cut_up(tokenizer, questions), device)
    asked = f"{run.holdout} sentences of SST-2 train" if run.holdout else "SST-2 dev"
    facts = {
        "model": SENTIMENT.name,
        "arch": run.arch,
        "task": SENTIMENT.task,
        "labels": list(LABELS),
        "scores": scores([probabilities.numpy()], truth_of(corpus)),
        "temperature": heat,
        "data": {
            "name": DATA if run.verify else "own texts",
            "sha256": questions.sha256,
            "split": f"{asked} and {len(corpus.long_questions):,} reviews held back from IMDB train",
        },
        "training": training,
        "licence": "Apache-2.0, as MiniLM's; SST-2 (Socher et al.) and IMDB (Maas et al.) state none",
        "intended_use": "Opinions in English: a sentence, a comment, a review.",
        "limits": (
            "Learnt from film reviews. Every text gets one of two answers, also one that states a "
            "fact, is of two minds or is not in English; irony is often missed. Of more than 512 word "
            "pieces the first 128 and the last 384 are read."
        ),
    }
    card.write_checkpoint(run.out, network, facts, {TOKENIZER: tokenizer_file})
    counts = np.zeros((len(LABELS), len(LABELS)), np.int64)
    np.add.at(counts, (questions.labels, probabilities.argmax(1).numpy()), 1)
    card.draw_confusion(counts, LABELS, run.out / "confusion_matrix.png")
    return facts


def _groups(rates: Sequence[tuple[nn.Module, float]], recipe: Recipe) -> list[dict[str, Any]]:
    """What learns, at its rate: matrices decay; biases and normalisation, which have one axis, do not."""
    groups = []
    for module, rate in rates:
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for is_matrix, weight_decay in ((True, recipe.weight_decay), (False, 0.0)):
            chosen = [parameter for parameter in learning if (parameter.ndim > 1) == is_matrix]
            groups.append({"params": chosen, "lr": recipe.learning_rate * rate, "weight_decay": weight_decay})
    return groups
