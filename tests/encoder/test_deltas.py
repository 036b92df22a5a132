"""Many tuned models over one trunk: mixed batches against each model opened alone, strengths against numpy."""

import shutil
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgpt.decoder.families import family_of
from sgpt.decoder.mixed import mixed
from sgpt.decoder.trunk import takes_packs
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.probes import measure
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from tests.conftest import FAMILIES, LIMITS, save_moved

PACKED = [family for family in FAMILIES if family_of(family).packed]
TEXTS = [
    "parse a date", "", "open a file", "sort a list of names, then print it", "x", "date arithmetic", "close a file",
    "a b", "[brackets] {and} braces", "parse a date", "one more text that is longer than all the others", "é 東 🙂",
]  # fmt: skip
ROWS = [["a", "b", None][number % 3] for number in range(len(TEXTS))]


def base_encoder(family: str, tiny_base, **options) -> Encoder:
    return Encoder.from_pretrained(tiny_base(family), markers=MarkersConfig("brackets", **LIMITS), **options)


def alone(texts: Sequence[str], rows: Sequence[str | None], encoders: dict[str | None, Encoder]) -> np.ndarray:
    """Each text's row of the embeddings that its model gives all texts, opened by itself."""
    embeddings = {name: encoder.encode_queries(texts) for name, encoder in encoders.items()}
    return np.stack([embeddings[name][number] for number, name in enumerate(rows)])


@pytest.mark.parametrize(
    ("family", "tuning"), [*((family, "bitfit_norm") for family in PACKED), ("gpt_neo", "bitfit"), ("qwen3", "bitfit")]
)
def test_a_mixed_batch_is_bit_for_bit_what_each_model_gives_alone(family, tuning, tiny_delta, tiny_base):
    folders = {"a": tiny_delta(family, 1, tuning), "b": tiny_delta(family, 2, tuning)}
    encoder = base_encoder(family, tiny_base)
    for name, folder in folders.items():
        encoder.load_delta(name, folder)
    encoders = {name: Encoder.from_pretrained(folder) for name, folder in folders.items()}
    encoders[None] = base_encoder(family, tiny_base)
    expected = alone(TEXTS, ROWS, encoders)
    mixed = encoder.encode_queries(TEXTS, delta=ROWS)
    assert np.array_equal(mixed, expected)
    others = alone(TEXTS, [{"a": "b", "b": None, None: "a"}[name] for name in ROWS], encoders)
    distances = np.abs(mixed - others).max(1)
    assert (distances[[bool(text) for text in TEXTS]] > 1e-3).all()
    for name, one in encoders.items():  # and the trunk is as it was
        assert np.array_equal(encoder.encode_queries(TEXTS, delta=name), one.encode_queries(TEXTS))


def test_equal_bit_for_bit_over_nano_in_packs_of_hundreds_of_tokens(tmp_path):
    """Its matrices are of a size for which the library that multiplies has kernels of several shapes."""
    encoder = Encoder.from_pretrained("data/nano", markers=MarkersConfig("brackets", 75, 300))
    folders = [save_moved(encoder, seed, tmp_path / str(seed)) for seed in range(3)]
    texts = [text for text in Path("README.md").read_text().splitlines() if text][:60]
    rows = [[None, "0", "1", "2"][number % 4] for number in range(len(texts))]
    encoders = {str(seed): Encoder.from_pretrained(folder) for seed, folder in enumerate(folders)} | {None: encoder}
    for seed, folder in enumerate(folders):
        encoder.load_delta(str(seed), folder)
    for one in encoders.values():
        one.tokens_per_pack = 512
    assert len(list(encoder.packs(encoder.token_ids(texts, "document")))) > 2
    mixed = encoder.encode_documents(texts, delta=rows)
    for name, one in encoders.items():
        own = [number for number, row in enumerate(rows) if row == name]
        assert np.array_equal(mixed[own], one.encode_documents(texts)[own])


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    section = Path("README.md").read_text().split("## Many models on one trunk")[1].split("\n## ")[0]
    example = section[section.index("    from sgpt") :].split("\n\n")[0]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nano").symlink_to(Path("data/nano").resolve())
    monkeypatch.chdir(tmp_path)
    base = Encoder.from_pretrained("data/nano", markers=MarkersConfig("brackets", 75, 300))
    for seed, name in enumerate(("pydocs", "legal")):
        save_moved(base, seed, Path("runs", name, "adapter"))
    names: dict[str, object] = {}
    exec(textwrap.dedent(example), names)
    texts = ["parse a date", "a claim for damages", "a recipe"]
    assert names["texts"] == texts
    alone = Encoder.from_pretrained("runs/pydocs").encode(texts, "query")
    unmarked = Encoder.from_pretrained("data/nano").encode(texts, "query")
    assert np.allclose(names["embeddings"][[0, 2]], [alone[0], unmarked[2]], atol=1e-6)


