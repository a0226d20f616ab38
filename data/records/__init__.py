"""From raw records to conversations, pairs and labels, and to tokens with a loss mask."""
