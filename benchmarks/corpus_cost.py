"""What a corpus costs to encode and to keep: a calculation, not a measurement; every assumption is an option.

    python benchmarks/corpus_cost.py [--documents 1e9] [--tokens 200] [--gpus 64]

A forward pass is taken for 2 operations a token and weight of the blocks (Kaplan et al. 2020, arXiv 2001.08361), with
no padding. Attention adds less than 5 % at 200 tokens, tokenising runs on the CPUs next to it.
"""

import argparse

MODELS = {  # name: (weights of the blocks, embedding size, share of the GPU's peak that such a model is assumed to use)
    "SmolLM2-135M": (106.2e6, 576, 0.15),
    "GPT-Neo-1.3B": (1.208e9, 2048, 0.35),
    "GPT-J-6B": (5.637e9, 4096, 0.40),
}
BYTES = {"float32": 4, "float16": 2, "int8": 1, "binary": 1 / 8}  # precision of train/encode.py


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--documents", type=float, default=1e9)
    arguments.add_argument("--tokens", type=float, default=200, help="a document, on average (default: %(default)s)")
    arguments.add_argument("--gpus", type=int, default=64)
    arguments.add_argument("--peak", type=float, default=989e12, help="operations a second: an H100's in bfloat16")
    arguments.add_argument("--dollars", type=float, default=2.5, help="an hour of a GPU (default: %(default)s)")
    arguments.add_argument("--dollars-gigabyte", type=float, default=0.08, help="a month on SSD (default: %(default)s)")
    options = arguments.parse_args()
    print(f"{'':13} {'docs a s':>10} {'GPU hours':>10} {'hours':>6} {'$':>7}   gigabytes ($ a month)")
    for name, (weights, size, share) in MODELS.items():
        per_second = share * options.peak / (2 * weights * options.tokens)
        gpu_hours = options.documents / per_second / 3600
        sizes = {precision: options.documents * size * width / 1e9 for precision, width in BYTES.items()}
        kept = ", ".join(f"{p} {gb:,.0f} ({gb * options.dollars_gigabyte:,.0f})" for p, gb in sizes.items())
        print(
            f"{name:13} {per_second:10,.0f} {gpu_hours:10,.0f} {gpu_hours / options.gpus:6.1f} "
            f"{gpu_hours * options.dollars:7,.0f}   {kept}"
        )


if __name__ == "__main__":
    main()