@pytest.mark.parametrize("family", ["gpt_neo", "qwen3"])
def test_each_row_has_the_markers_limits_pooling_and_length_of_its_model(family, tiny_delta, tiny_base):
    """Token ids differ in number then, and so the packs do: equal to rounding."""
    folders = {
        "a": tiny_delta(family, 1, markers="none", pooling="mean", query_max_tokens=5, normalize=True),
        "b": tiny_delta(family, 2, pooling="last_token"),
    }
    encoder = base_encoder(family, tiny_base)
    for name, folder in folders.items():
        encoder.load_delta(name, folder)
    assert [loaded.contract.pooling for loaded in encoder.deltas.values()] == ["mean", "last_token"]
    encoders = {name: Encoder.from_pretrained(folder) for name, folder in folders.items()}
    encoders[None] = base_encoder(family, tiny_base)
    expected, mixed = alone(TEXTS, ROWS, encoders), encoder.encode_queries(TEXTS, delta=ROWS)
    assert np.abs(mixed - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.allclose(np.linalg.norm(mixed[0::3], axis=1), 1)  # no text among them is empty
    assert not np.allclose(np.linalg.norm(mixed[8::3], axis=1), 1)
    unit = np.linalg.norm(encoder.encode_queries(TEXTS, delta=ROWS, normalize=True), axis=1)
    assert np.allclose(unit[[name != "a" or bool(text) for name, text in zip(ROWS, TEXTS, strict=True)]], 1)


def test_a_trunk_that_takes_no_packs_has_passes_for_each_delta(tiny_delta, tiny_base):
    encoder = base_encoder("gpt_neo", tiny_base)
    encoder.trunk.config._attn_implementation = "sdpa"  # as for a family whose attention is transformers' own
    assert not takes_packs(encoder.trunk)
    for name, seed in (("a", 1), ("b", 2)):
        encoder.load_delta(name, tiny_delta("gpt_neo", seed))
    encoders = {name: Encoder.from_pretrained(tiny_delta("gpt_neo", seed)) for name, seed in (("a", 1), ("b", 2))}
    encoders[None] = base_encoder("gpt_neo", tiny_base)
    expected, mixed = alone(TEXTS, ROWS, encoders), encoder.encode_queries(TEXTS, delta=ROWS)
    assert np.abs(mixed - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("tuning", ["bitfit", "bitfit_norm"])
@pytest.mark.parametrize("opened", ["run", "adapter", "export"])
@pytest.mark.parametrize("family", ["gpt_neo", "llama", "qwen2", "qwen3"])
def test_a_tuned_encoder_serves_others_of_its_base(family, opened, tuning, tiny_delta, tiny_base, tmp_path):
    """Of the base it needs the biases, which it has replaced by its own: zeros where the base has none."""
    own, other = tiny_delta(family, 1, tuning), tiny_delta(family, 2)
    expected = [Encoder.from_pretrained(folder).encode_queries(TEXTS) for folder in (own, other)]
    folder = own if opened == "adapter" else tmp_path / "run" / "export" if opened == "export" else tmp_path / "run"
    if opened != "adapter":
        export(Encoder.from_pretrained(own), tmp_path / "run" / "export", card="", adapter=own)
    encoder = Encoder.from_pretrained(folder)
    encoder.load_delta("other", other)
    base = base_encoder(family, tiny_base).encode_queries(TEXTS)
    assert np.array_equal(encoder.encode_queries(TEXTS), expected[0])
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="other"), expected[1])
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="other", strength=0), base)
    mixed = encoder.encode_queries(TEXTS, delta=["other", None] * 6)
    assert np.array_equal(mixed[0::2], expected[1][0::2])
    assert np.array_equal(mixed[1::2], expected[0][1::2])


