"""USEB against loops that follow its definitions and scikit-learn's average precision, on files in its own layout."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from sgpt.data.test_sets.useb import read_useb
from sgpt.evaluation.useb import useb
from sgpt.runtime.errors import InputError

CHANCE = random.Random(0)
WORDS = [
    "open", "read", "write", "sort", "join", "count", "file", "list", "date", "path", "disk", "user", "boot", "sound"
]
FORUMS = ["android", "tex"]


def text() -> str:
    return " ".join(CHANCE.sample(WORDS, CHANCE.randint(3, 7)))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data-eval")
    for name in ("askubuntu", "cqadupstack", "twitterpara", "scidocs"):
        (folder / name).mkdir()
    ids = [str(number) for number in range(100, 160)]
    (folder / "askubuntu" / "text_tokenized.txt").write_text(
        "".join(f"{name}\t{text()}\tbody of {name}\n" for name in ids)
    )
    for split in ("dev", "test"):
        lines = []
        for query in ids[:8]:
            found = CHANCE.sample(ids[8:], 20)
            similar = [*CHANCE.sample(found, 4), "159"] if query != "103" else []
            scores = " ".join(str(round(CHANCE.uniform(1, 30), 2)) for _ in found)
            lines.append(f"{query}\t{' '.join(dict.fromkeys(similar))}\t{' '.join(found)}\t{scores}\n")
        (folder / "askubuntu" / f"{split}.txt").write_text("".join(lines))
    corpus = {forum: {f"{forum}{number}": f"{text()} {number}" for number in range(150)} for forum in FORUMS}
    judged = {
        forum: {
            f"{forum}{number}": CHANCE.sample([f"{forum}{other}" for other in range(12, 150)], 3)
            for number in range(12)
        }
        for forum in FORUMS
    }
    (folder / "cqadupstack" / "corpus.json").write_text(json.dumps(corpus))
    (folder / "cqadupstack" / "retrieval_split.json").write_text(json.dumps({"valid": judged, "test": judged}))
    papers = {
        f"p{number}": {"title": f"{text()} {number}" if number % 9 else CHANCE.choice([None, ""])}
        for number in range(80)
    }
    kinds = {
        kind: {
            f"p{number}": {f"p{other}": int(place < 3) for place, other in enumerate(CHANCE.sample(range(20, 80), 12))}
            for number in range(10)
        }
             for kind in ("cite", "cocite", "coview", "coread")}  # fmt: skip
    (folder / "scidocs" / "data.json").write_text(json.dumps({"corpus": papers, "valid": kinds, "test": kinds}))
    (folder / "twitterpara" / "Twitter_URL_Corpus_test.txt").write_text("".join(
        f"{text()} {number}\t{text()}\t({CHANCE.randint(0, 6)}, 6)\thttps://t.co/x\n" for number in range(60)))
    (folder / "twitterpara" / "test.data").write_text("".join(
        f"{number}\ttopic\t{text()} {number}\t{text()}\t{CHANCE.randint(0, 5)}\ttag\ttag\n" for number in range(60)))
    (folder / "twitterpara" / "test.label").write_text("")
    return folder


@pytest.fixture(scope="module")
def found(data, tiny_encoder):
    encoder = tiny_encoder(markers="none")
    return useb(encoder, read_useb(data, "test")), lambda texts: encoder.encode_queries(texts, normalize=True)


def test_askubuntu_is_the_mean_precision_at_its_similar_questions(data, found):
    """USEB's definition: precision at each similar candidate, averaged over those among the twenty; queries without any
    are left out.
    """
    results, embed = found
    titles = dict(line.split("\t")[:2] for line in (data / "askubuntu" / "text_tokenized.txt").read_text().splitlines())
    rows = []
    for line in (data / "askubuntu" / "test.txt").read_text().splitlines():
        query, similar, names, _ = line.split("\t")
        if not similar:
            continue
        names = names.split()
        scores = embed([titles[name] for name in names]) @ embed([titles[query]])[0]
        hits = [name in similar.split() for _, name in sorted(zip(-scores, names, strict=True))]
        precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        rows.append((np.mean(precisions), hits[0], sum(hits[:5]) / 5, 1 / (hits.index(True) + 1)))
    assert len(rows) == 7
    assert list(results["useb_askubuntu"].values()) == pytest.approx(np.mean(rows, axis=0).tolist())
    assert list(results["useb_askubuntu"]) == ["map", "p@1", "p@5", "mrr"]


def test_cqadupstack_is_scikit_learns_average_precision_of_a_hundred_results(data, found):
    results, embed = found
    corpus, judged = (
        json.loads((data / "cqadupstack" / f"{name}.json").read_text()) for name in ("corpus", "retrieval_split")
    )
    forums, gains = [], []
    for forum, relevant in judged["test"].items():
        names = [name for name in corpus[forum] if name not in relevant]  # 138: some are past the hundredth
        documents = embed([corpus[forum][name] for name in names])
        rows, ndcgs = [], []
        for query, wanted in relevant.items():
            scores = documents @ embed([corpus[forum][query]])[0]
            best = np.argsort(-scores)[:100]
            hits = [names[row] in wanted for row in best]
            rows.append(average_precision_score(hits, scores[best]) if any(hits) else 0)
            ndcgs.append(
                sum(
                    hit / np.log2(place + 2) for place, hit in enumerate(hits[:10])
                ) / sum(1 / np.log2(place + 2) for place in range(3))
            )
        forums.append(np.mean(rows))
        gains.append(np.mean(ndcgs))
    assert results["useb_cqadupstack"] == pytest.approx({"map@100": np.mean(forums), "ndcg@10": np.mean(gains)})


def test_twitterpara_is_scikit_learns_average_precision_without_the_undecided(data, found):
    results, embed = found
    aps, spearmans = [], []
    for file, columns in (("Twitter_URL_Corpus_test.txt", (0, 1, 2)), ("test.data", (2, 3, 4))):
        rows = [
            [line.split("\t")[column] for column in columns]
            for line in (data / "twitterpara" / file).read_text().splitlines()
        ]
        labels = np.array([int(label.strip("(").split(",")[0]) for *_, label in rows])
        cosines = (embed([first for first, *_ in rows]) * embed([second for _, second, _ in rows])).sum(1)
        decided = labels != 3
        aps.append(average_precision_score(labels[decided] > 3, cosines[decided]))
        spearmans.append(spearmanr(labels, cosines).statistic)
    assert results["useb_twitterpara"] == pytest.approx(
        {"ap": np.mean(aps), "spearman": np.mean(spearmans), "ap_twitterurl": aps[0], "ap_pit": aps[1]}
    )


def test_scidocs_counts_papers_without_a_title_as_not_found(data, found):
    results, embed = found
    content = json.loads((data / "scidocs" / "data.json").read_text())
    titles = {name: paper["title"] for name, paper in content["corpus"].items()}
    kinds = {}
    for kind, qrels in content["test"].items():
        rows = []
        for query, judged in qrels.items():
            if not titles[query]:
                continue
            names = [name for name in judged if titles[name]]
            scores = embed([titles[name] for name in names]) @ embed([titles[query]])[0]
            hits = [judged[name] for _, name in sorted(zip(-scores, names, strict=True))]
            rows.append(sum(sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit) / 3)
        kinds[kind] = np.mean(rows)
    assert results["useb_scidocs"]["map"] == pytest.approx(np.mean(list(kinds.values())))
    assert {kind: results["useb_scidocs"][f"map_{kind}"] for kind in kinds} == pytest.approx(kinds)
    assert results["useb_scidocs"]["map"] < results["useb_scidocs"]["ndcg"] < 1


def test_the_mean_of_the_four_is_there_when_the_four_are(data, found, tiny_encoder):
    results, _ = found
    main = [
        results["useb_askubuntu"]["map"], results["useb_cqadupstack"]["map@100"], results["useb_twitterpara"]["ap"],
        results["useb_scidocs"]["map"]
    ]
    assert results["useb"] == {"average_precision": pytest.approx(np.mean(main))}
    assert "useb" not in useb(tiny_encoder(markers="none"), read_useb(data, "test")[:3])


def test_dev_is_what_useb_calls_valid_and_twitterpara_has_none(data):
    assert [task.name for task in read_useb(data, "dev")] == ["askubuntu", "cqadupstack", "scidocs"]
    assert read_useb(data, "dev")[0].parts[0].candidates != read_useb(data, "test")[0].parts[0].candidates


@pytest.mark.parametrize(("file", "content", "message"), [
    ("askubuntu/test.txt", "100\t101\t102 103\n", r"test\.txt, line 1: 3 tab-separated fields, 4 are needed"),
    ("askubuntu/test.txt", "100\t102\t102 103\t1.5\n", r"test\.txt, line 1: 2 candidates and 1 scores"),
    ("askubuntu/test.txt", "100\t102\t102 103\t1.5 high\n", r"test\.txt, line 1: score 'high' is no number"),
    (
        "askubuntu/test.txt", "100\t102\t102 999\t1.5 1\n",
        r"test\.txt, line 1: question id '999' is not in .*text_tokenized\.txt"
    ),
    ("askubuntu/text_tokenized.txt", None, r"text_tokenized\.txt: no such file; the task needs it"),
    (
        "cqadupstack/retrieval_split.json", '{"valid": {}}',
        r"retrieval_split\.json: expected an object with 'test' in it"
    ),
    ("cqadupstack/retrieval_split.json", '{"test": {"tex": {"x": []}}}', r"query id 'x' of tex is not in corpus\.json"),
    ("cqadupstack/corpus.json", "{", r"corpus\.json, line 1: not JSON \(.*\); take it from data-eval.zip again"),
    ("scidocs/data.json", '{"corpus": {}}', r"data\.json: has no 'test'; it has corpus"),
    ("twitterpara/test.data", "1\tt\ta\tb\t(4, 5)\n", r"test\.data, line 1: label '\(4, 5\)' is not of the form 4"),
    (
        "twitterpara/Twitter_URL_Corpus_test.txt", "a\tb\t4\n",
        r"Twitter_URL_Corpus_test\.txt, line 1: label '4' is not of the form \(4, 6\)"
    ),
    ("twitterpara/Twitter_URL_Corpus_test.txt", b"\xff\n", r"line 1: not UTF-8 at column 1"),
])  # fmt: skip
def test_broken_files_are_refused_with_their_place(file, content, message, data):
    place = data / file
    whole = place.read_bytes()
    place.unlink() if content is None else place.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    try:
        with pytest.raises(InputError, match=message):
            read_useb(data, "test")
    finally:
        place.write_bytes(whole)


def nodes(value: object) -> list[tuple[dict | list, object]]:
    """(container, key) of everything inside."""
    inside = list(value.items()) if isinstance(value, dict) else list(
        enumerate(value)
    ) if isinstance(value, list) else []
    return [(value, key) for key, _ in inside] + [node for _, part in inside for node in nodes(part)]


@pytest.mark.parametrize("file", ["cqadupstack/corpus.json", "cqadupstack/retrieval_split.json", "scidocs/data.json"])
def test_any_value_in_the_wrong_place_is_refused_or_read_and_scored(file, data, tiny_encoder):
    """What is read is scored, as nothing after the reading may fail."""
    place, chance, refused, read = data / file, random.Random(0), [], 0
    whole = place.read_text()
    try:
        for number in range(60):
            content = json.loads(whole)
            shallow = [node for node in nodes(content) if chance.random() < 0.02 or isinstance(node[0][node[1]], dict)]
            container, key = chance.choice(shallow)
            container[key] = chance.choice(
                [None, 7, "text", [], {}, ["a"], {"a": None}, {"a": {}}, float("nan"), 10**20]
            )
            place.write_text(json.dumps(content))
            try:
                tasks = [task for task in read_useb(data, "test") if task.name == file.split("/")[0]]
            except InputError as error:
                refused.append(str(error).replace(str(data), ""))
            else:
                read += 1
                if number % 10 == 0:
                    useb(tiny_encoder(markers="none"), tasks)
    finally:
        place.write_text(whole)
    assert min(len(refused), read) > 0
    assert all("\n" not in sentence and len(sentence) <= 400 for sentence in refused), refused


def test_a_folder_that_is_none_of_useb_and_a_split_it_does_not_have_are_refused(data, tmp_path):
    with pytest.raises(
        InputError,
        match=r"useb=.*: holds none of askubuntu, cqadupstack, twitterpara, scidocs; give the folder data-eval"
    ):
        read_useb(tmp_path, "test")
    with pytest.raises(InputError, match=r"split=train: USEB has test and dev"):
        read_useb(data, "train")
