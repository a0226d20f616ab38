"""Generation: the continuous-batching engine, sampling, and masked diffusion."""
