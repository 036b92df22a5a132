"""A loss or gradient that really overflows ends training on all processes, and leaves the texts to look at."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.training import checkpoint
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from tests.starts import Start, free_port, start_all
from tests.training.test_resume import EXAMPLES, feed_of, fresh_encoder

CONFIG = {"queries_per_process": 4, "epochs": 2, "max_steps": 12, "log_every_steps": 100, "save_every_steps": 1}


def trained(folder: Path, encoder: Encoder, **optim) -> None:
    config, run = TrainerConfig(**CONFIG), RunFolder(folder)
    feed = feed_of(EXAMPLES, encoder, config.queries_per_process)
    train(encoder, feed, Accelerator(cpu=True), run, config, LossConfig(), OptimConfig(**optim), dict)


def bad_batch(folder: Path) -> dict:
    return json.loads((folder / "bad_batch.json").read_text())


def texts_of(content: dict) -> list[dict]:
    return [text for row in content["queries"] for text in (row["query"], *row["documents"])]


def test_an_absurd_learning_rate_overflows_and_the_last_good_checkpoint_stays(tiny_encoder, tmp_path):
    """The warm-up begins at 0; the second step moves every bias by 1e29, whose square float32 does not hold."""
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    refusal = (
        r"step 3: the loss is nan, the gradient norm nan; lower optim\.learning_rate=1e\+30: no text can be embedded "
        rf"any more\. The batch is in {tmp_path}/bad_batch\.json\. Nothing of this step is saved, and earlier"
    )
    with pytest.raises(InputError, match=refusal):
        trained(tmp_path, encoder, learning_rate=1e30, warmup_steps=1)
    assert [path.name for path in checkpoint.whole_checkpoints(tmp_path / "checkpoints")] == ["step-1", "step-2"]
    stored = load_file(tmp_path / "checkpoints" / "step-2" / "trained.safetensors")
    assert all(values.isfinite().all() for values in stored.values())

    content, batch = bad_batch(tmp_path), feed_of(EXAMPLES, encoder, 4).batch(2, 0)
    drawn = [EXAMPLES[example] for _, example, _ in feed_of(EXAMPLES, encoder, 4).drawn_examples(2, 0)]
    assert (content["step"], content["loss"], content["grad_norm"]) == (3, "nan", "nan")
    assert [row["query"]["text"] for row in content["queries"]] == [example.query for example in drawn]
    assert [[text["text"] for text in row["documents"]] for row in content["queries"]] == [
        [example.positive, *example.hard_negatives] for example in drawn
    ]
    assert [row["query"]["token_ids"] for row in content["queries"]] == batch.queries
    assert [text["token_ids"] for row in content["queries"] for text in row["documents"]] == batch.documents
    assert not any(text["finite"] for text in texts_of(content))


@pytest.mark.parametrize("sharded", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_of_two_processes_the_one_with_the_text_that_overflows_is_named_and_both_end(sharded, tiny_base, tmp_path):
    """One text has a token whose weights are 1e25, which the variance of a norm does not hold. It is short: pre-flight
    tries the longest ones, and would find it. The processes have different numbers of packs.
    """
    base, odd = tmp_path / "base", "§§"
    shutil.copytree(tiny_base("gpt2"), base)
    rows = [{"query": f"what is {n}?", "positive": f"{n} is behind {n - 1}" + n % 5 * " and so on"} for n in range(32)]
    rows[17]["positive"] = odd
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(str(base))
    others = {token for row in rows for text in row.values() if text != odd for token in tokenizer(text).input_ids}
    weights = load_file(base / "model.safetensors")
    for token in set(tokenizer(odd).input_ids) - others:
        weights["wte.weight"][token] *= 1e25
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    arguments = [
        f"model.path={base}", "data.path=pairs.jsonl", "trainer.queries_per_process=4", "trainer.epochs=1",
        "trainer.tokens_per_pack=40", f"trainer.shard_trunk={sharded}",
        "markers.query_max_tokens=24", "markers.document_max_tokens=40",
    ]  # fmt: skip
    ended = start_all("biencoder", tmp_path, {"run": Start(arguments, port=free_port())})["run"]
    assert ended.codes == [2, 2], ended.err
    content = bad_batch(tmp_path / "runs" / "run")
    bad = [text["text"] for text in texts_of(content) if not text["finite"]]
    assert bad == [odd]
    (process,) = {row["process"] for row in content["queries"]}
    assert len(texts_of(content)) == 8  # of that process alone
    said = ended.err.splitlines()[-1]
    assert said.startswith(f"error: step {content['step']}: the loss is nan, the gradient norm nan; lower optim.")
    assert f"or take out what cannot be embedded: 1 of 8 texts on process {process}, {odd!r} for one" in said
