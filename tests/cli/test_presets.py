"""The reference recipes as they are typed, from the original's raw files to an export: only the base is a small one of
the same class.
"""

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.encoder import Encoder
from tests.conftest import random_trunk
from tests.starts import Ended, Start, start_all

# experiment -> family of its base, and tokens of a long document; learning rates and batches: tests/cli/test_configs.py
PRESETS = {
    "nli_125m": ("gpt_neo", 75), "nli_5_8b": ("gptj", 75),
    "msmarco_125m": ("gpt_neo", 299), "msmarco_5_8b": ("gptj", 299),
}  # fmt: skip
POSITIONS = {"gpt_neo": "max_position_embeddings", "gptj": "n_positions"}
NUMBER = 64


def write(file: Path, *lines: str) -> None:
    file.write_text("".join(line + "\n" for line in lines))


def all_nli(folder: Path) -> Path:
    """Each sentence with an entailment and a contradiction."""
    rows = [
        f"train\tnli\tsnli\tA man number {n} is out.\t{second}\t{label}"
        for n in range(NUMBER)
        for second,
        label in ((f"Person {n} is not at home.", "entailment"), (f"Nobody but {n} sleeps in bed.", "contradiction"))
    ]
    write(folder / "AllNLI.tsv", "split\tdataset\tfilename\tsentence1\tsentence2\tlabel", *rows)
    return folder / "AllNLI.tsv"


def ms_marco(folder: Path) -> Path:
    """Query q has passage q for its positive, and two others that two systems mined."""
    write(folder / "collection.tsv", *(f"{n}\tpassage {n} tells what {n} means, at length" for n in range(3 * NUMBER)))
    write(folder / "queries.train.tsv", *(f"{n}\twhat does {n} mean" for n in range(NUMBER)))
    mined = [
        {"qid": n, "pos": [n], "neg": {"bm25": [NUMBER + n], "msmarco-distilbert-base-tas-b": [2 * NUMBER + n]}}
        for n in range(NUMBER)
    ]
    write(folder / "msmarco-hard-negatives.jsonl", *map(json.dumps, mined))
    scores = [{"qid": n, str(n): 9.0, str(NUMBER + n): 1.0, str(2 * NUMBER + n): 2.0} for n in range(NUMBER)]
    write(folder / "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.jsonl", *map(json.dumps, scores))
    return folder


@pytest.fixture(scope="module")
def project(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    (folder / "marco").mkdir()
    all_nli(folder), ms_marco(folder / "marco")
    for family, positions in POSITIONS.items():
        tokenizer = load_tokenizer(str(tiny_base(family)))
        tokenizer.save_pretrained(folder / family)
        random_trunk(family, len(tokenizer), **{positions: 320}).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def starts(project) -> dict[str, Ended]:
    data = {name: "AllNLI.tsv" if name.startswith("nli") else "marco" for name in PRESETS}
    named = {
        name: Start(
            [f"experiment={name}", "debug=tiny", f"model.path={family}", f"data.path={data[name]}", "trainer.threads=1"]
        )
        for name, (family, _) in PRESETS.items()
    }
    return start_all("biencoder", project, named)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_exports(project, starts, name):
    ended, run = starts[name], project / "runs" / name
    assert ended.codes == [0], ended.err
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 4
    encoder, theirs = Encoder.from_pretrained(run / "export"), SentenceTransformer(str(run / "export"), device="cpu")
    text = "passage 7 tells what 7 means " * 100
    assert len(encoder.token_ids([text], "document")[0]) == PRESETS[name][1]
    assert abs(theirs.encode_document([text]) - encoder.encode_documents([text])).max() < 1e-5
