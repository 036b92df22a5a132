"""The model card of an export: what it is, how to open it and what it was trained on."""

from sgpt.decoder.base_folder import resolve
from sgpt.training.config import TrainConfig
from sgpt.training.run_folder import RunFolder


def card(run: RunFolder, config: TrainConfig) -> str:
    """The text of the export's README.md."""
    from huggingface_hub import ModelCardData

    manifest = run.read("manifest.json", {})
    base = manifest["contract"]["base"]
    on_hub = "/" in base and not resolve(base).exists()
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=base if on_hub else None,
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "sgpt", config.tuning.name],
    )
    parameters, markers = manifest["parameters"], config.markers
    sources = ", ".join(source["key"] for source in manifest["data"]["sources"])
    frozen = manifest.get("precision", {}).get("frozen", "float32")  # runs of older versions do not say
    over = f" over a trunk in {frozen}" if frozen != "float32" else ""
    roles = "encode_query / encode_document" if config.markers.name != "none" else "encode"
    return f"""---
{data.to_yaml()}
---

# {run.name}

An SGPT bi-encoder: {base} with {parameters['trained']:,} of {parameters['total']:,} parameters trained
({config.tuning.name}, in float32{over}), pooled by {config.pooling.name}, markers {markers.name},
at most {markers.query_max_tokens} tokens a query and {markers.document_max_tokens} a document. Compare by cosine.

    from sentence_transformers import SentenceTransformer   # 6.0 or newer; older versions would leave out the markers
    model = SentenceTransformer("{run.folder}/export")        # {roles}

    from sgpt import Encoder
    encoder = Encoder.from_pretrained("{run.folder}/export")
    encoder.encode_queries([...]), encoder.encode_documents([...])

Trained on {manifest['data']['examples']:,} examples ({sources}),
loss {config.loss.name}, scale {config.loss.scale:g}, {config.trainer.queries_per_process} queries a process,
peak learning rate {config.optim.learning_rate:g}, seed {config.trainer.seed}.
"""
