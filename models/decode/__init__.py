"""Generation: continuous-batching engine, sampling, and masked diffusion."""