@pytest.mark.parametrize("family", ["gpt_neo", "qwen3"])
def test_strength_is_the_share_of_the_change_rounded_once(family, tiny_delta, tiny_base):
    folder = tiny_delta(family, 1, "bitfit_norm")
    encoder = base_encoder(family, tiny_base)
    base = {name: value.detach().numpy().copy() for name, value in encoder.trunk.named_parameters()}
    encoder.load_delta("a", folder, strength=0.7)
    with encoder.deltas["a"]:
        now = {name: value.detach().numpy().copy() for name, value in encoder.trunk.named_parameters()}
    for name, trained in load_file(folder / "trained.safetensors").items():
        before = base.get(name, np.zeros(trained.shape, np.float32)).astype(np.float64)
        by_hand = before + 0.7 * (trained.numpy().astype(np.float64) - before)
        assert np.array_equal(now.pop(name), by_hand.astype(np.float32)), name
    assert all(np.array_equal(value, base[name]) for name, value in now.items())

    tuned, untuned = Encoder.from_pretrained(folder).encode_queries(TEXTS), base_encoder(family, tiny_base)
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="a", strength=1), tuned)
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="a", strength=0), untuned.encode_queries(TEXTS))
    usual = encoder.encode_queries(TEXTS, delta="a")
    assert np.array_equal(usual, encoder.encode_queries(TEXTS, delta="a", strength=0.7))
    assert not np.allclose(usual, tuned, atol=1e-3)
    strengths = [1, 0, None, 0.7] * 3
    mixed = encoder.encode_queries(TEXTS, delta="a", strength=strengths)
    for strength in (1, 0, None, 0.7):
        rows = [number for number, value in enumerate(strengths) if value == strength]
        assert np.array_equal(mixed[rows], encoder.encode_queries(TEXTS, delta="a", strength=strength)[rows])


def storage_bytes(*tensors: torch.Tensor) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("family", ["gpt_neo", "qwen3"])
def test_a_hundred_deltas_cost_a_hundred_times_one_and_nothing_else(family, tiny_delta, tiny_base):
    encoder = base_encoder(family, tiny_base)
    folders = [tiny_delta(family, seed) for seed in (1, 2)]
    trained = sum(value.nbytes for value in load_file(folders[0] / "trained.safetensors").values())
    for number in range(100):
        encoder.load_delta(str(number), folders[number % 2], strength=number / 100)
    encoder.encode_queries(TEXTS, delta=[str(7 * number) for number in range(12)], strength=0.3)
    assert encoder.deltas["7"].nbytes == trained
    held = [value for loaded in encoder.deltas.values() for value in vars(loaded).values() if isinstance(value, dict)]
    tensors = [value for values in held for value in values.values() if isinstance(value, torch.Tensor)]
    trunk = list(encoder.trunk.parameters())  # a delta knows them, and does not hold them again
    zeros = trained if family == "qwen3" else 0  # of the biases that the base has not, once
    assert storage_bytes(*tensors, *trunk) <= storage_bytes(*base_encoder(family, tiny_base).trunk.parameters()) + (
        100 * trained + zeros
    )


def test_unloading_leaves_the_trunk_as_it_was(tiny_delta, tiny_base):
    encoder = base_encoder("qwen3", tiny_base)
    names, fingerprint = list(dict(encoder.trunk.named_parameters())), encoder.fingerprint()
    encoder.load_delta("a", tiny_delta("qwen3", 1))
    encoder.load_delta("b", tiny_delta("qwen3", 2))
    assert encoder.fingerprint() == fingerprint  # an index that was made with the base stays right
    alone = Encoder.from_pretrained(tiny_delta("qwen3", 1))
    tuned = encoder.with_delta("a")
    assert tuned.contract == alone.contract
    assert tuned.fingerprint() == alone.fingerprint()
    assert np.array_equal(tuned.encode_queries(TEXTS), alone.encode_queries(TEXTS))
    encoder.unload_delta("a")
    assert list(encoder.deltas) == ["b"]
    assert np.array_equal(
        encoder.encode_queries(TEXTS, delta="b"), Encoder.from_pretrained(tiny_delta("qwen3", 2)).encode_queries(TEXTS)
    )
    encoder.unload_delta("b")
    assert list(dict(encoder.trunk.named_parameters())) == names


