"""`meshwright serve`: an OpenAI-compatible HTTP server for the inference engine."""
