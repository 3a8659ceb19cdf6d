"""The sentiment story: data held apart, batches by length, two networks that learn, resume and export."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertModel

from export.to_onnx import to_onnx
from service.models.sentiment import PADDING, SENTIMENT, TOKENIZER
from service.runtime import Network
from training import sentiment
from training.__main__ import main
from training.card import read_assets, read_checkpoint
from training.errors import TrainingError
from training.fit import RESUME_POINT, Settings

from ..texts import tokenizer_file, vocabulary_size, write_texts

TINY = BertConfig(
    vocab_size=vocabulary_size(),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=512,
    attention_probs_dropout_prob=0.0,
)

every_architecture = pytest.mark.parametrize("arch", sentiment.ARCHITECTURES)


@pytest.fixture(autouse=True)
def pocket_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks, small enough for a suite."""
    pocket = {
        "transformer": lambda: sentiment.Transformer(TINY),
        "gru": lambda: sentiment.Gru(vocabulary_size(), width=16, hidden=16),
    }
    for arch, network in pocket.items():
        monkeypatch.setitem(sentiment.ARCHITECTURES, arch, network)
        faster = {"learning_rate": 3e-3 if arch == "transformer" else 1e-2, "layer_decay": 1.0}
        recipe = sentiment.RECIPES[arch]
        monkeypatch.setitem(sentiment.RECIPES, arch, dataclasses.replace(recipe, precision="fp32", **faster))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with three small data sets in their publishers' layouts."""
    home = tmp_path_factory.mktemp("texts")
    write_texts(home)
    torch.manual_seed(0)
    weights = BertModel(TINY).state_dict()
    safetensors.torch.save_file(weights, home / "all-MiniLM-L6-v2" / sentiment.WEIGHTS)
    return home


