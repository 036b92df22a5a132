"""A frozen decoder over packs of texts, without padding: families, attention, opening a model."""
