"""Training data by name: which columns, labels and rows make an example."""