def test_an_export_whose_class_has_biases_keeps_its_own_when_others_come_and_go(tiny_delta, tmp_path):
    """Training added them to the base, and of the export they are ordinary parameters."""
    export(Encoder.from_pretrained(tiny_delta("qwen2", 1)), tmp_path / "export", card="")
    encoder = Encoder.from_pretrained(tmp_path / "export")
    before, fingerprint = encoder.encode_queries(TEXTS), encoder.fingerprint()
    encoder.load_delta("other", tiny_delta("qwen2", 2))
    assert encoder.fingerprint() == fingerprint
    encoder.unload_delta("other")
    assert np.array_equal(encoder.encode_queries(TEXTS), before)
    assert encoder.fingerprint() == fingerprint


def test_an_encoder_of_an_unloaded_delta_is_refused(tiny_delta, tiny_base):
    """Without the biases that the trunk had for it, its embeddings would be the base's."""
    encoder = base_encoder("qwen3", tiny_base)
    encoder.load_delta("a", tiny_delta("qwen3", 1))
    tuned, half = encoder.with_delta("a"), encoder.with_delta("a", 0.5)
    encoder.unload_delta("a")
    for one in (tuned, half):
        with pytest.raises(InputError, match=r"adapter was unloaded; load it again with load_delta"):
            one.encode_queries(TEXTS)
    encoder.load_delta("a", tiny_delta("qwen3", 1))
    assert not np.array_equal(encoder.encode_queries(TEXTS, delta="a"), encoder.encode_queries(TEXTS))


def test_a_delta_that_is_refused_leaves_no_biases_in_the_trunk(tiny_delta, tiny_base, monkeypatch):
    encoder = base_encoder("qwen3", tiny_base)
    names, fingerprint = list(dict(encoder.trunk.named_parameters())), encoder.fingerprint()
    damaged = {"layers.0.mlp.down_proj.bias": torch.zeros(3)}  # with hashes that are right
    monkeypatch.setattr("sgpt.encoder.adapter.load_file", lambda file: damaged)
    with pytest.raises(InputError, match=r"its layers\.0\.mlp\.down_proj\.bias is \(32,\) and not \(3,\)"):
        encoder.load_delta("a", tiny_delta("qwen3", 1))
    assert list(dict(encoder.trunk.named_parameters())) == names
    assert encoder.fingerprint() == fingerprint


def test_the_bases_values_follow_a_trunk_that_is_moved(tiny_delta):
    encoder = Encoder.from_pretrained(tiny_delta("gpt_neo", 1))
    encoder.load_delta("other", tiny_delta("gpt_neo", 2))
    other = encoder.deltas["other"]
    other.parameters = {name: value.to("meta") for name, value in other.parameters.items()}  # as a GPU would hold them
    assert {value.device.type for value in other.values().values()} == {"meta"}


