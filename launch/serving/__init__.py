"""`meshwright serve`: the engine behind the HTTP interface that OpenAI's clients speak."""
