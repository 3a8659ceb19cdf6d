"""A pocket-size tokenizer of BERT's kind, and made-up opinions that it can read."""

import itertools
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
GOOD = ("good", "warm", "funny", "lovely", "brilliant", "moving")
BAD = ("bad", "dull", "stupid", "tired", "clumsy", "empty")
THINGS = ("film", "plot", "cast", "music", "ending", "story", "script", "scene")
OTHERS = (
    "the",
    "a",
    "is",
    "was",
    "and",
    "it",
    "n",
    "does",
    "doesn",
    "t",
    "very",
    "this",
    "word",
    "pad",
    "quoted",
)
PUNCTUATION = tuple(".,!?'\"`()[]<>/-")


def tokenizer_file() -> bytes:
    """A `tokenizer.json` with a vocabulary of some dozens; what it lacks is [UNK]."""
    pieces = (*SPECIAL, *GOOD, *BAD, *THINGS, *OTHERS, *PUNCTUATION, "##s", "##ly")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As the published file is: cut at and filled up to 128, which the room must undo.
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    content = tokenizer.to_str()
    json.loads(content)
    return content.encode()


def vocabulary_size() -> int:
    """How many word pieces the tokenizer knows."""
    return int(Tokenizer.from_str(tokenizer_file().decode()).get_vocab_size())


def opinions(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Different short sentences and their labels, 0 negative and 1 positive, half of each."""
    sentences = [
        (f"the {thing} {verb} {adverb}{word} and the {other} is {word}", label)
        for thing, other, verb, adverb in itertools.product(THINGS, THINGS, ("is", "was"), ("", "very "))
        for label, words in enumerate((BAD, GOOD))
        for word in words
    ]
    random.Random(seed).shuffle(sentences)
    halves = [[one for one in sentences if one[1] == label][: count // 2] for label in (0, 1)]
    return [one for pair in zip(*halves, strict=True) for one in pair]


def reviews(count: int, sentences: int, seed: int = 1) -> list[tuple[str, int]]:
    """Different long texts of one opinion each, with HTML's line breaks."""
    stock = opinions(1_000, seed)
    chance = random.Random(seed)
    found = []
    for number in range(count):
        label = number % 2
        chosen = chance.sample([text for text, said in stock if said == label], sentences)
        found.append((".<br /><br />".join(chosen) + ".", label))
    return found


def write_texts(home: Path) -> None:
    """SST-2, IMDB's train half and MiniLM's tokenizer, all small, in their publishers' layouts."""
    treebank = home / "SST-2"
    treebank.mkdir()
    sentences = opinions(360)
    phrases = [(" ".join(text.split()[:4]), label) for text, label in sentences[60:]]
    for name, rows in (("train", [*sentences[60:], *dict(phrases).items()]), ("dev", sentences[:60])):
        lines = [f"{text} \t{label}" for text, label in rows]
        (treebank / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    for name in ("neg", "pos"):
        (home / "aclImdb" / "train" / name).mkdir(parents=True)
    for number, (text, label) in enumerate(reviews(96, sentences=26)):
        path = home / "aclImdb" / "train" / ("neg", "pos")[label] / f"{number}_{9 if label else 2}.txt"
        path.write_text(text)
    minilm = home / "all-MiniLM-L6-v2"
    minilm.mkdir()
    (minilm / "tokenizer.json").write_bytes(tokenizer_file())
