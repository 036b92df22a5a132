"""Strings to token ids: markers, tokens, and the chat template that carries the markers to other loaders."""
