"""Is it the trained model? `python train/verify.py model=runs/pydocs` opens its folders by every installed loader.

With a server: `python train/verify.py model=runs/pydocs endpoint=http://127.0.0.1:8000`. Exits with 1 where a bound is
broken.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("verify", groups=False)
def main(composed: DictConfig) -> None:
    import sys

    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.runtime.errors import InputError
    from sgpt.runtime.progress import announce
    from sgpt.verification.config import VerifyConfig
    from sgpt.verification.folder import verify_folder
    from sgpt.verification.server import verify_server
    from sgpt.verification.table import loaders_table, server_table, summary

    config = typed(VerifyConfig, composed)
    if not config.model:
        raise InputError("set model=<folder of a run, export or adapter>, for example model=runs/pydocs")
    announce(f"{config.model} is compared with {config.endpoint or 'what every installed loader opens'}")
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    if config.endpoint is None:
        deviations = list(verify_folder(config.model))
        console.print(loaders_table(deviations, f"{config.model}, by every loader that is installed"))
        errors = [deviation.error for _, deviation in deviations if deviation.error]
        said = "\n".join(errors) or "every loader gives the trained model"
    else:
        findings = list(verify_server(config))
        console.print(server_table(findings, f"{config.endpoint} against {config.model}"))
        errors = [finding.fault for finding in findings if finding.fault]
        said = summary(findings)
    console.print(said, soft_wrap=True)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