def test_what_is_exported_is_the_encoder_alone(tiny_delta, tiny_base, tmp_path):
    """A delta in its strength is merged, and the base is not kept from export by the biases of others."""
    for family in ("llama", "qwen3"):
        encoder = base_encoder(family, tiny_base)
        encoder.load_delta("a", tiny_delta(family, 1))
        for name, one in (("base", encoder), ("part", encoder.with_delta("a", 0.7))):
            if (family, name) == ("qwen3", "part"):
                continue  # no class has all of its biases
            export(one, tmp_path / family / name, card="")
            opened = Encoder.from_pretrained(tmp_path / family / name)
            assert np.allclose(opened.encode_queries(TEXTS), one.encode_queries(TEXTS), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_in_a_narrower_dtype_a_delta_is_what_it_is_over_a_trunk_of_its_own(dtype, tiny_delta, tiny_base):
    """Trained over float32; the base is opened in float32 once more to be sure that it is this one."""
    encoder = base_encoder("llama", tiny_base, dtype=dtype)
    folders = {"a": tiny_delta("llama", 1), "b": tiny_delta("llama", 2)}
    for name, folder in folders.items():
        encoder.load_delta(name, folder)
    mixed = encoder.encode_queries(TEXTS, delta=ROWS, normalize=True)
    for name in ("a", "b", None):
        rows = [number for number, row in enumerate(ROWS) if row == name]
        one = encoder.encode_queries(TEXTS, delta=name, normalize=True)
        whole = Encoder.from_pretrained(folders[name]) if name else base_encoder("llama", tiny_base)
        expected = whole.encode_queries(TEXTS, normalize=True)
        words = [number for number in rows if TEXTS[number]]
        assert (mixed[words] * one[words]).sum(1).min() > (0.9999 if dtype == "bfloat16" else 1 - 1e-6)
        assert (one[words] * expected[words]).sum(1).min() > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_in_half_precision_takes_the_float32_biases_of_norms(family, dtype, tiny_delta, tiny_base):
    rows = ["a" if number % 3 else None for number in range(len(TEXTS))]
    encoder = base_encoder(family, tiny_base, dtype=dtype)
    untouched = encoder.encode_queries(TEXTS)
    folder = tiny_delta(family, 1)
    encoder.load_delta("a", folder)
    mixed = encoder.encode_queries(TEXTS, delta=rows, normalize=True)
    expected = Encoder.from_pretrained(folder).encode_queries(TEXTS, normalize=True)
    words = [number for number, name in enumerate(rows) if name and TEXTS[number]]
    assert (mixed[words] * expected[words]).sum(1).min() > 0.999
    assert np.array_equal(encoder.encode_queries(TEXTS), untouched)
    over_base, _ = Encoder.over_base(folder, dtype=dtype)
    assert (over_base.encode_queries(TEXTS, normalize=True)[words] * expected[words]).sum(1).min() > 0.999


def test_a_delta_over_rounded_weights_is_refused_by_a_trunk_that_has_them_whole(tiny_delta, tiny_base):
    folder = tiny_delta("gpt_neo", 1, dtype="bfloat16")
    with pytest.raises(InputError, match=r"in bfloat16, and this trunk .* unrounded; open the base with dtype=bfloat"):
        base_encoder("gpt_neo", tiny_base).load_delta("a", folder)
    encoder = base_encoder("gpt_neo", tiny_base, dtype="bfloat16")
    encoder.load_delta("a", folder)
    expected = Encoder.from_pretrained(folder, dtype="bfloat16").encode_queries(TEXTS)
    assert np.abs(encoder.encode_queries(TEXTS, delta="a") - expected).max() < 0.05 * np.abs(expected).max()


def test_threads_that_share_a_trunk_get_their_own_models_vectors(tiny_delta, tiny_base):
    """Values are exchanged in place, so one thread at a time computes."""
    encoder = base_encoder("gpt_neo", tiny_base)
    for name, seed in (("a", 1), ("b", 2)):
        encoder.load_delta(name, tiny_delta("gpt_neo", seed))
    expected = {name: encoder.encode_queries(TEXTS, delta=name) for name in ("a", "b", None)}

    def right(name: str | None) -> list[bool]:
        return [np.array_equal(encoder.encode_queries(TEXTS, delta=name), expected[name]) for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        assert all(all(of_thread) for of_thread in pool.map(right, expected))
    assert all(right(name)[0] for name in expected)


def test_what_lies_over_a_file_later_is_not_what_was_loaded(tiny_delta, tiny_base, tmp_path):
    """cp, scp and rsync --inplace write into the file that is there; a mapped one would change, or end the process."""
    folder = shutil.copytree(tiny_delta("gpt_neo", 1), tmp_path / "delta")
    encoder = base_encoder("gpt_neo", tiny_base)
    encoder.load_delta("a", folder)
    own, _ = Encoder.over_base(folder)
    expected = encoder.encode_queries(TEXTS, delta="a")
    shutil.copyfile(tiny_delta("gpt_neo", 2) / "trained.safetensors", folder / "trained.safetensors")
    assert np.array_equal(encoder.encode_queries(TEXTS, delta="a"), expected)
    assert np.array_equal(own.encode_queries(TEXTS), expected)


def test_what_cannot_be_loaded_is_refused_in_a_sentence(tiny_delta, tiny_base, tmp_path):
    encoder = base_encoder("gpt_neo", tiny_base)
    encoder.load_delta("a", tiny_delta("gpt_neo", 1))
    parameters = list(dict(encoder.trunk.named_parameters()))
    refused = [
        ("a", tiny_delta("gpt_neo", 2), r"'a' is loaded already, from .*; choose another name, or call unload_delta"),
        ("", tiny_delta("gpt_neo", 2), r"the name is ''; give a text"),
        ("b", tiny_delta("gpt2", 1), r"made from .*, and h\.0\.\S+ of this GPTNeoModel is another; open that base"),
        ("b", tiny_delta("gpt_neo", 1, "lora"), r"is not the bias delta .*: it is of low rank .*; open it alone"),
        ("b", tiny_delta("gpt_neo", 1, "full"), r"is not the bias delta .*: it changes the matrix \S+\.weight; open"),
        ("b", tiny_base("gpt_neo"), r"is not the bias delta .*: there is no sgpt_delta\.json; give a run or its"),
        ("b", tmp_path / "nothing", r"nothing"),
    ]
    for name, path, sentence in refused:
        with pytest.raises(InputError, match=sentence):
            encoder.load_delta(name, path)
    for strength in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(InputError, match=r"strength=.* must be a number"):
            encoder.load_delta("b", tiny_delta("gpt_neo", 2), strength=strength)
    assert list(encoder.deltas) == ["a"]
    assert list(dict(encoder.trunk.named_parameters())) == parameters
    other = Encoder.from_pretrained(tiny_delta("gpt_neo", 1, "full"))  # its matrices are not those of the base
    with pytest.raises(InputError, match=r"made from .*, and \S+\.weight of this GPTNeoModel is another"):
        other.load_delta("a", tiny_delta("gpt_neo", 1))


def test_matrices_are_never_mixed(tiny_base):
    """All texts of a batch are multiplied by the trunk's."""
    encoder, name = base_encoder("gpt2", tiny_base), "h.1.attn.c_attn.weight"
    (pack,) = encoder.packs([[1, 2], [3]])
    tuned = {name: encoder.trunk.get_parameter(name) + 1}
    with pytest.raises(InputError, match=rf"{name}: is a matrix"), mixed(encoder.trunk, pack, [{}, tuned], [0, 1]):
        pass


def test_a_delta_that_no_longer_gives_its_probes_is_not_loaded(tiny_delta, tiny_encoder, tiny_base, tmp_path):
    encoder, tuned = base_encoder("gpt_neo", tiny_base), Encoder.from_pretrained(tiny_delta("gpt_neo", 1))
    before = {name: value.detach() for name, value in encoder.trunk.named_parameters() if name.endswith("bias")}
    for name, probed in (("right", tuned), ("wrong", tiny_encoder("gpt_neo"))):
        folder = tmp_path / name
        save_adapter(tuned.trunk, tuned.tokenizer, tuned.contract, before, folder, measured=measure(probed))
    with pytest.raises(InputError, match=r"wrong: its embeddings differ by .* from those it was saved with"):
        encoder.load_delta("a", tmp_path / "wrong")
    assert not encoder.deltas
    encoder.load_delta("a", tmp_path / "right", strength=0.3)


def test_what_encode_does_not_know_is_refused_in_a_sentence(tiny_delta, tiny_base):
    encoder = base_encoder("gpt_neo", tiny_base)
    with pytest.raises(InputError, match=r"there is no delta 'b'; loaded are none"):
        encoder.encode_queries(["x"], delta="b")
    encoder.load_delta("a", tiny_delta("gpt_neo", 1))
    for options, sentence in [
        ({"delta": ["a", "c"]}, r"there is no delta 'c'; loaded are 'a'"),
        ({"delta": ["a"]}, r"delta has 1 entries for 2 texts"),
        ({"delta": "a", "strength": [1.0]}, r"strength has 1 entries for 2 texts"),
        ({"strength": 0.5}, r"strength=0\.5 has no effect without a delta"),
        ({"delta": ["a", None], "strength": [0.5, 0.5]}, r"has no effect on a text without a delta; give None for it"),
        ({"delta": "a", "strength": float("nan")}, r"strength=nan must be a number"),
    ]:
        with pytest.raises(InputError, match=sentence):
            encoder.encode_queries(["x", "y"], **options)
    with pytest.raises(InputError, match=r"there is no delta 'c'; loaded are 'a'"):
        encoder.unload_delta("c")
