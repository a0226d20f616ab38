"""Record parsing (conversations, preferences, labels) and encoding as tokens with a loss mask."""
