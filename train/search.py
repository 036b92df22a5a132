"""Search with a trained model: `python train/search.py run=runs/pydocs query="parse a date from a string"`."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("search", groups=False, verbatim=("query", "prompt"))
def main(composed: DictConfig) -> None:
    import sys
    from pathlib import Path

    from rich.console import Console
    from rich.markup import escape

    from sgpt.cli.compose import typed
    from sgpt.data.formats.beir import read_search_corpus
    from sgpt.data.readers import default_corpus
    from sgpt.encoder.encoder import Encoder
    from sgpt.retrieval.searcher import SearchConfig, Searcher, index_folder, load_encoder_and_reranker
    from sgpt.runtime.device import default_device
    from sgpt.runtime.errors import InputError
    from sgpt.runtime.interrupt import exit_code, interrupt_message
    from sgpt.runtime.progress import announce

    config = typed(SearchConfig, composed)
    if not config.run:
        raise InputError("set run=<folder of a run, export, adapter or other model>, for example run=runs/pydocs")
    device = default_device()
    announce(f"{config.corpus or 'documentation of Python'} is searched by {config.run}, on {device}")
    if config.rerank:
        encoder, reranker = load_encoder_and_reranker(config.run, config.prompt, device=device)
    else:
        encoder, reranker = Encoder.from_pretrained(config.run).to(device), None
    path = Path(config.corpus) if config.corpus else default_corpus()
    folder = index_folder(config.run, path)
    documents = read_search_corpus(path)
    with interrupt_message("the documents that were indexed are kept"):
        searcher = Searcher(encoder, documents, folder, config.index, reranker=reranker, depth=config.depth)
    console = Console()

    def answer(query: str) -> None:
        for hit in searcher(query, config.top):
            console.print(f"{hit.score:.3f}  [bold]{escape(hit.document_id)}[/]", highlight=False)
            console.print(f"       [dim]{escape(hit.text)}[/]", no_wrap=True, overflow="ellipsis", highlight=False)

    if config.query is not None:
        answer(config.query)
        return
    console.print(f"{len(searcher.document_ids):,} documents. An empty line ends.")
    try:
        while query := console.input("query> ").strip():
            answer(query)
    except EOFError:  # Ctrl-D ends it as an empty line does
        pass
    except KeyboardInterrupt:  # at a prompt, where nothing can be lost
        console.print()
        sys.exit(exit_code())


if __name__ == "__main__":
    main()