def train(folder: Path, out: Path, arch: str, *options: str) -> int:
    """`python -m training sentiment` on the small data."""
    command = ["sentiment", "--own-data", "--arch", arch, "--data", str(folder), "--out", str(out)]
    return main([*command, "--batch-size", "8", *options])


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where `run_of` keeps what it trained."""
    return {}


def run_of(arch: str, folder: Path, runs: dict[str, Path]) -> Path:
    """A finished run of five epochs, trained once."""
    if arch not in runs:
        out = folder.parent / f"run-{arch}"
        assert train(folder, out, arch, "--epochs", "5") == 0
        runs[arch] = out
    return runs[arch]


@every_architecture
def test_a_run_learns_and_its_exam_gives_the_scores_of_its_card(
    arch: str, folder: Path, runs: dict[str, Path]
) -> None:
    out = run_of(arch, folder, runs)
    network, card = read_checkpoint(out)
    assert card["scores"]["accuracy"] > 0.8
    assert card["scores"]["imdb_accuracy"] > 0.8
    assert 0 <= card["scores"]["expected_calibration_error"] < 0.5
    assert read_assets(out, card) == {TOKENIZER: tokenizer_file()}
    exam = sentiment.exam(folder, card)
    answers = sentiment.head(network, card).eval()
    with torch.inference_mode():
        batches = [
            answers(torch.from_numpy(exam.batch(slice(start, start + exam.batch_size))[0])).numpy()
            for start in range(0, len(exam), exam.batch_size)
        ]
    outputs = [np.concatenate(batches)]
    assert exam.score(outputs, exam.truth) == pytest.approx(card["scores"], abs=1e-4)
    for picture in ("confusion_matrix.png", "learning_curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@every_architecture
def test_a_broken_off_run_goes_on_as_if_nothing_had_happened(
    arch: str, folder: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(arch, folder, runs)
    steps = 0
    usual = sentiment.loss

    def breaks(network: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == half:
            raise KeyboardInterrupt
        return usual(network, batch)

    monkeypatch.setattr(sentiment, "loss", breaks)
    half = _steps(folder, arch) * 3 // 2
    assert train(folder, tmp_path, arch, "--epochs", "5") == 130
    assert (tmp_path / RESUME_POINT).exists()
    monkeypatch.setattr(sentiment, "loss", usual)
    assert train(folder, tmp_path, arch, "--epochs", "5", "--resume") == 0
    first, second = (read_checkpoint(out)[0].state_dict() for out in (whole, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _steps(folder: Path, arch: str) -> int:
    """Batches in an epoch of the small data."""
    tokenizer = sentiment.load_tokenizer(tokenizer_file())
    corpus = sentiment.load_corpus(folder, verify=False)
    parts = [corpus.sentences, corpus.phrases, corpus.reviews, sentiment.snippets(corpus.reviews)]
    lengths = np.array([len(text) for part in parts for text in sentiment.cut_up(tokenizer, part)])
    plan = sentiment.plan(lengths, list(map(len, parts)), sentiment.RECIPES[arch], Settings(5, 8))
    return len(plan[0])


@every_architecture
def test_the_exported_graph_answers_like_torch_at_every_length_and_batch(
    arch: str, folder: Path, runs: dict[str, Path]
) -> None:
    network, card = read_checkpoint(run_of(arch, folder, runs))
    answers = sentiment.head(network, card).eval()
    graph = to_onnx(answers, SENTIMENT)
    session = onnxruntime.InferenceSession(graph)
    chance = np.random.default_rng(0)
    for length in (1, 2, 17, 128, 512):
        for count in (1, 2, 7):
            tokens = chance.integers(1, vocabulary_size(), (count, length))
            for row in range(1, count):
                tokens[row, max(1, length - 3 * row) :] = PADDING
            with torch.inference_mode():
                expected = answers(torch.from_numpy(tokens)).numpy()
            (found,) = session.run(None, {"tokens": tokens})
            np.testing.assert_allclose(found, expected, atol=1e-5)
    room = SENTIMENT.furnish({TOKENIZER: tokenizer_file()})
    samples = [room.to_tensor({"text": text}) for text in (b"lovely", b"the film is dull " * 60)]
    together = Network(room, graph).run(samples)
    for sample, row in zip(samples, together, strict=True):
        ((alone,),) = Network(room, graph).run([sample])
        np.testing.assert_allclose(row[0], alone, atol=1e-5)


@every_architecture
def test_an_answer_does_not_depend_on_its_neighbours_nor_on_padding(arch: str) -> None:
    torch.manual_seed(1)
    network = sentiment.ARCHITECTURES[arch]().eval()
    texts = [np.arange(4, 4 + length) for length in (1, 3, 40, 9)]
    with torch.inference_mode():
        together = network(sentiment.padded(texts))
        for row, text in enumerate(texts):
            torch.testing.assert_close(together[row], network(sentiment.padded([text]))[0], atol=1e-5, rtol=0)
        # A server may fill a batch up with rows of padding alone.
        assert network(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


def test_both_forms_of_attention_give_the_same() -> None:
    torch.manual_seed(2)
    network = sentiment.Transformer(TINY).eval()
    tokens = sentiment.padded([np.arange(4, 30), np.arange(4, 9)])
    with torch.inference_mode():
        quick = network(tokens)
        network.bert.set_attn_implementation("eager")
        torch.testing.assert_close(network(tokens), quick, atol=1e-5, rtol=0)


def test_what_is_asked_is_not_learnt_in_another_guise(folder: Path) -> None:
    corpus = sentiment.load_corpus(folder, verify=False, holdout=40)
    learnt = {*corpus.sentences.texts, *corpus.phrases.texts}
    asked = [*corpus.questions.texts, *corpus.calibration.texts]
    assert len(corpus.questions) == 40
    for text in asked:
        words = text.split()
        runs = {
            " ".join(words[start:stop])
            for start in range(len(words))
            for stop in range(start + sentiment.PHRASE_WORDS, len(words) + 1)
        }
        assert not runs & learnt
    held_back = {*corpus.long_questions.texts, *corpus.long_calibration.texts}
    assert not held_back & set(corpus.reviews.texts)
    assert all(len(text.split()) >= sentiment.LONG_WORDS for text in corpus.long_questions.texts)
    again = sentiment.load_corpus(folder, verify=False, holdout=40)
    assert again.questions.sha256 == corpus.questions.sha256


def test_a_sentence_is_what_no_longer_text_holds() -> None:
    texts = ["a good film", "good", "this is a good film .", "good film", "a bad film"]
    assert sentiment.whole_sentences(texts).tolist() == [False, False, True, False, True]


def test_batches_hold_texts_of_one_length_and_no_more_than_they_may() -> None:
    chance = np.random.default_rng(0)
    lengths = np.concatenate(
        [
            chance.integers(5, 40, 200),
            chance.integers(3, 9, 300),
            chance.integers(90, 600, 80),
            chance.integers(12, 60, 400),
        ]
    )
    lengths = np.minimum(lengths, 512)
    recipe = sentiment.RECIPES["transformer"]
    plan = sentiment.plan(lengths, [200, 300, 80, 400], recipe, Settings(epochs=4, batch_size=32))
    assert len(plan) == 4
    assert len({len(batches) for batches in plan}) == 1, "as many batches in every epoch"
    for epoch, batches in enumerate(plan, start=1):
        longest = recipe.limit(epoch / len(plan))
        for batch in batches:
            assert len(batch) <= 32
            # Reviews grow with the rounds, which are not quite the epochs.
            assert len(batch) * min(lengths[batch].max(), longest, recipe.short_tokens) <= recipe.batch_tokens
    shown = torch.cat([torch.cat(batches) for batches in plan])
    times = shown.bincount(minlength=980)
    assert times[:200].max() <= 4, "a sentence once in a round"
    assert times[500:580].max() - times[500:580].min() <= 2
    assert (torch.cat(plan[0]) >= 580).any()
    assert not (torch.cat(plan[-1]) >= 580).any(), "snippets come early"


def test_a_snippet_is_a_few_sentences_of_a_review_with_its_label() -> None:
    review = (
        "A film of few words.<br /><br />It says more with a look than others do in an hour! "
        "Short. "
        + "one two three four five six " * 10
        + ". I would see it again tomorrow, and the day after that, too."
    )
    found = sentiment.snippets(sentiment.Texts(["Too short.", review], np.array([0, 1])))
    assert found.texts == [
        "A film of few words. It says more with a look than others do in an hour!",
        "I would see it again tomorrow, and the day after that, too.",
    ]
    assert found.labels.tolist() == [1, 1]


def test_hidden_words_are_words_and_never_the_first() -> None:
    torch.manual_seed(0)
    tokens = sentiment.padded([np.arange(5, 500), np.arange(5, 100)])
    hidden = sentiment.hide_words(tokens, hidden_by=3)
    changed = hidden != tokens
    assert not changed[:, 0].any()
    assert not changed[tokens == PADDING].any()
    assert (hidden[changed] == 3).all()
    assert 0.05 < changed[0].float().mean() < 0.11


def test_the_mean_of_runs_is_a_network_with_a_card_of_its_own(folder: Path, tmp_path: Path) -> None:
    command = ["--epochs", "2", "--seeds", "3", "4", "--average"]
    assert train(folder, tmp_path, "transformer", *command) == 0
    (first, one), (second, other), (mean, card) = (
        read_checkpoint(tmp_path / name) for name in ("seed3", "seed4", "average")
    )
    for name, value in mean.state_dict().items():
        torch.testing.assert_close(value, (first.state_dict()[name] + second.state_dict()[name]) / 2)
    assert "--seeds 3 4 --average" in card["training"]["command"]
    minutes = one["training"]["minutes"] + other["training"]["minutes"]
    assert card["training"]["minutes"] == pytest.approx(minutes, abs=0.11)
    assert card["scores"].keys() == one["scores"].keys()
    assert card["weights"]["sha256"] not in (one["weights"]["sha256"], other["weights"]["sha256"])
    assert read_assets(tmp_path / "average", card) == {TOKENIZER: tokenizer_file()}


@pytest.mark.parametrize(
    ("arch", "seeds", "message"),
    [
        pytest.param("gru", ["0", "1"], "each start from weights of their own", id="from-nothing"),
        pytest.param("transformer", ["0"], "needs two runs or more", id="one-run"),
        pytest.param("transformer", ["1", "1"], "names one seed twice", id="one-run-twice"),
    ],
)
def test_what_has_no_mean_is_refused_before_anything_is_trained(
    arch: str,
    seeds: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        train(folder, tmp_path, arch, "--average", "--seeds", *seeds)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_pupil_hears_of_snippets_what_its_teacher_says(folder: Path, tmp_path: Path) -> None:
    command = ["--epochs", "2", "--seed", "3"]
    assert train(folder, tmp_path / "teacher", "transformer", "--epochs", "1") == 0
    assert train(folder, tmp_path / "alone", "transformer", *command) == 0
    taught = [*command, "--teacher", str(tmp_path / "teacher")]
    assert train(folder, tmp_path / "pupil", "transformer", *taught) == 0
    (_, teacher), (alone, _), (pupil, card) = (
        read_checkpoint(tmp_path / name) for name in ("teacher", "alone", "pupil")
    )
    assert card["training"]["teacher"] == teacher["training"]["command"]
    assert f"--teacher {tmp_path / 'teacher'}" in card["training"]["command"]
    assert any(not value.equal(pupil.state_dict()[name]) for name, value in alone.state_dict().items())


def test_a_teacher_says_what_its_run_would_answer(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path, "transformer", "--epochs", "1") == 0
    network, card = read_checkpoint(tmp_path)
    tokens = sentiment.padded([np.arange(5, 30), np.arange(5, 15)])
    said = sentiment.Teacher.read(tmp_path, torch.device("cpu")).answers(tokens, "fp32")
    expected = (network(tokens) / card["temperature"]).softmax(1)
    torch.testing.assert_close(said, expected.detach())
    assert not said.requires_grad


def test_a_run_is_not_resumed_without_its_teacher(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, tmp_path / "teacher", "transformer", "--epochs", "1") == 0
    command = ["--epochs", "1", "--out", str(tmp_path / "pupil")]
    assert train(folder, tmp_path, "transformer", *command, "--teacher", str(tmp_path / "teacher")) == 0
    assert train(folder, tmp_path, "transformer", *command, "--resume") == 2
    assert "a run of other settings (teacher)" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    assert train(folder, tmp_path / "pupil", "transformer", "--teacher", str(nowhere)) == 2
    assert str(nowhere) in capsys.readouterr().err


def test_an_architecture_without_snippets_takes_no_teacher(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train(folder, tmp_path, "gru", "--teacher", str(tmp_path))
    assert end.value.code == 2
    assert "learns from labels alone" in capsys.readouterr().err


def test_a_label_is_believed_as_far_as_it_is_trusted() -> None:
    said = torch.tensor([[0.0, 2.0]])
    trusted, doubted, ignored = (
        sentiment.loss(torch.nn.Identity(), (said, torch.tensor([[1.0, 0.0]]), torch.tensor([trust]))).item()
        for trust in (1.0, 0.6, 0.0)
    )
    own = said.softmax(1)
    assert trusted == pytest.approx(-own.log()[0, 0].item())
    assert ignored == pytest.approx(-(own * own.log()).sum().item())
    assert doubted == pytest.approx(0.6 * trusted + 0.4 * ignored)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda home: (home / "SST-2" / "train.tsv").write_text("sentence\tlabel\ngood 1\n"),
            "a sentence, a tab and 0 or 1",
            id="no-tab",
        ),
        pytest.param(
            lambda home: (home / "SST-2" / "train.tsv").write_text("sentence\tlabel\ngood\t7\n"),
            "a sentence, a tab and 0 or 1",
            id="a-label-of-seven",
        ),
        pytest.param(lambda home: (home / "SST-2" / "dev.tsv").unlink(), "dev.tsv", id="no-dev"),
        pytest.param(
            lambda home: (home / "SST-2" / "train.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n"),
            "UTF-8",
            id="not-utf-8",
        ),
        pytest.param(
            lambda home: shutil.rmtree(home / "aclImdb" / "train" / "pos"),
            "in pos and in neg",
            id="no-praise",
        ),
        pytest.param(lambda home: shutil.rmtree(home / "aclImdb"), "aclImdb", id="no-reviews"),
        pytest.param(
            lambda home: (home / "all-MiniLM-L6-v2" / sentiment.WEIGHTS).write_bytes(b"\0" * 50),
            "damaged or another network's",
            id="damaged-weights",
        ),
        pytest.param(
            lambda home: (home / "all-MiniLM-L6-v2" / TOKENIZER).write_text("{}"),
            "not a tokenizer",
            id="no-tokenizer",
        ),
        pytest.param(lambda home: shutil.rmtree(home / "all-MiniLM-L6-v2"), "MiniLM", id="no-minilm"),
    ],
)
def test_data_in_disorder_are_named_in_a_sentence(
    spoil: object, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "data"
    shutil.copytree(folder, home)
    spoil(home)  # type: ignore[operator]
    assert train(home, tmp_path / "run", "transformer", "--epochs", "1") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_holdout_that_leaves_nothing(folder: Path) -> None:
    with pytest.raises(TrainingError, match="lower --holdout 5000"):
        sentiment.load_corpus(folder, verify=False, holdout=5_000)


def test_texts_of_ones_own_are_not_taken_for_the_published_ones(folder: Path) -> None:
    with pytest.raises(TrainingError, match="not the published SST-2"):
        sentiment.load_sst2(folder, "train")
