"""Serve a trained model: `python train/serve.py model=runs/pydocs`, then POST http://127.0.0.1:8000/v1/embeddings."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("serve", groups=False, verbatim=("prompt",))
def main(composed: DictConfig) -> None:

    from sgpt.cli.compose import typed
    from sgpt.runtime.device import default_device
    from sgpt.serving.config import ServeConfig, check_extra

    config = typed(ServeConfig, composed)
    check_extra()
    from sgpt.serving.server import serve

    serve(config, default_device())


if __name__ == "__main__":
    main()
