"""Pretrain the small base `nano`: `accelerate launch train/pretrain.py text=<folder>`.

What it does and why: sgpt/pretraining/pretrain.py. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("pretrain", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    import numpy as np

    from sgpt.cli import launch
    from sgpt.cli.compose import typed
    from sgpt.data.formats.jsonl import read_rows
    from sgpt.decoder.trunk import load_tokenizer
    from sgpt.pretraining.corpus import prepare_corpus
    from sgpt.pretraining.model import PretrainConfig, build_model, refuse_other_model, save_model
    from sgpt.pretraining.next_token_loss import perplexity
    from sgpt.pretraining.pretrain import pretrain

    config = typed(PretrainConfig, composed)
    refuse_other_model(config)
    accelerator = launch.accelerate(precision=config.precision, seed=config.seed)
    with accelerator.main_process_first():
        corpus = prepare_corpus(config)
    model = pretrain(config, corpus, accelerator)

    if accelerator.is_main_process:
        output = save_model(model, config)
        tokenizer = load_tokenizer(str(output))
        texts = [row["text"] for _, row in read_rows(Path(config.text) / "open_text/validation.jsonl.gz")]
        held_out = np.array([token for ids in tokenizer(texts)["input_ids"] for token in (*ids, 0)])  # 0 ends a text
        untrained = build_model(config.nano, config.seed).to(accelerator.device)
        after = perplexity(model, held_out, config.window_tokens)
        before = perplexity(untrained, held_out, config.window_tokens)
        print(f"held-out perplexity {after:.1f}, untrained twin {before:.1f}; written to {output}")


if __name__ == "__main__":
    main()
