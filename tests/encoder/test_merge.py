"""train/merge.py's arithmetic against numpy in float64, what it writes, and the curve between the base and a model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from peft import AutoPeftModelForFeatureExtraction
from safetensors.torch import load_file

from sgpt.encoder.encoder import Encoder
from sgpt.encoder.merge import bias_change, merge
from sgpt.evaluation.evaluate import EvaluationConfig, evaluate, read_sets
from sgpt.evaluation.strength import MergeConfig, check_merge, read_curve_sets
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, unlock
from sgpt.text.markers import MarkersConfig
from tests.conftest import LIMITS
from tests.starts import forks

TEXTS = ["parse a date", "open a file and read its lines", "x"]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_file(folder / "trained.safetensors").items()}


def base_encoder(base: Path) -> Encoder:
    return Encoder.from_pretrained(base, markers=MarkersConfig("brackets", **LIMITS))


def base_value(base: Path, name: str, like: np.ndarray) -> np.ndarray:
    """Zeros for a bias that the base has not."""
    value = dict(base_encoder(base).trunk.named_parameters()).get(name)
    return (np.zeros_like(like) if value is None else value.detach().numpy()).astype(np.float64)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.3], [0.7, 0.0]])
@pytest.mark.parametrize("family", ["gpt_neo", "qwen3"])
def test_a_merge_is_the_weighted_sum_of_changes_rounded_once(family, weights, tiny_delta, tiny_base, tmp_path):
    folders = [tiny_delta(family, 1), tiny_delta(family, 2)]
    merge([str(folder) for folder in folders], weights, tmp_path / "merged")
    (one, two), merged = map(tensors, folders), tensors(tmp_path / "merged")
    assert merged.keys() == one.keys()
    for name in list(merged)[:6]:
        base = base_value(tiny_base(family), name, one[name])
        expected = base + weights[0] * (one[name].astype(np.float64) - base)
        expected += weights[1] * (two[name].astype(np.float64) - base)
        assert np.array_equal(merged[name], expected.astype(np.float32)), name
    opened = Encoder.from_pretrained(tmp_path / "merged").encode_queries(TEXTS)
    encoder = base_encoder(tiny_base(family))
    encoder.load_delta("merged", tmp_path / "merged")
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="merged"), opened)
    if not weights[1]:
        encoder.load_delta("first", folders[0])
        assert np.array_equal(encoder.encode_queries(TEXTS, delta="first", strength=0.7), opened)


def test_tensors_that_only_one_model_trained_are_merged_with_the_bases(tiny_delta, tiny_base, tmp_path):
    """Biases alone in one, gains of norms as well in the other; and stock PEFT opens the result."""
    one, two = tiny_delta("llama", 1), tiny_delta("llama", 2, "bitfit_norm")
    merge([str(one), str(two)], [0.5, 0.5], tmp_path / "merged")
    merged, gain = tensors(tmp_path / "merged"), "layers.0.input_layernorm.weight"
    base = base_value(tiny_base("llama"), gain, merged[gain])
    expected = (base + 0.5 * (tensors(two)[gain].astype(np.float64) - base)).astype(np.float32)
    assert np.array_equal(merged[gain], expected)
    stock = dict(AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "merged").named_parameters())
    norm = f"base_model.model.{gain.removesuffix('.weight')}.modules_to_save.default.weight"
    assert np.array_equal(stock[norm].detach().numpy(), expected)


def test_one_model_with_weight_one_is_itself_bit_for_bit(tiny_delta, tmp_path):
    folder = tiny_delta("gpt_neo", 1)
    merge([str(folder)], [1.0], tmp_path / "merged")
    merged, own = tensors(tmp_path / "merged"), tensors(folder)
    assert all(np.array_equal(merged[name], value) for name, value in own.items())


def test_models_trained_over_a_rounded_base_merge_in_any_order(tiny_delta, tmp_path):
    folders = [tiny_delta("gpt_neo", 1, dtype="bfloat16"), tiny_delta("gpt_neo", 2)]
    both = [merge(order, [0.5, 0.5], tmp_path / str(number)) for number, order in enumerate((folders, folders[::-1]))]
    for name, (_, merged) in both[0].items():
        np.testing.assert_allclose(merged.numpy(), both[1][name][1].numpy(), rtol=0, atol=1e-6)


def test_what_cannot_be_merged_is_refused_in_a_sentence(tiny_delta, tmp_path):
    one = str(tiny_delta("gpt_neo", 1))
    output = tmp_path / "merged"
    refused = [
        (tiny_delta("gpt_neo", 2, pooling="mean"), r"cannot be merged: pooling is 'weighted_mean' and 'mean'"),
        (tiny_delta("gpt_neo", 2, document_max_tokens=30), r"merged: markers\.document_max_tokens is 40 and 30"),
        (tiny_delta("gpt_neo", 2, markers="none"), r"merged: markers\.name is 'brackets' and 'none'; merge models"),
        (tiny_delta("gpt2", 1), r"made from .*, and this GPTNeoModel in torch\.float32 is another"),
        (tiny_delta("gpt_neo", 1, "full"), r"it changes the matrix \S+; open it alone"),
        (tiny_delta("gpt_neo", 1, "lora"), r"it is of low rank"),
        (tmp_path / "nothing", r"nothing"),
    ]
    for other, sentence in refused:
        with pytest.raises(InputError, match=sentence):
            merge([one, str(other)], [0.5, 0.5], output)
    with pytest.raises(InputError, match=r"output=.* is one of the models; choose another folder"):
        merge([one], [0.5], Path(one))
    with pytest.raises(InputError, match=r"is an adapter that was trained, not merged; choose another folder"):
        merge([one], [0.5], tiny_delta("gpt_neo", 2))
    taken = lock(output)  # as another process that merges into it
    with pytest.raises(InputError, match=r"another process is writing to it; wait until that ends, or set output="):
        merge([one], [0.5], output)
    unlock(taken)
    assert not output.exists()
    for weight in (0.5, 0.4):  # an earlier merge is replaced
        merge([one], [weight], output)
    assert json.loads((output / "merge.json").read_text()) == {"models": [one], "weights": [0.4]}


def test_the_change_is_shown_by_module_and_block(tiny_delta, tiny_base, tmp_path):
    folder = tiny_delta("gpt_neo", 1)
    change = bias_change(merge([str(folder)], [1.0], tmp_path / "merged"))
    name = "h.1.mlp.c_fc.bias"
    moved = tensors(folder)[name] - base_value(tiny_base("gpt_neo"), name, tensors(folder)[name])
    assert change["mlp.c_fc"][1] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-6)
    assert change["ln_f"].keys() == {None}
    assert len(change) == 6  # two norms, three layers with biases in a block, the last norm


@pytest.fixture(scope="module")
def test_sets(tmp_path_factory) -> dict[str, Path]:
    """A BEIR folder, "toy", and a file of scored pairs, "pairs"."""
    folder = tmp_path_factory.mktemp("sets") / "toy"
    (folder / "qrels").mkdir(parents=True)
    words = ["date", "file", "list", "path", "text", "name", "line", "byte"]
    lines = [json.dumps({"_id": f"d{n}", "text": f"how to parse a {word}"}) for n, word in enumerate(words)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": f"q{n}", "text": f"read one {word}"}) for n, word in enumerate(words)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(len(words)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    pairs = folder.with_name("pairs.jsonl")
    rows = []
    for score, (one, two) in enumerate(zip(words, reversed(words), strict=True)):
        rows.append(json.dumps({"sentence1": f"a {one}", "sentence2": f"the {two}", "score": score}))
    pairs.write_text("\n".join(rows) + "\n")
    return {"toy": folder, "pairs": pairs}


def test_the_script_merges_and_draws_the_curve_between_base_and_model(tiny_delta, tiny_base, test_sets, tmp_path):
    folders = [tiny_delta("gpt_neo", 1), tiny_delta("gpt_neo", 2)]
    done = forks(tmp_path)(
        "merge", f"models=[{folders[0]},{folders[1]}]", "weights=[0.8,-0.2]", "output=merged", "curve=true", "steps=3",
        f"retrieval=[{test_sets['toy']}]", f"sts=[{test_sets['pairs']}]",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.count("(general)") == 1
    merged = tmp_path / "merged"
    with open(merged / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strength"] for row in rows] == ["0.0", "0.5", "1.0"]
    sets = read_sets(EvaluationConfig(retrieval=[str(test_sets["toy"])], sts=[str(test_sets["pairs"])]))
    for row, encoder in ((rows[0], base_encoder(tiny_base("gpt_neo"))), (rows[2], Encoder.from_pretrained(merged))):
        for name, metrics in evaluate(encoder, sets).items():
            for metric, value in metrics.items():
                assert float(row[f"{name} {metric}"]) == value
    for picture in ("curve.png", "bias_change.png"):
        assert (merged / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, r"set models=\[<run or adapter>,…\] and output=<folder>"),
        ({"models": ["a", "b"], "weights": [1.0], "output": "x"}, r"weights has 1 numbers for 2 models"),
        ({"models": ["a"], "weights": [float("nan")], "output": "x"}, r"weights=nan must be a number"),
        ({"models": ["a"], "output": "x", "curve": True}, r"curve=true scores nothing; set retrieval="),
        ({"models": ["a"], "output": "x", "sts": ["y"]}, r"sts=\['y'\] has no effect without curve=true"),
        ({"models": ["a"], "output": "x", "split": "dev"}, r"split=dev has no effect without curve=true"),
        ({"models": ["a"], "output": "x", "steps": 5}, r"steps=5 has no effect without curve=true"),
        ({"models": ["a"], "output": "x", "curve": True, "steps": 1}, r"steps=1 must be from 2 to 101"),
    ],
)
def test_a_request_that_says_too_little_is_told_what_to_set(keys, sentence):
    with pytest.raises(InputError, match=sentence):
        check_merge(MergeConfig(**keys))


def test_a_general_set_that_is_not_scored_is_refused(test_sets):
    config = MergeConfig(["a"], output="x", curve=True, retrieval=[str(test_sets["toy"])], general=["squad"])
    with pytest.raises(InputError, match=r"general=squad: no set has that name; they are toy"):
        read_curve_sets(config)
